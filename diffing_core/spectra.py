"""Singular values of a weight change and the measures that follow from them, without forming low-rank products.

    frobenius = √Σσ²    spectral = σ₁    nuclear = Σσ
    effective_rank = exp(−Σ p ln p), p = σ/Σσ      stable_rank = Σσ²/σ₁²      participation_ratio = (Σσ²)²/Σσ⁴
    k50 … k99 = least k whose leading σ² hold that share of Σσ²

Low-rank: B = Q_b R_b, Aᵀ = Q_a R_a, and the SVD of the R×R matrix R_b R_aᵀ (peers §2.2), in float64.
Dense, smaller side up to a limit: eigenvalues of the Gram matrix in float64. Above it: a randomised range
finder gives the leading values; what needs the whole spectrum is then None, and ‖·‖_F is exact from the elements.

Suffixes: M rows, N columns, R rank of the factors, K singular values kept.
Reference: Roy and Vetterli 2007 (effective rank); Halko, Martinsson and Tropp 2011 (range finder).
"""

from dataclasses import dataclass
from typing import Any

from diffing_core.lazy import torch

ENERGY_SHARES = {"k50": 0.5, "k90": 0.9, "k95": 0.95, "k99": 0.99}
_OVERSAMPLING = 16
_POWER_STEPS = 2
_GRAM_NOISE = 2.0**-52
_ROUNDING = 1e-12


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Positive singular values, largest first, with their left vectors; not `complete` if only the leading are known."""

    sigma_K: Any
    left_MK: Any
    frobenius: float
    complete: bool = True

    @property
    def spectral(self) -> float:
        """σ₁."""
        return self.sigma_K[0].item() if len(self.sigma_K) else 0.0

    @property
    def nuclear(self) -> float | None:
        """Σσ; None for a partial spectrum."""
        return self.sigma_K.sum().item() if self.complete else None

    @property
    def effective_rank(self) -> float | None:
        """Exponential of the entropy of σ/Σσ: at least 1, or 0 for a zero matrix; None for a partial spectrum."""
        if not self.complete:
            return None
        if not len(self.sigma_K):
            return 0.0
        p_K = self.sigma_K / self.sigma_K.sum()
        return max(1.0, torch.special.entr(p_K).sum().exp().item())

    @property
    def stable_rank(self) -> float:
        """‖·‖_F²/σ₁²; 0 for a zero matrix."""
        return (self.frobenius / self.spectral) ** 2 if self.spectral else 0.0

    @property
    def participation_ratio(self) -> float | None:
        """(Σσ²)²/Σσ⁴; None for a partial spectrum."""
        if not self.complete:
            return None
        relative_K = (self.sigma_K / self.spectral) ** 2 if self.spectral else self.sigma_K
        return (relative_K.sum() ** 2 / (relative_K**2).sum()).item() if self.spectral else 0.0

    @property
    def energy_shares_K(self) -> Any:
        """σ²/‖·‖_F² of each value."""
        return (self.sigma_K / self.frobenius) ** 2 if self.frobenius else self.sigma_K

    def energy_rank(self, share: float) -> int | None:
        """Least number of leading values that hold `share` of the energy; None if those known do not."""
        if not len(self.sigma_K):
            return 0
        reached = (self.energy_shares_K.cumsum(0) >= share * (1 - _ROUNDING)).nonzero()
        if len(reached):
            return int(reached[0].item()) + 1
        return len(self.sigma_K) if self.complete else None


def of_factors(left_MR: Any, right_RN: Any) -> Spectrum:
    """Spectrum of left @ right by two thin QRs and one R×R SVD."""
    left_basis_MR, left_RR = torch.linalg.qr(left_MR.double())
    _, right_RR = torch.linalg.qr(right_RN.double().T)
    rotation_RK, sigma_K, _ = torch.linalg.svd(left_RR @ right_RR.T, full_matrices=False)
    size = sigma_K[0].item() if len(sigma_K) else 0.0
    kept = sigma_K > size * max(left_MR.shape[1], 1) * _GRAM_NOISE
    sigma_K = sigma_K[kept]
    frobenius = torch.linalg.vector_norm(sigma_K).item()
    return Spectrum(sigma_K, (left_basis_MR @ rotation_RK)[:, kept].float(), frobenius)


def of_dense(delta_MN: Any, *, exact_side: int, n_leading: int, generator: Any) -> Spectrum:
    """Spectrum of a matrix: whole if its smaller side is at most `exact_side`, else its `n_leading` largest values."""
    frobenius = torch.linalg.vector_norm(delta_MN, dtype=torch.float64).item()
    if frobenius == 0:
        return Spectrum(torch.zeros(0, dtype=torch.float64), torch.zeros(len(delta_MN), 0), 0.0)
    if min(delta_MN.shape) <= exact_side:
        return _by_gram(delta_MN, frobenius)
    return _by_sketch(delta_MN, frobenius, n_leading, generator)


def _by_gram(delta_MN: Any, frobenius: float) -> Spectrum:
    """Squaring costs half the digits: values below √(K ε) σ₁ are noise and count as zero."""
    delta_MN = delta_MN.double()
    tall = delta_MN.shape[0] > delta_MN.shape[1]
    gram_KK = delta_MN.T @ delta_MN if tall else delta_MN @ delta_MN.T
    squares_K, vectors_KK = torch.linalg.eigh(gram_KK)
    squares_K, vectors_KK = squares_K.flip(0), vectors_KK.flip(1)
    kept = squares_K > squares_K[0] * len(squares_K) * _GRAM_NOISE
    sigma_K, vectors_KK = squares_K[kept].sqrt(), vectors_KK[:, kept]
    left_MK = delta_MN @ vectors_KK / sigma_K if tall else vectors_KK
    return Spectrum(sigma_K, left_MK.float(), frobenius)


def _by_sketch(delta_MN: Any, frobenius: float, n_leading: int, generator: Any) -> Spectrum:
    width = n_leading + _OVERSAMPLING
    probe_NK = torch.randn(delta_MN.shape[1], width, generator=generator).to(delta_MN)
    basis_MK, _ = torch.linalg.qr(delta_MN @ probe_NK)
    for _ in range(_POWER_STEPS):
        back_NK, _ = torch.linalg.qr(delta_MN.T @ basis_MK)
        basis_MK, _ = torch.linalg.qr(delta_MN @ back_NK)
    inside_KN = (basis_MK.T @ delta_MN).double()
    rotation_KK, sigma_K, _ = torch.linalg.svd(inside_KN, full_matrices=False)
    kept = sigma_K[:n_leading] > sigma_K[0] * 1e-6
    sigma_K = sigma_K[:n_leading][kept]
    left_MK = basis_MK @ rotation_KK.to(basis_MK)[:, :n_leading][:, kept]
    return Spectrum(sigma_K, left_MK, frobenius, complete=False)
