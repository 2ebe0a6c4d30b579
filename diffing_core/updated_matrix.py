"""A matrix with a low-rank change, W + L R, that is multiplied and never formed.

    (W + L R) x = W x + L (R x)        gram(W + L R) = gram(W) + C R + (C R)ᵀ + Rᵀ (Lᵀ L) R,   C = Wᵀ L

Suffixes: M rows, N columns, R rank, X columns of what it is multiplied with, K smaller side.
"""

from dataclasses import dataclass
from typing import Any

from diffing_core.spectra import ROWS_AT_ONCE, Factors


@dataclass(frozen=True, eq=False)
class UpdatedMatrix:
    """W + L R with the few operations of a tensor that products need."""

    base_MN: Any
    change: Factors

    @property
    def shape(self) -> tuple[int, int]:
        """(M, N)."""
        return self.change.shape

    @property
    def T(self) -> "UpdatedMatrix":
        """Its transpose; nothing is copied."""
        return UpdatedMatrix(self.base_MN.T, Factors(self.change.right_RN.T, self.change.left_MR.T))

    def __matmul__(self, other_NX: Any) -> Any:
        return self.base_MN @ other_NX + self.change.left_MR @ (self.change.right_RN @ other_NX)

    def split(self, n_rows: int) -> list["UpdatedMatrix"]:
        """So many of its rows after the others."""
        parts = zip(self.base_MN.split(n_rows), self.change.left_MR.split(n_rows), strict=True)
        return [UpdatedMatrix(base, Factors(left, self.change.right_RN)) for base, left in parts]

    def double(self) -> "UpdatedMatrix":
        """The same in float64."""
        return UpdatedMatrix(self.base_MN.double(), Factors(self.change.left_MR.double(), self.change.right_RN.double()))

    def gram(self, base_KK: Any) -> Any:
        """Gram matrix of the smaller side, [K, K] float64, from that of W."""
        tall = self if self.shape[0] > self.shape[1] else self.T
        left_MR, right_RN = tall.change.left_MR.double(), tall.change.right_RN.double()
        parts = zip(tall.base_MN.split(ROWS_AT_ONCE), left_MR.split(ROWS_AT_ONCE), strict=True)
        cross_KK = sum(base.double().T @ left for base, left in parts) @ right_RN
        return base_KK + cross_KK + cross_KK.T + right_RN.T @ (left_MR.T @ left_MR) @ right_RN
