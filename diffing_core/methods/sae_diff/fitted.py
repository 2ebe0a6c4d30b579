"""One autoencoder of a result with everything that the tables say of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from diffing_core.methods.sae_diff.declaration import SaeDiffSettings
from diffing_core.methods.sae_diff.dictionary import Dictionary, Scaling
from diffing_core.methods.sae_diff.fit import Fit
from diffing_core.methods.sae_diff.latents import Latents
from diffing_core.methods.sae_diff.plan import Plan
from diffing_core.methods.sae_diff.training import Material, trained
from diffing_core.sums import Moments

ROUNDING = 1e-10  # variance below this share of the mean square is what subtraction leaves of equal rows


@dataclass(frozen=True)
class Fitted:
    """A trained autoencoder and what was measured of it."""

    material: Material
    dictionary: Dictionary
    plan: Plan
    log: list[dict[str, Any]]
    fit: Fit
    latents: Latents

    @classmethod
    def of(
        cls, material: Material, moments: Mapping[str, Moments], settings: SaeDiffSettings, folder: Path, device: Any
    ) -> "Fitted | None":
        """Trains and measures; None where all rows are equal, as all differences of identical models are."""
        own = moments[material.column]
        scaling = Scaling.of(own)
        if scaling.variance <= ROUNDING * float(own.mean_D @ own.mean_D):
            return None
        plan = Plan.of(settings, material.rows.d_model, own.count)
        made = trained(material, plan, scaling, folder, device)
        dictionary = made.dictionary.to(device)
        return cls(material, dictionary, plan, made.log, Fit.of(material, dictionary), Latents.of(material, dictionary))

    @cached_property
    def order_F(self) -> np.ndarray:
        """Latents by weight, the largest first; those that never fire are left out."""
        weight_F = self.latents.weight_F
        order_F = np.argsort(-weight_F, kind="stable")
        return order_F[weight_F[order_F] > 0]

    def leading(self, most: int) -> np.ndarray:
        """The numbers of the first latents by weight."""
        return self.order_F[:most]

    def directions(self, latent_X: np.ndarray) -> np.ndarray:
        """Unit decoder directions, float32 [X, D]."""
        return self.dictionary.decoder_FD[latent_X.copy()].cpu().numpy()

    def keys(self, latent_X: np.ndarray) -> dict[str, list[Any]]:
        """Values of the key columns of X latents."""
        n = len(latent_X)
        return {"layer": [self.material.layer] * n, "trained_on": [self.material.column] * n, "latent": latent_X.tolist()}


def fit_row(material: Material, moments: Mapping[str, Moments], fitted: Fitted | None) -> dict[str, Any]:
    """The row of one autoencoder in the table of fits, also where nothing was trained."""
    own, difference = moments[material.column], moments["difference"]
    row: dict[str, Any] = {
        "layer": material.layer,
        "trained_on": material.column,
        "n_fit_tokens": own.count,
        "n_held_out_tokens": 0,
        "difference_energy": float(difference.variance_D().sum() + difference.mean_D @ difference.mean_D),
        "variance": float(own.variance_D().sum()),
        **dict.fromkeys(("n_latents", "k", "steps", "n_trained_tokens"), 0),
        **dict.fromkeys(("fvu", "l0", "dead_share", "threshold")),
    }
    if fitted is None:
        return row
    plan, fit = fitted.plan, fitted.fit
    return row | {
        "n_held_out_tokens": fit.n_held_out,
        "n_latents": plan.n_latents,
        "k": plan.k,
        "steps": plan.steps,
        "n_trained_tokens": plan.steps * plan.batch_rows,
        "fvu": fit.fvu,
        "l0": fit.l0,
        "dead_share": fit.dead_share,
        "threshold": fitted.dictionary.threshold,
    }
