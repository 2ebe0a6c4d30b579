"""Crosscoder: training against dictionary-learning's own loop; the reading pass with Latent Scaling against encoding alone.

dictionary-learning 0.1.0 has no crosscoder; its BatchTopK autoencoder on both models' activations side by side has the
same products. Both get the same tensors in memory.
"""

from dataclasses import dataclass, replace
from typing import Any

from benchmarks.figure import Clock, Figure, cpu_s, in_turn
from benchmarks.sae import train_sae


@dataclass(frozen=True)
class Shape:
    """Of a crosscoder, and where it lies."""

    width: int
    n_latents: int
    k: int
    device: str = "cpu"


SHAPE = Shape(256, 32 * 256, 16)  # as the settings have it for enough text
HARDER = Shape(256, 4096, 32)  # twice the entries to half the encoding
BATCH_ROWS = 2048
TOKENS_PER_TEXT, TEXTS = 64, 768  # of the pass: a batch of some 2,500 rows for each of its blocks of documents
ROWS = 4096  # of the batch on which the loop is timed
LOOPED = 32  # latents of which the loop is timed


def crosscoder_training(shape: Shape = SHAPE, clock: Clock = cpu_s, n_steps: int = 4) -> list[Figure]:
    """Our loop over `trainSAE`, tokens per second and processor: same rows in memory, width, latents, k and steps.

    Both are whole trainings with their beginning: random weights here, there a geometric median of the first batch as well.
    """
    import torch

    from diffing_core.methods.crosscoder.training import Plan, Training, train

    batches = [_activations(shape, BATCH_ROWS, seed) for seed in range(n_steps)]
    together = [torch.cat(pair, dim=1) for pair in batches]
    plan = Plan(steps=n_steps, learning_rate=1e-4, k=shape.k)
    variance_M = (float(shape.width), float(shape.width))
    taken = in_turn(
        {
            "ours (s)": lambda: train(Training(_start(shape), plan, variance_M), lambda _: iter(batches), lambda *_: None),
            "trainSAE (s)": lambda: _trained_by_their_loop(shape, together),
        },
        3,
        clock,
    )
    parts = taken | {"tokens per s": n_steps * BATCH_ROWS / taken["ours (s)"]}
    return [Figure("crosscoder_training_speedup", taken["trainSAE (s)"] / taken["ours (s)"], "×", 1, "higher", parts)]


def _trained_by_their_loop(shape: Shape, batches: list[Any]) -> None:
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer

    configuration = {
        "trainer": BatchTopKTrainer,
        "steps": len(batches),
        "activation_dim": 2 * shape.width,
        "dict_size": shape.n_latents,
        "k": shape.k,
        "layer": 0,
        "lm_name": "",
        "warmup_steps": 1,
        "threshold_start_step": 1,
        "seed": 0,
        "device": shape.device,
    }
    train_sae()(iter(batches), [configuration], len(batches), device=shape.device)


def latent_scaling(shapes: tuple[Shape, ...] = (SHAPE, HARDER), clock: Clock = cpu_s) -> list[Figure]:
    """The whole pass of the method over one that encodes the same rows and does nothing else, in memory.

    The pass: rows gathered by block of documents, encoded, rebuilt, four targets along four directions (both decoders
    and two controls) in blocks for the jackknife, fit and activity of fitted and held-out parts.
    """
    figures = []
    for number, shape in enumerate(shapes):
        crosscoder, rows = _calibrated(shape), _Rows.made(shape)
        taken = in_turn(
            {"encode (s)": lambda: _encoded(crosscoder, rows), "whole pass (s)": lambda: _read(crosscoder, rows)},  # noqa: B023
            3,
            clock,
        )
        one_pass, name = taken["whole pass (s)"] / taken["encode (s)"], f"latent_scaling_per_encode{f'_k{shape.k}' if number else ''}"
        figures.append(Figure(name, one_pass, "×", 1.2, "lower", taken))
    return figures


def latent_scaling_loop() -> list[Figure]:
    """The sums of all latents at once over those of a loop over latents, as published; both with the same directions."""
    from diffing_core.latent_scaling import LatentScaling
    from diffing_core.methods.crosscoder.reading import ERRORS, RECONSTRUCTIONS, scaled_directions

    crosscoder, pair = _calibrated(SHAPE), _activations(SHAPE, ROWS, 0)
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
    taken["loop (s)"] *= SHAPE.n_latents / LOOPED
    return [Figure("latent_scaling_speedup", taken["loop (s)"] / taken["sums alone (s)"], "×", 10, "higher", taken)]


def _activations(shape: Shape, n_rows: int, seed: int) -> tuple[Any, Any]:
    import torch

    draw = torch.Generator().manual_seed(seed)
    base_ND = torch.randn(n_rows, shape.width, generator=draw)
    tuned_ND = base_ND + 0.3 * torch.randn(n_rows, shape.width, generator=draw)
    return base_ND.to(shape.device), tuned_ND.to(shape.device)


def _start(shape: Shape) -> Any:
    import torch

    from diffing_core.methods.crosscoder.model import Crosscoder
    from diffing_core.methods.crosscoder.partition import Partition

    mean_MD = [torch.zeros(shape.width, device=shape.device)] * 2
    return Crosscoder.initial(Partition.of("plain", shape.n_latents, 0.0, 1.0), mean_MD, (1.0, 1.0), 0)


def _calibrated(shape: Shape) -> Any:
    from diffing_core.methods.crosscoder.threshold import calibrated_threshold

    crosscoder = _start(shape)
    crosscoder.threshold = calibrated_threshold(crosscoder, [_activations(shape, ROWS, 0)], shape.k)
    return crosscoder


class _Rows:
    """Rows in memory in place of stored ones: texts one after the other, in groups like a file's."""

    def __init__(self, every: Any, per_group: int) -> None:
        self._every, self._per_group = every, per_group

    @classmethod
    def made(cls, shape: Shape) -> "_Rows":
        import numpy as np

        from diffing_core.activation_pairs import PairedRows
        from diffing_core.activation_parts import ROWS_PER_GROUP

        place_N = np.arange(TEXTS * TOKENS_PER_TEXT)
        none_N = np.zeros(len(place_N), np.int64)
        text_N, position_N = place_N // TOKENS_PER_TEXT, place_N % TOKENS_PER_TEXT
        vectors = _activations(replace(shape, device="cpu"), len(place_N), 1)
        rows = PairedRows(none_N, text_N, position_N, none_N, none_N, none_N > 0, *vectors)
        return cls(rows, ROWS_PER_GROUP)

    @property
    def width(self) -> int:
        """Of the vectors."""
        return self._every.base_ND.shape[1]

    def watched(self, _what: str) -> Any:
        """As `PairedActivations.watched`."""
        yield from self.blocks()

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

    mean_MD = (torch.zeros(rows.width), torch.zeros(rows.width))
    Reading.of(crosscoder, rows, Selection(part="held_out"), rows, mean_MD)  # type: ignore[arg-type]


def _looped(code_NF: Any, targets: dict[str, Any], directions: dict[str, Any]) -> list[float]:
    """The same sums as published: latent by latent, target by target, direction by direction."""
    return [
        float((code_NF[:, latent] * (target_ND @ direction_FD[latent])).sum())
        for latent in range(LOOPED)
        for target_ND in targets.values()
        for direction_FD in directions.values()
    ]
