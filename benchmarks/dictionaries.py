"""Crosscoder: training against dictionary-learning's own loop; the reading pass with Latent Scaling against encoding alone.

dictionary-learning 0.1.0 has no crosscoder; its BatchTopK autoencoder on both models' activations side by side has the
same products. Both get the same tensors in memory.
"""

from typing import Any

from benchmarks.figure import Figure, cpu_s, in_turn
from benchmarks.sae import train_sae

WIDTH = 256
LATENTS, K = 32 * WIDTH, WIDTH // 16  # as the settings have it for enough text
BATCH_ROWS = 2048
FEWER_LATENTS, LARGER_K = 4096, 32  # twice the entries to half the encoding: the harder case
TOKENS_PER_TEXT, TEXTS = 64, 768  # of the pass: a batch of some 2,500 rows for each of its blocks of documents
ROWS = 4096  # of the batch on which the loop is timed
LOOPED = 32  # latents of which the loop is timed


def crosscoder_training(n_steps: int = 4) -> list[Figure]:
    """Our loop over `trainSAE`, tokens per second and processor: same rows in memory, width, latents, k and steps.

    Both are whole trainings with their beginning: random weights here, there a geometric median of the first batch as well.
    """
    import torch

    from diffing_core.methods.crosscoder.training import Plan, Training, train

    batches = [_activations(BATCH_ROWS, seed) for seed in range(n_steps)]
    together = [torch.cat(pair, dim=1) for pair in batches]
    plan = Plan(steps=n_steps, learning_rate=1e-4, k=K)
    taken = in_turn(
        {
            "ours (s)": lambda: train(Training(_start(), plan, (WIDTH, WIDTH)), lambda _: iter(batches), lambda *_: None),
            "trainSAE (s)": lambda: _trained_by_their_loop(together),
        },
        3,
        cpu_s,
    )
    parts = taken | {"tokens per s": n_steps * BATCH_ROWS / taken["ours (s)"]}
    return [Figure("crosscoder_training_speedup", taken["trainSAE (s)"] / taken["ours (s)"], "×", 1, "higher", parts)]


def _trained_by_their_loop(batches: list[Any]) -> None:
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer

    configuration = {
        "trainer": BatchTopKTrainer,
        "steps": len(batches),
        "activation_dim": 2 * WIDTH,
        "dict_size": LATENTS,
        "k": K,
        "layer": 0,
        "lm_name": "",
        "warmup_steps": 1,
        "threshold_start_step": 1,
        "seed": 0,
        "device": "cpu",
    }
    train_sae()(iter(batches), [configuration], len(batches), device="cpu")


def latent_scaling() -> list[Figure]:
    """The whole pass of the method over one that encodes the same rows and does nothing else, in memory.

    The pass: rows gathered by block of documents, encoded, rebuilt, four targets along four directions (both decoders
    and two controls) in blocks for the jackknife, fit and activity of fitted and held-out parts.
    """
    figures = []
    for name, n_latents, k in (("", LATENTS, K), ("_k32", FEWER_LATENTS, LARGER_K)):
        crosscoder = _calibrated(n_latents, k)
        rows = _Rows.made()
        taken = in_turn(
            {"encode (s)": lambda: _encoded(crosscoder, rows), "whole pass (s)": lambda: _read(crosscoder, rows)},  # noqa: B023
            3,
            cpu_s,
        )
        one_pass = taken["whole pass (s)"] / taken["encode (s)"]
        figures.append(Figure(f"latent_scaling_per_encode{name}", one_pass, "×", 1.2, "lower", taken))
    return figures


def latent_scaling_loop() -> list[Figure]:
    """The sums of all latents at once over those of a loop over latents, as published; both with the same directions."""
    from diffing_core.latent_scaling import LatentScaling
    from diffing_core.methods.crosscoder.reading import ERRORS, RECONSTRUCTIONS, scaled_directions

    crosscoder, pair = _calibrated(LATENTS, K), _activations(ROWS, 0)
    code, code_NF = crosscoder.sparse(crosscoder.scaled(pair)), crosscoder.encode(pair)
    rebuilt = [code.times(decoder_FD) for decoder_FD in crosscoder.decoder_MFD]
    errors = [each - rebuilt_ND for each, rebuilt_ND in zip(pair, rebuilt, strict=True)]
    targets = dict(zip(ERRORS + RECONSTRUCTIONS, (*errors, *rebuilt), strict=True))
    directions = scaled_directions(crosscoder)
    scaling = LatentScaling(directions, ERRORS + RECONSTRUCTIONS)
    taken = in_turn(
        {
            "sums alone (s)": lambda: scaling.add(code, targets, 0),
            "loop (s)": lambda: _looped(code_NF, targets, directions),
        },
        3,
        cpu_s,
    )
    taken["loop (s)"] *= LATENTS / LOOPED
    return [Figure("latent_scaling_speedup", taken["loop (s)"] / taken["sums alone (s)"], "×", 10, "higher", taken)]


def _activations(n_rows: int, seed: int) -> tuple[Any, Any]:
    import torch

    draw = torch.Generator().manual_seed(seed)
    base_ND = torch.randn(n_rows, WIDTH, generator=draw)
    return base_ND, base_ND + 0.3 * torch.randn(n_rows, WIDTH, generator=draw)


def _start(n_latents: int = LATENTS) -> Any:
    import torch

    from diffing_core.methods.crosscoder.model import Crosscoder
    from diffing_core.methods.crosscoder.partition import Partition

    return Crosscoder.initial(Partition.of("plain", n_latents, 0.0, 1.0), [torch.zeros(WIDTH)] * 2, (1.0, 1.0), 0)


def _calibrated(n_latents: int, k: float) -> Any:
    from diffing_core.methods.crosscoder.threshold import calibrated_threshold

    crosscoder = _start(n_latents)
    crosscoder.threshold = calibrated_threshold(crosscoder, [_activations(ROWS, 0)], k)
    return crosscoder


class _Rows:
    """Rows in memory in place of stored ones: texts one after the other, in groups like a file's."""

    def __init__(self, every: Any, per_group: int) -> None:
        self._every, self._per_group = every, per_group

    @classmethod
    def made(cls) -> "_Rows":
        import numpy as np

        from diffing_core.activation_pairs import PairedRows
        from diffing_core.activation_parts import ROWS_PER_GROUP

        place_N = np.arange(TEXTS * TOKENS_PER_TEXT)
        none_N = np.zeros(len(place_N), np.int64)
        text_N, position_N = place_N // TOKENS_PER_TEXT, place_N % TOKENS_PER_TEXT
        rows = PairedRows(none_N, text_N, position_N, none_N, none_N, none_N > 0, *_activations(len(place_N), 1))
        return cls(rows, ROWS_PER_GROUP)

    def blocks(self) -> Any:
        """As `PairedActivations.blocks`."""
        for start in range(0, len(self._every), self._per_group):
            yield self._every.take(slice(start, start + self._per_group))

    def sequence_N(self, rows: Any) -> Any:
        """As `FitReading.sequence_N`, of one corpus."""
        return rows.sequence_N


def _encoded(crosscoder: Any, rows: _Rows) -> None:
    from diffing_core.methods.crosscoder.data import pieces

    for group in rows.blocks():
        for pair in pieces(group, BATCH_ROWS, len(group)):
            crosscoder.sparse(crosscoder.scaled(pair))


def _read(crosscoder: Any, rows: _Rows) -> None:
    import torch

    from diffing_core.activation_pairs import Selection
    from diffing_core.methods.crosscoder.reading import Reading

    mean_MD = (torch.zeros(WIDTH), torch.zeros(WIDTH))
    Reading.of(crosscoder, rows, Selection(part="held_out"), rows, mean_MD)  # type: ignore[arg-type]


def _looped(code_NF: Any, targets: dict[str, Any], directions: dict[str, Any]) -> list[float]:
    """The same sums as published: latent by latent, target by target, direction by direction."""
    return [
        float((code_NF[:, latent] * (target_ND @ direction_FD[latent])).sum())
        for latent in range(LOOPED)
        for target_ND in targets.values()
        for direction_FD in directions.values()
    ]
