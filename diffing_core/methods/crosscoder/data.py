"""What a crosscoder is trained on: batches of raw activations of both models, and the statistics that set it up.

Statistics (scale, mean, variance, usual norm) are of one pool of shuffled rows, 2¹⁸ or 2 GiB at most, in float64.

Suffixes: M models, N tokens, D width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffing_core.activation_pairs import CAST_TOGETHER, PairedActivations, PairedRows, norms
from diffing_core.errors import NotComputableError
from diffing_core.lazy import torch
from diffing_core.settings import short_hash
from diffing_core.sums import Moments


@dataclass(frozen=True)
class Sample:
    """One pool of rows, and what it says of the activations."""

    rows: PairedRows
    norm_M: tuple[float, float]
    mean_MD: tuple[Any, Any]
    variance_M: tuple[float, float]

    @classmethod
    def of(cls, activations: PairedActivations, *, seed: int) -> "Sample":
        """Reads it.

        Raises:
            NotComputableError: there are fewer than two rows.
        """
        rows = next(activations.shuffled(activations.pool_rows, seed=seed), None)
        if rows is None or len(rows) < 2:
            raise NotComputableError("fewer than two stored tokens to fit a crosscoder on; probe the pair with more text")
        both = rows.base_ND, rows.tuned_ND
        moments = [_moments(each_ND) for each_ND in both]
        return cls(
            rows,
            tuple(float(norms(each_ND).mean(dtype=np.float64)) for each_ND in both),
            tuple(torch.from_numpy(each.mean_D.astype(np.float32)) for each in moments),
            tuple(float(each.variance_D().sum()) for each in moments),
        )

    def scale_M(self, common: bool) -> tuple[float, float]:
        """What brings mean norms to √D: one factor for both models, or one for each."""
        root = len(self.mean_MD[0]) ** 0.5
        if common:
            return (2 * root / max(sum(self.norm_M), 1e-30),) * 2
        return root / max(self.norm_M[0], 1e-30), root / max(self.norm_M[1], 1e-30)


@dataclass(frozen=True)
class Batches:
    """Epochs of shuffled batches; the same epoch is always the same batches.

    A last batch of less than half a batch is left out where it is not the only one.
    """

    activations: PairedActivations
    batch_rows: int
    seed: int

    def __call__(self, epoch: int) -> Iterator[tuple[Any, Any]]:
        """The batches of one epoch."""
        seed = int(short_hash([self.seed, epoch], 8), 16)
        for number, rows in enumerate(self.activations.shuffled(self.batch_rows, seed=seed)):
            if number and 2 * len(rows) < self.batch_rows:
                return
            yield rows.base_ND, rows.tuned_ND


def _moments(activation_ND: Any) -> Moments:
    found = Moments(activation_ND.shape[1])
    for part_ND in activation_ND.split(CAST_TOGETHER):
        found.add(part_ND.float().numpy())
    return found


def pieces(rows: PairedRows, size: int, most: int) -> Iterator[tuple[Any, Any]]:
    """Both models' activations of the first `most` rows, `size` at a time."""
    yield from zip(rows.base_ND[:most].split(size), rows.tuned_ND[:most].split(size), strict=True)
