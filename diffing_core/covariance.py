"""Covariance of vectors and its principal components, exact, from one reading in blocks.

    C = Σ (x − m)(x − m)ᵀ / n − (μ − m)(μ − m)ᵀ        m: mean of the first block, so that large means do not cancel digits

Population covariance, as the explained variances of a fixed sample are its own; scikit-learn divides by n − 1.

Suffixes: N rows, D width, K components.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from diffing_core.lazy import torch
from diffing_core.sums import float64_device


@dataclass(frozen=True)
class Principal:
    """Components [K, D] of unit length, largest variance first, with the mean [D] that is taken off before projecting.

    A component's sign is arbitrary; its entry of largest size is positive, as in scikit-learn.
    """

    component_KD: np.ndarray
    variance_K: np.ndarray
    mean_D: np.ndarray
    total_variance: float

    @property
    def explained_share_K(self) -> np.ndarray:
        """Variance of each component over that of the vectors; zeros where they are all equal."""
        return self.variance_K / self.total_variance if self.total_variance else np.zeros_like(self.variance_K)

    def coordinates(self, rows_ND: Any) -> np.ndarray:
        """Rows in the components' system, less the mean, float32 [N, K]."""
        component_DK = torch.from_numpy(self.component_KD.T.astype(np.float32))
        return ((rows_ND.float() - torch.from_numpy(self.mean_D.astype(np.float32))) @ component_DK).numpy()


class Covariance:
    """Sums over rows in float64, on `device`; memory of one D × D matrix whatever the number of rows."""

    def __init__(self, width: int, device: Any = "cpu") -> None:
        self.count = 0
        self._device = float64_device(device)
        self._shift_D: Any = None
        self._sum_D = torch.zeros(width, dtype=torch.float64, device=self._device)
        self._product_DD = torch.zeros(width, width, dtype=torch.float64, device=self._device)

    def add(self, rows_ND: Any) -> None:
        """Adds N rows."""
        if not len(rows_ND):
            return
        rows_ND = rows_ND.to(self._device).double()
        if self._shift_D is None:
            self._shift_D = rows_ND.mean(0)
        rows_ND = rows_ND - self._shift_D
        self.count += len(rows_ND)
        self._sum_D += rows_ND.sum(0)
        self._product_DD.addmm_(rows_ND.T, rows_ND)

    def mean_D(self) -> np.ndarray:
        """Mean row; zeros before the first."""
        return (self._sum_D / max(self.count, 1) + (0 if self._shift_D is None else self._shift_D)).cpu().numpy()

    def matrix_DD(self) -> Any:
        """Population covariance, float64 [D, D] (torch)."""
        offset_D = self._sum_D / max(self.count, 1)
        return self._product_DD / max(self.count, 1) - torch.outer(offset_D, offset_D)

    def effective_dimension(self, *, centred: bool = True) -> float:
        """(tr C)² / tr C²: over how many dimensions the variance is spread; 0 where there is none."""
        matrix_DD = self._around(centred)
        squares = float(matrix_DD.square().sum())
        return float(matrix_DD.trace()) ** 2 / squares if squares else 0.0

    def principal(self, k: int, *, centred: bool = True) -> Principal:
        """The k leading components, fewer if the width is smaller; uncentred ones are of mean squares, with a mean of 0."""
        matrix_DD = self._around(centred)
        variance_D, vector_DD = torch.linalg.eigh(matrix_DD)
        k = min(k, len(variance_D))
        component_KD = vector_DD.flip(1)[:, :k].T.cpu().numpy()
        largest_K = np.abs(component_KD).argmax(1)
        sign_K = np.where(component_KD[np.arange(k), largest_K] < 0, -1.0, 1.0)
        variance_K = variance_D.flip(0)[:k].clamp(min=0).cpu().numpy()
        mean_D = self.mean_D() if centred else np.zeros(len(variance_D))
        return Principal(component_KD * sign_K[:, None], variance_K, mean_D, float(matrix_DD.trace().clamp(min=0)))

    def _around(self, centred: bool) -> Any:
        """Second moments about the mean, or about zero, float64 [D, D]."""
        if centred:
            return self.matrix_DD()
        mean_D = torch.from_numpy(self.mean_D()).to(self._device)
        return self.matrix_DD() + torch.outer(mean_D, mean_D)
