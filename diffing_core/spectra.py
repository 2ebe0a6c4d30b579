"""Singular values, directions and single elements of a weight change, and the tokens that a direction points to.

    frobenius = √Σσ²    spectral = σ₁    nuclear = Σσ
    effective_rank = exp(−Σ p ln p), p = σ/Σσ      stable_rank = Σσ²/σ₁²      participation_ratio = (Σσ²)²/Σσ⁴
    k50 … k99 = least k whose leading σ² hold that share of Σσ²

Low-rank: B = Q_b R_b, Aᵀ = Q_a R_a, and the SVD of the R×R matrix R_b R_aᵀ (peers §2.2), in float64.
Dense, smaller side up to a limit: eigenvalues of the Gram matrix in float64. Above it: a randomised range
finder gives the leading values; what needs the whole spectrum is then None, and ‖·‖_F is exact from the elements.

    lens of direction u: a_t = cos(h_t, u) in the metric (C + λ I)⁻¹, standardised over readable tokens

h_t is the head's row of token t times the final norm's gain, minus the mean over readable tokens; C is the
covariance of the h_t and λ its mean eigenvalue.

Suffixes: M rows, N columns, R rank of the factors, K singular values kept, D model width, V vocabulary.
Reference: Roy and Vetterli 2007 (effective rank); Halko, Martinsson and Tropp 2011 (range finder).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from diffing_core.lazy import torch

ENERGY_SHARES = {"k50": 0.5, "k90": 0.9, "k95": 0.95, "k99": 0.99}
_OVERSAMPLING = 16
_POWER_STEPS = 2
_EPSILON = 2.0**-52
_ROUNDING = 1e-12
ROWS_AT_ONCE = 8192
_ELEMENTS_AT_ONCE = 2**20
_FLOAT32_EXPONENT = 0x7F800000
_BF16_STEP = 2.0**-7
_TINY = 1e-30


@dataclass(frozen=True, eq=False)
class Factors:
    """ΔW = left right, of rank at most R; scales are folded into the left factor. Float32."""

    left_MR: Any
    right_RN: Any

    @property
    def shape(self) -> tuple[int, int]:
        """(M, N)."""
        return self.left_MR.shape[0], self.right_RN.shape[1]

    def dense(self) -> Any:
        """The product, [M, N]; only where a whole tensor is compared."""
        return self.left_MR @ self.right_RN

    def pieces(self) -> Iterable[tuple[slice, Any]]:
        """The product a few rows at a time, with the rows' places."""
        n_rows = max(1, _ELEMENTS_AT_ONCE // max(1, self.shape[1]))
        for start in range(0, self.shape[0], n_rows):
            rows = slice(start, start + n_rows)
            yield rows, self.left_MR[rows] @ self.right_RN

    def spectrum(self) -> "Spectrum":
        """Its singular values by two thin QRs and one R×R SVD."""
        left_basis_MR, left_RR = torch.linalg.qr(self.left_MR.double())
        _, right_RR = torch.linalg.qr(self.right_RN.double().T)
        rotation_RK, sigma_K, _ = torch.linalg.svd(left_RR @ right_RR.T, full_matrices=False)
        kept = sigma_K > sigma_K.max() * len(sigma_K) * _EPSILON if len(sigma_K) else sigma_K.bool()
        left_MK = (left_basis_MR @ rotation_RK)[:, kept].float()
        return Spectrum(sigma_K[kept], left_MK, torch.linalg.vector_norm(sigma_K[kept]).item())

    def row_norms(self, *, centred: bool) -> Any:
        """Length of each row of the product, [M], or of what is left of it without the mean row."""
        left_MR = self.left_MR - self.left_MR.mean(0) if centred else self.left_MR
        return ((left_MR @ (self.right_RN @ self.right_RN.T)) * left_MR).sum(-1).clamp(min=0).sqrt()

    def inner(self, other_MN: Any) -> float:
        """⟨other, product⟩, without the product."""
        return ((other_MN @ self.right_RN.T).double() * self.left_MR).sum().item()

    def equals(self, other: "Factors") -> bool:
        """Whether both factors are the same numbers."""
        return torch.equal(self.left_MR, other.left_MR) and torch.equal(self.right_RN, other.right_RN)


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Positive singular values, largest first, with left vectors; not `complete` if only the leading are known.

    `left_MK` may hold the vectors of the leading values only.
    """

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


def of_dense(delta_MN: Any, *, exact_side: int, n_leading: int, generator: Any) -> Spectrum:
    """Spectrum of a matrix: whole if its smaller side is at most `exact_side`, else its `n_leading` largest values.

    Vectors come with the leading values only.
    """
    frobenius = torch.linalg.vector_norm(delta_MN, dtype=torch.float64).item()
    if frobenius == 0:
        return Spectrum(torch.zeros(0, dtype=torch.float64), torch.zeros(len(delta_MN), 0), 0.0)
    if min(delta_MN.shape) <= exact_side:
        return _by_gram(delta_MN, frobenius, n_leading)
    return _by_sketch(delta_MN, frobenius, n_leading, generator)


def elementwise(base: Any, change: Any) -> dict[str, float | None]:
    """Sizes of single elements of a tensor or of Factors, never all at once; what rounding to bfloat16 can explain.

    One step of bfloat16 at w is 2^(⌊log₂|w|⌋ − 7). Rounding errors are uniform in ± half a step, so rounding the tuned
    tensor leaves ‖ΔW‖_F = √(Σ step²/12) by itself: the floor.
    """
    total = largest = n_changed = n_within = squared_steps = 0.0
    for base_part, change_part in _pieces(base, change):
        size = change_part.abs()
        step = (base_part.contiguous().view(torch.int32) & _FLOAT32_EXPONENT).view(torch.float32) * _BF16_STEP
        changed = size > 0
        total += size.sum(dtype=torch.float64).item()
        largest = max(largest, size.max().item())
        n_changed += int(changed.sum())
        n_within += int((changed & (size <= step)).sum())
        squared_steps += torch.linalg.vector_norm(step, dtype=torch.float64).item() ** 2
    return {
        "mean_abs": total / base.numel(),
        "max_abs": largest,
        "share_unchanged": 1 - n_changed / base.numel(),
        "share_rounding": n_within / n_changed if n_changed else None,
        "rounding_floor": (squared_steps / 12) ** 0.5,
    }


class Lens:
    """Cosines between directions and tokens, in the metric in which tokens spread equally to all sides."""

    def __init__(self, head_VD: Any, gain_D: Any, readable_V: Any, *, centred: bool) -> None:
        self._head_VD, self._gain_D, self._centred = head_VD, gain_D, centred
        self.readable_V = torch.as_tensor(readable_V)
        ids = self.readable_V.nonzero()[:, 0]
        self._mean_D = sum(self._rows(part).sum(0) for part in head_VD[ids].split(ROWS_AT_ONCE)) / len(ids)
        sample_ND = self._rows(head_VD[ids[:: -(-len(ids) // ROWS_AT_ONCE)]]) - self._mean_D
        covariance_DD = (sample_ND.T @ sample_ND / len(sample_ND)).double()
        ridge_D = covariance_DD.diagonal().mean().clamp(min=_TINY).expand(len(gain_D))
        root_DD = torch.linalg.cholesky(covariance_DD + ridge_D.diag())
        self._unroot_DD = torch.linalg.inv(root_DD).float()
        norms = [((self._rows(part) - self._mean_D) @ self._unroot_DD.T).norm(dim=1) for part in self._parts()]
        self._norm_V = torch.cat(norms).clamp(min=_TINY)

    def standardised(self, direction_KD: Any) -> Any:
        """Those cosines, less their mean over readable tokens, over their deviation: z [K, V]."""
        white_KD = direction_KD @ self._unroot_DD.T
        white_KD = white_KD / white_KD.norm(dim=1, keepdim=True).clamp(min=_TINY)
        back_KD = white_KD @ self._unroot_DD
        inner_KD = back_KD - back_KD.mean(1, keepdim=True) if self._centred else back_KD
        scaled_DK = (inner_KD * self._gain_D).T
        product_VK = torch.cat([part_VD.float() @ scaled_DK for part_VD in self._parts()])
        cosine_KV = ((product_VK - back_KD @ self._mean_D) / self._norm_V[:, None]).T
        read_KV = cosine_KV[:, self.readable_V]
        return (cosine_KV - read_KV.mean(1, keepdim=True)) / read_KV.std(1, keepdim=True).clamp(min=_TINY)

    def _rows(self, part_VD: Any) -> Any:
        """Rows of the head times the gain; minus their mean where the final norm takes it out."""
        rows_VD = part_VD.float() * self._gain_D
        return rows_VD - rows_VD.mean(-1, keepdim=True) if self._centred else rows_VD

    def _parts(self) -> Iterable[Any]:
        return self._head_VD.split(ROWS_AT_ONCE)


def _pieces(base: Any, change: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(change, Factors):
        return ((base[rows], product) for rows, product in change.pieces())
    flat = (each.reshape(-1).split(_ELEMENTS_AT_ONCE) for each in (base, change))
    return zip(*flat, strict=True)


def _by_gram(delta_MN: Any, frobenius: float, n_leading: int) -> Spectrum:
    sigma_K, vectors_KK = eigen(gram(delta_MN))
    left_MK = vectors_KK[:, :n_leading]
    if delta_MN.shape[0] > delta_MN.shape[1]:
        parts = [part.double() @ left_MK for part in delta_MN.split(ROWS_AT_ONCE)]
        left_MK = torch.cat(parts) / sigma_K[:n_leading]
    return Spectrum(sigma_K, left_MK.float(), frobenius)


def gram(matrix_MN: Any) -> Any:
    """WᵀW or, of more columns than rows, W Wᵀ: [K, K] float64."""
    long = matrix_MN if matrix_MN.shape[0] > matrix_MN.shape[1] else matrix_MN.T
    return sum(part.T @ part for part in map(torch.Tensor.double, long.split(ROWS_AT_ONCE)))


def eigen(gram_KK: Any) -> tuple[Any, Any]:
    """Singular values and the singular vectors of the smaller side, float64, largest first, from its Gram matrix.

    Squaring costs half the digits: values below √(K ε) σ₁ are noise and left out.
    """
    squares_K, vectors_KK = torch.linalg.eigh(gram_KK)
    squares_K, vectors_KK = squares_K.flip(0), vectors_KK.flip(1)
    kept = squares_K > squares_K[0] * len(squares_K) * _EPSILON
    return squares_K[kept].sqrt(), vectors_KK[:, kept]


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
