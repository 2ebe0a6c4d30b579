"""The table of latents: norms, activity and Latent Scaling, and which model has what each stands for.

    Δ = ½ (1 + (‖d_tuned‖ − ‖d_base‖) / max)        tuned only from 0.9, base only up to 0.1, shared from 0.4 to 0.6

Rare latents of one model end between these bins (planted at 0.5 % of the tokens: Δ = 0.77), so the class by Latent
Scaling stands beside: one model's alone if along its decoder ν of the error < 0.2 (else the other has it too and the
sparsity hid it: complete shrinkage) and ν of the reconstruction < 0.5 (else the other has it under other latents:
decoupling). A latent whose two decoders pass this both has moved: base and tuned do different things where it is active.

Suffixes: F latents, D width.
"""

from typing import Any

import numpy as np
import pyarrow as pa

from diffing_core.latent_scaling import Ratio
from diffing_core.methods.crosscoder.model import SIDES, Crosscoder
from diffing_core.methods.crosscoder.partition import OWNERS
from diffing_core.methods.crosscoder.reading import Reading
from diffing_core.methods.crosscoder.schema import LATENTS, OTHER
from diffing_core.methods.crosscoder.settings import CrosscoderSettings

SPECIFIC = ("tuned_only", "moved")  # classes by Latent Scaling of what the base has not
NORM_CLASSES = (("base_only", 0.0, 0.1), ("shared", 0.4, 0.6), ("tuned_only", 0.9, 1.0))  # with their edges


def latent_table(layer: int, crosscoder: Crosscoder, reading: Reading, settings: CrosscoderSettings) -> pa.Table:
    """One row per latent."""
    direction_MFD = [each.double().cpu() for each in crosscoder.directions()]
    base_F, tuned_F = (each_FD.norm(dim=1).numpy() for each_FD in direction_MFD)
    largest_F = np.maximum(base_F, tuned_F)
    relative_F = (tuned_F - base_F) / np.maximum(largest_F, 1e-30)
    moved_F = (direction_MFD[1] - direction_MFD[0]).norm(dim=1).numpy()
    n_active_F = reading.n_active_F.cpu().numpy().astype(np.int64)
    columns: dict[str, Any] = {
        "layer": np.full(len(base_F), layer, np.int32),
        "latent": np.arange(len(base_F), dtype=np.int32),
        "owner": [OWNERS[owner] for owner in crosscoder.partition.owner_F],
        "norm_base": base_F,
        "norm_tuned": tuned_F,
        "norm_difference": relative_F,
        "delta_norm": (1 + relative_F) / 2,
        "relative_norm": _nullable(_divided(tuned_F, base_F + tuned_F)),
        "norm_class": [norm_class(delta) for delta in (1 + relative_F) / 2],
        "decoder_cosine": _nullable(_cosines(*direction_MFD)),
        "encoder_cosine": _nullable(_cosines(*(each_DF.detach().T.double().cpu() for each_DF in crosscoder.encoder_MDF))),
        "difference_rms": np.sqrt(reading.scaling.squares_F / max(reading.n_tokens, 1)) * moved_F,
        "max_activation": reading.maximum_F.double().cpu().numpy(),
        "n_active": n_active_F,
        "frequency": n_active_F / max(reading.n_tokens, 1),
        "density": reading.sequences_F.cpu().numpy() / max(reading.n_sequences, 1),
        "is_dead": n_active_F == 0,
        "is_rare": n_active_F < settings.least_active,
    }
    return LATENTS.table(columns | _scaling_columns(crosscoder, reading, settings))


def norm_class(delta: float) -> str:
    """The bin of Δ."""
    return next((name for name, low, high in NORM_CLASSES if low <= delta <= high), "other")


def _scaling_columns(crosscoder: Crosscoder, reading: Reading, settings: CrosscoderSettings) -> dict[str, Any]:
    scaling, directions = reading.scaling, dict(zip(SIDES, crosscoder.directions(), strict=True))
    columns: dict[str, Any] = {}
    nu: dict[tuple[str, str], np.ndarray] = {}
    for side in SIDES:
        betas = {
            "error": scaling.beta(f"error {side}", side, directions[side]),
            "reconstruction": scaling.beta(f"reconstruction {side}", side),
        }
        holds_F = scaling.n_active_F >= settings.least_active
        for beta_F in betas.values():
            holds_F &= np.abs(np.nan_to_num(beta_F)) >= settings.least_beta
        for target, beta_F in betas.items():
            other, own = ((f"{target} {each}", directions[each] if target == "error" else None) for each in (OTHER[side], side))
            ratio = scaling.ratio(other, own, side).where(holds_F)
            nu[target, side] = ratio.value_F
            columns |= _ratio_columns(f"nu_{target}_{side}", ratio)
            columns[f"beta_{target}_{side}"] = _nullable(beta_F)
    columns["scaling_class"] = _scaling_classes(nu, settings)
    columns["rank_sum"] = _rank_sums(nu["error", "tuned"], nu["reconstruction", "tuned"])
    for control in ("random", "permuted"):
        columns[f"beta_{control}"] = _nullable(scaling.beta("error tuned", control, directions["tuned"]))
    return columns


def _scaling_classes(nu: dict[tuple[str, str], np.ndarray], settings: CrosscoderSettings) -> list[str | None]:
    own = {
        side: (nu["error", side] < settings.specific_error) & (nu["reconstruction", side] < settings.specific_reconstruction)
        for side in SIDES
    }
    known_F = ~(np.isnan(nu["error", "base"]) & np.isnan(nu["error", "tuned"]))
    return [
        None if not known else "moved" if base and tuned else "base_only" if base else "tuned_only" if tuned else "shared"
        for known, base, tuned in zip(known_F, own["base"], own["tuned"], strict=True)
    ]


def _rank_sums(*nu: np.ndarray) -> list[int | None]:
    """Places in ascending order from 1, added; None where any is unknown."""
    known_F = ~np.isnan(np.stack(nu)).any(0)
    total_F = np.zeros(len(known_F), np.int64)
    for each_F in nu:
        total_F[known_F] += 1 + each_F[known_F].argsort(kind="stable").argsort(kind="stable")
    return [int(total) if known else None for total, known in zip(total_F, known_F, strict=True)]


def _ratio_columns(name: str, ratio: Ratio) -> dict[str, list[float | None]]:
    return {name: _nullable(ratio.value_F), f"{name}_low": _nullable(ratio.low_F), f"{name}_high": _nullable(ratio.high_F)}


def _cosines(base_FD: Any, tuned_FD: Any) -> np.ndarray:
    """NaN where either is zero."""
    return _divided((base_FD * tuned_FD).sum(1).numpy(), (base_FD.norm(dim=1) * tuned_FD.norm(dim=1)).numpy())


def _divided(above_F: np.ndarray, below_F: np.ndarray) -> np.ndarray:
    return np.where(below_F > 0, above_F / np.where(below_F > 0, below_F, 1.0), np.nan)


def _nullable(value_F: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in value_F]
