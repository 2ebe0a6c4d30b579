"""What each latent does on all tokens: how often and how strongly it fires, and how much of it either model has.

    β_m = Σ f (d·h_m) / Σ f²      least squares of h_m on f d, ‖d‖ = 1; for each latent by itself (Latent Scaling)
    ratio = β_base / β_tuned      about 1: both models have the direction where the latent fires; about 0: only the tuned one

The ratio is null where |β_tuned| < LEAST_BETA or a latent fires on fewer than LEAST_FIRINGS tokens.

Reference: Minder, Dumas et al. 2025 (arXiv 2504.02922), section 3 and appendix on Latent Scaling.

Suffixes: N rows, D model width, F latents.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from diffing_core.activation_pairs import PairedRows
from diffing_core.document_blocks import by_block
from diffing_core.latent_scaling import LatentScaling, Ratio
from diffing_core.lazy import torch
from diffing_core.methods.sae_diff.dictionary import Dictionary
from diffing_core.methods.sae_diff.training import Material
from diffing_core.sparse_code import SparseCode

SIDES = ("base", "tuned")
LEAST_BETA, LEAST_FIRINGS = 0.05, 100


@dataclass(frozen=True)
class Latents:
    """Columns of the latents' table, a value per latent; NaN where there is none."""

    n_tokens: int
    n_fires_F: np.ndarray
    sum_F: np.ndarray
    max_F: np.ndarray
    energy_F: np.ndarray
    total_energy: float
    beta_base_F: np.ndarray
    beta_tuned_F: np.ndarray
    ratio: Ratio

    @property
    def frequency_F(self) -> np.ndarray:
        """Share of tokens on which it fires."""
        return self.n_fires_F / max(self.n_tokens, 1)

    @property
    def mean_F(self) -> np.ndarray:
        """Mean activation where it fires."""
        return np.divide(self.sum_F, self.n_fires_F, out=np.full_like(self.sum_F, np.nan), where=self.n_fires_F > 0)

    @property
    def energy_share_F(self) -> np.ndarray:
        """Σ f² over Σ‖x − c‖²: how much of what is rebuilt it writes; shares of overlapping latents add up to more than 1."""
        return self.energy_F / self.total_energy if self.total_energy else np.zeros_like(self.energy_F)

    @classmethod
    def of(cls, material: Material, dictionary: Dictionary) -> "Latents":
        """Reads all rows once."""
        sums = _Sums(dictionary)
        for block, rows in by_block(material.rows.watched(f"sae_diff, {material.name}: reading")):
            sums.add(material.vectors(rows), rows, block)
        scaling = sums.scaling
        n_fires_F, beta_tuned_F = scaling.n_active_F, scaling.beta("tuned", "decoder")
        known_F = (n_fires_F >= LEAST_FIRINGS) & (np.abs(beta_tuned_F) >= LEAST_BETA)
        return cls(
            n_tokens=sums.n_tokens,
            n_fires_F=n_fires_F,
            sum_F=sums.sum_F.cpu().numpy(),
            max_F=sums.max_F.cpu().numpy(),
            energy_F=sums.square_F.cpu().numpy(),
            total_energy=sums.energy,
            beta_base_F=scaling.beta("base", "decoder"),
            beta_tuned_F=beta_tuned_F,
            ratio=scaling.ratio(("base", None), ("tuned", None), "decoder").where(known_F),
        )


class _Sums:
    """Running sums in float64."""

    def __init__(self, dictionary: Dictionary) -> None:
        self._dictionary = dictionary
        self.scaling = LatentScaling({"decoder": dictionary.decoder_FD}, SIDES)
        self.n_tokens, self.energy = 0, 0.0
        self.max_F = torch.zeros_like(dictionary.bias_F)
        self.sum_F, self.square_F = (torch.zeros_like(dictionary.bias_F, dtype=torch.float64) for _ in range(2))

    def add(self, rows_ND: Any, rows: PairedRows, block: int) -> None:
        device = self.max_F.device
        rows_ND = rows_ND.to(device)
        sides = {side: getattr(rows, f"{side}_ND").to(device, torch.float32) for side in SIDES}
        self.n_tokens += len(rows)
        self.energy += float((rows_ND - self._dictionary.centre_D).square().sum(dtype=torch.float64))
        for place, active_NF in self._dictionary.encoded(rows_ND):
            code = SparseCode.of(active_NF)
            self.sum_F += code.sums(code.value_A)
            self.square_F += code.sums(code.value_A.double().square())
            self.max_F = torch.maximum(self.max_F, code.maxima())
            self.scaling.add(code, {side: side_ND[place] for side, side_ND in sides.items()}, block)
