"""One tensor of a task vector: inner products and subspaces, from LoRA factors where there are any.

    ⟨s₁B₁A₁, s₂B₂A₂⟩ = tr((B₁ᵀB₂)(A₂A₁ᵀ)), scales folded into B        dense: Σ over elements, float64 accumulation

Suffixes: M rows (outputs), N columns (inputs), K directions.
"""

from dataclasses import dataclass
from typing import Any

from diffing_core.lazy import torch
from diffing_core.spectra import Factors, Spectrum, of_dense
from diffing_core.weights import TensorDelta

_EXACT_SIDE = 256
_SMALLEST = 1e-4


@dataclass(frozen=True, eq=False)
class Space:
    """Orthonormal leading directions of outputs and inputs, and their singular values, largest first."""

    left_MK: Any
    right_NK: Any
    sigma_K: Any

    def left_overlap(self, other: "Space") -> float:
        """‖U₁ᵀU₂‖_F²: from 0 to the smaller number of directions."""
        return (self.left_MK.T @ other.left_MK).square().sum().item()

    def right_overlap(self, other: "Space") -> float:
        """‖V₁ᵀV₂‖_F²."""
        return (self.right_NK.T @ other.right_NK).square().sum().item()

    def first(self, k: int) -> "Space":
        """Its first k directions."""
        return Space(self.left_MK[:, :k], self.right_NK[:, :k], self.sigma_K[:k])


@dataclass(frozen=True, eq=False)
class TaskTensor:
    """ΔW as factors, or whole."""

    change: Any

    @classmethod
    def of(cls, delta: TensorDelta) -> "TaskTensor":
        """The change of one tensor; a dense one is subtracted here."""
        return cls(delta.factors or delta.pair.tuned - delta.pair.base)

    @property
    def shape(self) -> tuple[int, ...]:
        """(M, N), or that of a vector."""
        return tuple(self.change.shape)

    def common_rows(self, other: "TaskTensor") -> "TaskTensor":
        """Its first rows, as many as both have, where the other differs in the number of rows only; else itself."""
        if self.shape[1:] != other.shape[1:] or len(self.shape) != len(other.shape) or self.shape[:1] <= other.shape[:1]:
            return self
        n, change = other.shape[0], self.change
        return TaskTensor(Factors(change.left_MR[:n], change.right_RN) if isinstance(change, Factors) else change[:n])

    def inner(self, other: "TaskTensor") -> float:
        """⟨ΔW₁, ΔW₂⟩ of two tensors of one shape; no product of two factors is formed."""
        one, two = self.change, other.change
        if isinstance(one, Factors) and isinstance(two, Factors):
            left_RR = one.left_MR.double().T @ two.left_MR.double()
            right_RR = one.right_RN.double() @ two.right_RN.double().T
            return (left_RR * right_RR).sum().item()
        if isinstance(one, Factors):
            return one.inner(two)
        return two.inner(one) if isinstance(two, Factors) else (one * two).sum(dtype=torch.float64).item()

    def squared(self) -> float:
        """‖ΔW‖_F²; rounding does not make it negative."""
        return max(self.inner(self), 0.0)

    def spectrum(self, rank: int, seed: int) -> Spectrum:
        """Its singular values, at least the `rank` largest, with left vectors.

        The random range finder starts anew at every matrix, so that of one does not depend on what was read before.
        """
        if isinstance(self.change, Factors):
            return self.change.spectrum()
        generator = torch.Generator().manual_seed(seed)
        return of_dense(self.change, exact_side=_EXACT_SIDE, n_leading=rank, generator=generator)

    def space(self, rank: int, seed: int) -> Space:
        """Its leading directions, at most `rank`; none below 1e-4 of the largest, where float32 knows no direction."""
        spectrum = self.spectrum(rank, seed)
        sigma_K = spectrum.sigma_K[:rank]
        sigma_K = sigma_K[sigma_K > _SMALLEST * spectrum.spectral]
        left_MK = spectrum.left_MK[:, : len(sigma_K)].double()
        right_NK, _ = torch.linalg.qr(self._back(left_MK) / sigma_K)
        return Space(left_MK, right_NK, sigma_K)

    def outside(self, basis_MK: Any) -> "TaskTensor":
        """What is left of ΔW without the output directions of an orthonormal basis."""
        basis_MK = basis_MK.float()
        if isinstance(self.change, Factors):
            left_MR = self.change.left_MR
            return TaskTensor(Factors(left_MR - basis_MK @ (basis_MK.T @ left_MR), self.change.right_RN))
        return TaskTensor(self.change - basis_MK @ (basis_MK.T @ self.change))

    def _back(self, left_MK: Any) -> Any:
        """ΔWᵀ left, [N, K], float64."""
        if isinstance(self.change, Factors):
            return self.change.right_RN.double().T @ (self.change.left_MR.double().T @ left_MK)
        return (self.change.T @ left_MK.to(self.change)).double()
