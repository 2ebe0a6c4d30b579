"""How well an autoencoder rebuilds rows that it was not trained on.

    FVU = Σ‖x − x̂‖² / Σ‖x − mean‖²        L0: latents that fire per token        dead: never fires on them

Suffixes: N rows, D model width, F latents.
"""

from dataclasses import dataclass
from typing import Any

from diffing_core.lazy import torch
from diffing_core.methods.sae_diff.dictionary import Dictionary
from diffing_core.methods.sae_diff.training import Material
from diffing_core.sums import Moments


@dataclass(frozen=True)
class Fit:
    """Figures on the held-out rows; null where there are none, and FVU where they are all equal."""

    n_held_out: int
    fvu: float | None
    l0: float | None
    dead_share: float | None

    @classmethod
    def of(cls, material: Material, dictionary: Dictionary) -> "Fit":
        """Reads all held-out rows once."""
        moments, squared_error, n_active = Moments(material.rows.d_model), 0.0, 0
        fired_F: Any = torch.zeros(len(dictionary.bias_F), dtype=torch.bool, device=dictionary.bias_F.device)
        for rows in material.part("held_out").blocks():
            rows_ND = material.vectors(rows)
            moments.add(rows_ND.numpy())
            rows_ND = rows_ND.to(fired_F.device)
            for place, active_NF in dictionary.encoded(rows_ND):
                squared_error += float((rows_ND[place] - dictionary.decode(active_NF)).square().sum(dtype=torch.float64))
                n_active += int((active_NF > 0).sum())
                fired_F |= (active_NF > 0).any(0)
        if not moments.count:
            return cls(0, None, None, None)
        total = float(moments.variance_D().sum()) * moments.count
        fvu = squared_error / total if total else None
        return cls(moments.count, fvu, n_active / moments.count, 1 - float(fired_F.float().mean()))
