"""Crosscoder: training against dictionary-learning's own step, Latent Scaling against encoding and against a loop over latents.

dictionary-learning 0.1.0 has no crosscoder; its BatchTopK autoencoder on both models' activations side by side has the
same products. Both get the same tensors in memory. Its `trainSAE` needs packages that it does not install, so its
trainer's `update` is called as `trainSAE` calls it.
"""

from typing import Any

from benchmarks.figure import Figure, cpu_s, in_turn

WIDTH = 256
LATENTS, K = 32 * WIDTH, WIDTH // 16  # as the settings have it for enough text
BATCH_ROWS = 2048
ROWS = 4096  # of a batch that is scaled
LOOPED = 32  # latents of which the loop is timed


def crosscoder_training(n_steps: int = 2) -> list[Figure]:
    """Tokens per second and processor, ours over theirs: same rows, width, latents and k."""
    import torch
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer

    from diffing_core.methods.crosscoder.training import Plan, Training

    batches = [_activations(BATCH_ROWS, seed) for seed in range(n_steps)]
    ours = Training(_start(), Plan(steps=10**6, learning_rate=1e-4, k=K), (WIDTH, WIDTH))
    theirs = BatchTopKTrainer(
        steps=10**6, activation_dim=2 * WIDTH, dict_size=LATENTS, k=K, layer=0, lm_name="", device="cpu", seed=0,
        warmup_steps=1, threshold_start_step=1,
    )  # fmt: skip
    together = [torch.cat(pair, dim=1) for pair in batches]
    taken = in_turn(
        {
            "ours (s)": lambda: [ours.step(pair) for pair in batches],
            "dictionary-learning (s)": lambda: [theirs.update(5 + step, both_ND) for step, both_ND in enumerate(together)],
        },
        3,
        cpu_s,
    )
    parts = taken | {"tokens per s": n_steps * BATCH_ROWS / taken["ours (s)"]}
    ratio = taken["dictionary-learning (s)"] / taken["ours (s)"]
    return [Figure("crosscoder_training_speedup", ratio, "×", 1, "higher", parts)]


def latent_scaling() -> list[Figure]:
    """A pass with Latent Scaling of all latents over one that encodes alone; and its sums over those of a loop over latents."""
    from diffing_core.methods.crosscoder.threshold import calibrated_threshold

    crosscoder, pair = _start(), _activations(ROWS, 0)
    crosscoder.threshold = calibrated_threshold(crosscoder, [pair], K)
    code = crosscoder.sparse(pair)
    targets = _targets(crosscoder, pair, code)
    code_NF = crosscoder.encode(pair)
    taken = in_turn(
        {
            "encode (s)": lambda: crosscoder.sparse(pair),
            "encode, reconstruct, scale (s)": lambda: _scaled(crosscoder, pair),
            "sums alone (s)": lambda: _scaling(crosscoder).add(code, targets, 0),
            "loop (s)": lambda: _looped(crosscoder, code_NF, targets),
        },
        3,
        cpu_s,
    )
    taken["loop (s)"] *= LATENTS / LOOPED
    one_pass = taken["encode, reconstruct, scale (s)"] / taken["encode (s)"]
    speedup = taken["loop (s)"] / taken["sums alone (s)"]
    return [
        Figure("latent_scaling_per_encode", one_pass, "×", 1.2, "lower", taken),
        Figure("latent_scaling_speedup", speedup, "×", 10, "higher", taken),
    ]


def _activations(n_rows: int, seed: int) -> tuple[Any, Any]:
    import torch

    draw = torch.Generator().manual_seed(seed)
    base_ND = torch.randn(n_rows, WIDTH, generator=draw)
    return base_ND, base_ND + 0.3 * torch.randn(n_rows, WIDTH, generator=draw)


def _start() -> Any:
    import torch

    from diffing_core.methods.crosscoder.model import Crosscoder
    from diffing_core.methods.crosscoder.partition import Partition

    return Crosscoder.initial(Partition.of("plain", LATENTS, 0.0, 1.0), [torch.zeros(WIDTH)] * 2, (1.0, 1.0), 0)


def _scaling(crosscoder: Any) -> Any:
    from diffing_core.latent_scaling import LatentScaling
    from diffing_core.methods.crosscoder.model import SIDES
    from diffing_core.methods.crosscoder.reading import ERRORS, RECONSTRUCTIONS

    return LatentScaling(dict(zip(SIDES, crosscoder.directions(), strict=True)), ERRORS + RECONSTRUCTIONS, 1)


def _targets(crosscoder: Any, pair: tuple[Any, Any], code: Any) -> dict[str, Any]:
    from diffing_core.methods.crosscoder.reading import ERRORS, RECONSTRUCTIONS

    rebuilt = [code.times(decoder_FD) for decoder_FD in crosscoder.decoder_MFD]
    errors = [each - rebuilt_ND for each, rebuilt_ND in zip(pair, rebuilt, strict=True)]
    return dict(zip(ERRORS + RECONSTRUCTIONS, (*errors, *rebuilt), strict=True))


def _scaled(crosscoder: Any, pair: tuple[Any, Any]) -> None:
    code = crosscoder.sparse(pair)
    _scaling(crosscoder).add(code, _targets(crosscoder, pair, code), 0)


def _looped(crosscoder: Any, code_NF: Any, targets: dict[str, Any]) -> list[float]:
    """The same sums as published: latent by latent, target by target, along either direction."""
    return [
        float((code_NF[:, latent] * (target_ND @ direction_FD[latent])).sum())
        for latent in range(LOOPED)
        for target_ND in targets.values()
        for direction_FD in crosscoder.directions()
    ]
