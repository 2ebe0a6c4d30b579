"""The change of one tensor, and what is measured on it and over the tensors of a block.

Suffixes: M rows (outputs), D model width, K directions.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from diffing_core.direction_match import bounded_match_of_leading, match_of_leading
from diffing_core.lazy import torch
from diffing_core.methods.weight_diff.declaration import TENSORS, WeightDiffSettings
from diffing_core.spectra import ENERGY_SHARES, Spectrum, elementwise, of_dense
from diffing_core.tensor_names import POSITIONS, WRITERS, module_of, place_of
from diffing_core.updated_matrix import UpdatedMatrix
from diffing_core.weights import TensorDelta

EXACT_BELOW = 4  # whatever the settings: too small for Lanczos
SPECTRAL = ("spectral", "nuclear", "effective_rank", "stable_rank", "participation_ratio")


@dataclass(frozen=True, eq=False)
class Change:
    """One tensor's delta with what is computed from it once."""

    delta: TensorDelta
    base: Any
    dense: Any | None
    spectrum: Spectrum | None

    @classmethod
    def of(cls, delta: TensorDelta, settings: WeightDiffSettings, generator: Any) -> "Change":
        """Reads the base's tensor and finds the singular values, if it is a matrix."""
        if delta.factors is not None:
            return cls(delta, delta.load_base(), None, delta.factors.spectrum())
        change = delta.pair.tuned - delta.pair.base
        spectrum = None
        if change.ndim == 2:
            spectrum = of_dense(
                change,
                exact_side=settings.exact_side,
                n_leading=max(settings.leading, settings.directions),
                generator=generator,
            )
        return cls(delta, delta.pair.base, change, spectrum)

    @cached_property
    def base_frobenius(self) -> float:
        """‖W_base‖_F."""
        return _length(self.base)

    @cached_property
    def frobenius(self) -> float:
        """‖ΔW‖_F."""
        return self.spectrum.frobenius if self.spectrum is not None else _length(self.dense)

    def cosine(self) -> float | None:
        """Between base and tuned, from 1 − cos = (‖ΔW‖² − (‖W₁‖ − ‖W₀‖)²) / 2‖W₀‖‖W₁‖: exactly 1 for no change."""
        factors = self.delta.factors
        inner = factors.inner(self.base) if factors else (self.base.double() * self.dense.double()).sum().item()
        squared = self.base_frobenius**2 + 2 * inner + self.frobenius**2
        tuned_frobenius = max(squared, 0.0) ** 0.5
        if not self.base_frobenius or not tuned_frobenius:
            return None
        gap = (tuned_frobenius**2 - self.base_frobenius**2) / (tuned_frobenius + self.base_frobenius)
        return 1 - (self.frobenius**2 - gap**2) / (2 * self.base_frobenius * tuned_frobenius)

    def row_norms(self, *, own: bool = False) -> Any:
        """Length of each row's change, [M]; `own`: less the mean change of all rows."""
        if self.delta.factors:
            return self.delta.factors.row_norms(centred=own)
        return (self.dense - self.dense.mean(0) if own else self.dense).norm(dim=1)

    def gain(self, n_leading: int) -> Any:
        """(‖uᵀW_tuned‖² − ‖uᵀW_base‖²) / ‖uᵀΔW‖² of each left singular vector u of ΔW, cut to ±1; [K]."""
        left_KM = self.spectrum.left_MK[:, :n_leading].T
        factors = self.delta.factors
        change_KN = left_KM @ factors.left_MR @ factors.right_RN if factors else left_KM @ self.dense
        inner_K = ((left_KM @ self.base) * change_KN).sum(1, dtype=torch.float64)
        return (1 + 2 * inner_K / (change_KN**2).sum(1, dtype=torch.float64)).clamp(-1, 1)

    def tuned(self) -> Any:
        """W_tuned: as it was read, or the base with its factors."""
        return self.delta.pair.tuned if self.delta.pair else UpdatedMatrix(self.base, self.delta.factors)

    def writes(self) -> bool:
        """Whether it is a changed matrix that writes into the residual stream."""
        writes = self.delta.projection in WRITERS and self.delta.part in ("attn", "mlp")
        return writes and self.spectrum is not None and len(self.spectrum.sigma_K) > 0

    def has_token_rows(self) -> bool:
        """Whether its rows belong to tokens."""
        tokens = self.delta.part in ("embed", "head") and self.delta.projection not in POSITIONS
        return tokens and len(self.delta.shape) == 2


def tensor_row(change: Change, intruders: list[dict[str, Any]] | None, settings: WeightDiffSettings) -> dict[str, Any]:
    """Every measure of one tensor that was compared; `intruders` are its rows of that table."""
    delta, spectrum, base = change.delta, change.spectrum, change.base_frobenius
    row = unmatched_row(delta.name, "compared", delta.shape) | {
        "expert": delta.expert,
        "n_rows_left_out": delta.n_left_out,
        "factor_rank": delta.factors.left_MR.shape[1] if delta.factors else None,
        "base_frobenius": base,
        "frobenius": change.frobenius,
        "relative_frobenius": change.frobenius / base if base else None,
        "cosine": change.cosine(),
    }
    if spectrum is not None:
        row |= {name: getattr(spectrum, name) for name in SPECTRAL}
        row |= {name: spectrum.energy_rank(share) for name, share in ENERGY_SHARES.items()}
    if intruders is not None:
        row["intruder_score"] = max((each["novelty"] for each in intruders), default=0.0)
        row["n_intruders"] = sum(each["match"] < settings.intruder_below for each in intruders)
    if change.base.numel():
        row |= elementwise(change.base, delta.factors or change.dense)
    return row


def spectrum_rows(change: Change, n_leading: int) -> list[dict[str, Any]]:
    """The leading singular values of one tensor's change."""
    if change.spectrum is None:
        return []
    sigma_K, share_K = change.spectrum.sigma_K[:n_leading], change.spectrum.energy_shares_K[:n_leading]
    values = zip(sigma_K.tolist(), share_K.tolist(), share_K.cumsum(0).clamp(max=1).tolist(), strict=True)
    place = {"name": change.delta.name, "expert": change.delta.expert, "title": change.delta.title}
    return [
        place | {"direction": number, "sigma": sigma, "energy_share": share, "energy_up_to": total}
        for number, (sigma, share, total) in enumerate(values, 1)
    ]


def intruder_rows(change: Change, settings: WeightDiffSettings) -> list[dict[str, Any]] | None:
    """The leading directions of W_tuned and their best match in W_base, or a bound of it; None where neither is computed."""
    shape = change.delta.shape
    if change.spectrum is None or not min(shape):
        return None
    is_bound = min(shape) > max(settings.intruder_side, EXACT_BELOW)
    is_expert = "experts" in change.delta.name.split(".")
    if (is_bound and settings.intruder_steps == 0) or (is_expert and not settings.expert_intruders):
        return None
    if not change.frobenius:
        return []
    if is_bound:
        given = (settings.intruders, settings.intruder_steps, settings.seed)
        sigma_K, match_K = bounded_match_of_leading(change.base, change.tuned(), *given)
        places = [None] * len(sigma_K)
    else:
        sigma_K, match_K, place_K = match_of_leading(change.base, change.tuned(), settings.intruders)
        places = [place or None for place in place_K.tolist()]
    named = {"name": change.delta.name, "expert": change.delta.expert, "is_bound": is_bound}
    return [
        named | {"direction": number, "sigma": sigma, "match": match, "novelty": 1 - match, "base_direction": place}
        for number, (sigma, match, place) in enumerate(zip(sigma_K.tolist(), match_K.tolist(), places, strict=True), 1)
    ]


def unmatched_row(name: str, status: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Place and shape of a tensor, all measures null."""
    layer, part, projection = place_of(name)
    empty = {column.name: None for column in TENSORS.columns}
    named = {"name": name, "status": status, "layer": layer, "part": part, "projection": projection, "module": module_of(name)}
    return empty | named | {"shape": list(shape), "n_rows_left_out": 0}


def layer_rows(tensors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sums of squares per block and part, in the order of the tensors."""
    sums: dict[tuple[int | None, str], list[float]] = {}
    for row in tensors:
        group = sums.setdefault((row["layer"], row["part"]), [0, 0.0, 0.0])
        for place, value in enumerate((1, row["base_frobenius"] ** 2, row["frobenius"] ** 2)):
            group[place] += value
    total = sum(change for _, _, change in sums.values())
    return [
        {
            "layer": layer,
            "part": part,
            "n_tensors": n_tensors,
            "base_frobenius": base**0.5,
            "frobenius": change**0.5,
            "relative_frobenius": (change / base) ** 0.5 if base else None,
            "share_of_change": change / total if total else 0.0,
        }
        for (layer, part), (n_tensors, base, change) in sums.items()
    ]


def _length(tensor: Any) -> float:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).item()
