"""How many quantities are distributed: moments, extremes, quantiles and a histogram, in one reading.

Quantiles are exact while all values fit into memory (4 bytes each). Beyond that they come from a histogram
of logarithmic bins and have a relative error of at most RESOLUTION / 2. Which of the two holds depends on the
length of the corpus alone and is written beside the numbers.

Shapes: G quantities, N values of a block, Q quantiles.
"""

import math
from collections.abc import Sequence

import numpy as np

from diffing_core.sums import Moments

RESOLUTION = 0.01
LOWEST, HIGHEST = 1e-12, 1e12
BINS = 2 + int(math.log(HIGHEST / LOWEST) / math.log1p(RESOLUTION))  # the first is for exact zeros
BINS_TOGETHER = 10  # fine bins that a plot sees as one: 23 a decade


class Distributions:
    """Distributions of G quantities, none negative, over `n_values` values of each."""

    def __init__(self, n_quantities: int, n_values: int, memory_values: int) -> None:
        fits = n_quantities * n_values <= memory_values
        self._kept_GN = np.empty((n_quantities, n_values), np.float32) if fits else None
        self._moments = Moments(n_quantities)
        self._counts_GB = np.zeros((n_quantities, BINS), np.int64)
        self.min_G = np.full(n_quantities, np.inf)
        self.max_G = np.full(n_quantities, -np.inf)

    def add(self, value_GN: np.ndarray) -> None:
        """Adds N values of every quantity, float32."""
        if self._kept_GN is not None:
            self._kept_GN[:, self.count : self.count + value_GN.shape[1]] = value_GN
        self._moments.add(value_GN.T)
        self.min_G = np.minimum(self.min_G, value_GN.min(1))
        self.max_G = np.maximum(self.max_G, value_GN.max(1))
        place_GN = _bins(value_GN) + np.arange(len(value_GN))[:, None] * BINS
        np.add.at(self._counts_GB.reshape(-1), place_GN.reshape(-1), 1)

    @property
    def count(self) -> int:
        """Values of each quantity so far."""
        return self._moments.count

    @property
    def exact(self) -> bool:
        """Whether quantiles are exact."""
        return self._kept_GN is not None

    @property
    def mean_G(self) -> np.ndarray:
        """Means in float64."""
        return self._moments.mean_D

    @property
    def std_G(self) -> np.ndarray:
        """Population standard deviations."""
        return np.sqrt(self._moments.variance_D())

    def quantiles(self, shares: Sequence[float]) -> np.ndarray:
        """[G, Q], linear between neighbours where exact."""
        if self._kept_GN is not None:
            return np.stack([np.quantile(kept_N[: self.count].astype(np.float64), shares) for kept_N in self._kept_GN])
        below_GB = np.cumsum(self._counts_GB, axis=1)
        places_GQ = np.stack([np.searchsorted(below_B, np.multiply(shares, self.count)) for below_B in below_GB])
        middle_GQ = np.where(places_GQ == 0, 0, LOWEST * (1 + RESOLUTION) ** (places_GQ - 0.5))
        return np.clip(middle_GQ, self.min_G[:, None], self.max_G[:, None])

    def histogram(self, quantity: int) -> dict[str, np.ndarray]:
        """Bins that hold anything, ascending: bin number, low (inclusive), high, count. Bin 0 holds exact zeros."""
        counts = np.append(self._counts_GB[quantity, 0], np.add.reduceat(self._counts_GB[quantity, 1:], _FIRST_OF_TOGETHER))
        bins = np.flatnonzero(counts)
        edges = np.append(0.0, LOWEST * (1 + RESOLUTION) ** (BINS_TOGETHER * np.arange(len(counts), dtype=float)))
        return {
            "bin": bins,
            "low": np.where(bins == 0, 0.0, edges[bins]),
            "high": np.where(bins == 0, 0.0, edges[bins + 1]),
            "n_tokens": counts[bins],
        }


_FIRST_OF_TOGETHER = np.arange(0, BINS - 1, BINS_TOGETHER)


def _bins(value_GN: np.ndarray) -> np.ndarray:
    scaled_GN = np.log(np.clip(value_GN, LOWEST, HIGHEST).astype(np.float64) / LOWEST) / math.log1p(RESOLUTION)
    return np.where(value_GN > 0, 1 + scaled_GN.astype(np.int64), 0)
