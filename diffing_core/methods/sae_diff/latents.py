"""What each latent does on all tokens: how often and how strongly it fires, and how much of it either model has.

    β_m = Σ f (d·h_m) / Σ f²      least squares of h_m on f d, ‖d‖ = 1; for each latent by itself (Latent Scaling)
    ratio = β_base / β_tuned      about 1: both models have the direction where the latent fires; about 0: only the tuned one

Standard errors are jackknifed over BLOCKS groups of whole sequences, since tokens of one text are no independent draws.
The ratio is null where |β_tuned| < LEAST_BETA or a latent fires on fewer than LEAST_FIRINGS tokens.

Reference: Minder, Dumas et al. 2025 (arXiv 2504.02922), section 3 and appendix on Latent Scaling.

Suffixes: N rows, D model width, F latents, B blocks of sequences.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from diffing_core.activation_pairs import PairedRows
from diffing_core.lazy import torch
from diffing_core.methods.sae_diff.dictionary import Dictionary
from diffing_core.methods.sae_diff.training import Material

BLOCKS = 20
LEAST_BETA, LEAST_FIRINGS = 0.05, 100


class Ratio(NamedTuple):
    """β_base / β_tuned of every latent with its 95 % interval."""

    value_F: np.ndarray
    low_F: np.ndarray
    high_F: np.ndarray

    @classmethod
    def jackknifed(cls, base_BF: np.ndarray, tuned_BF: np.ndarray) -> "Ratio":
        """Ratio of sums, and the normal interval of leaving one block out at a time (Efron 1982)."""
        ratio_F = _divided(base_BF.sum(0), tuned_BF.sum(0))
        without_BF = _divided(base_BF.sum(0) - base_BF, tuned_BF.sum(0) - tuned_BF)
        spread_F = np.square(without_BF - without_BF.mean(0)).sum(0)
        half_F = 1.96 * np.sqrt(spread_F * (len(base_BF) - 1) / len(base_BF))
        return cls(ratio_F, ratio_F - half_F, ratio_F + half_F)

    def where(self, known_F: np.ndarray) -> "Ratio":
        """NaN elsewhere."""
        return Ratio(*(np.where(known_F, each_F, np.nan) for each_F in self))


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
    def mean_F(self) -> np.ndarray:
        """Mean activation where it fires."""
        return _divided(self.sum_F, self.n_fires_F.astype(np.float64))

    @property
    def weight_F(self) -> np.ndarray:
        """Energy share times frequency: by it latents are ranked."""
        return self.energy_share_F * self.frequency_F

    @property
    def frequency_F(self) -> np.ndarray:
        """Share of tokens on which it fires."""
        return self.n_fires_F / max(self.n_tokens, 1)

    @property
    def energy_share_F(self) -> np.ndarray:
        """Σ f² over Σ‖x − c‖²: how much of what is rebuilt it writes; shares of overlapping latents add up to more than 1."""
        return self.energy_F / self.total_energy if self.total_energy else np.zeros_like(self.energy_F)

    @classmethod
    def of(cls, material: Material, dictionary: Dictionary) -> "Latents":
        """Reads all rows once."""
        sums = _Sums(len(dictionary.bias_F), dictionary.bias_F.device)
        for rows in material.rows.blocks():
            sums.add(material, rows, dictionary)
        square_BF, base_BF, tuned_BF = (each.cpu().numpy() for each in (sums.square_BF, sums.base_BF, sums.tuned_BF))
        n_fires_F = sums.n_fires_F.cpu().numpy()
        beta_tuned_F = _divided(tuned_BF.sum(0), square_BF.sum(0))
        known_F = (n_fires_F >= LEAST_FIRINGS) & (np.abs(beta_tuned_F) >= LEAST_BETA)
        return cls(
            n_tokens=sums.n_tokens,
            n_fires_F=n_fires_F,
            sum_F=sums.sum_F.cpu().numpy(),
            max_F=sums.max_F.cpu().numpy(),
            energy_F=square_BF.sum(0),
            total_energy=sums.energy,
            beta_base_F=_divided(base_BF.sum(0), square_BF.sum(0)),
            beta_tuned_F=beta_tuned_F,
            ratio=Ratio.jackknifed(base_BF, tuned_BF).where(known_F),
        )


class _Sums:
    """Running sums in float64, those of β by block of sequences."""

    def __init__(self, n_latents: int, device: Any) -> None:
        self.n_tokens, self.energy = 0, 0.0
        self.n_fires_F = torch.zeros(n_latents, dtype=torch.int64, device=device)
        self.sum_F = torch.zeros(n_latents, dtype=torch.float64, device=device)
        self.max_F = torch.zeros(n_latents, device=device)
        self.square_BF, self.base_BF, self.tuned_BF = (
            torch.zeros(BLOCKS, n_latents, dtype=torch.float64, device=device) for _ in range(3)
        )

    def add(self, material: Material, rows: PairedRows, dictionary: Dictionary) -> None:
        device = self.max_F.device
        rows_ND, base_ND, tuned_ND = (
            each.to(device) for each in (material.vectors(rows), rows.base_ND.float(), rows.tuned_ND.float())
        )
        block_N = torch.from_numpy(rows.sequence_N % BLOCKS).to(device, torch.int64)
        self.n_tokens += len(rows)
        self.energy += float((rows_ND - dictionary.centre_D).square().sum(dtype=torch.float64))
        for place, active_NF in dictionary.encoded(rows_ND):
            self.n_fires_F += (active_NF > 0).sum(0)
            self.sum_F += active_NF.sum(0, dtype=torch.float64)
            self.max_F = torch.maximum(self.max_F, active_NF.amax(0))
            self.square_BF.index_add_(0, block_N[place], active_NF.double().square())
            for sums_BF, side_ND in ((self.base_BF, base_ND), (self.tuned_BF, tuned_ND)):
                sums_BF.index_add_(0, block_N[place], active_NF.double() * (side_ND[place] @ dictionary.decoder_FD.T))


def _divided(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """NaN where there is nothing to divide by."""
    return np.divide(upper, lower, out=np.full_like(upper, np.nan), where=lower != 0)
