"""What is summed over positions for every vocabulary entry, and what is known of each token in the end.

Suffixes: R positions read, V vocabulary, K top-k, G groups of entries that are listed as one.
"""

from typing import Any

import numpy as np

from diffing_core.lazy import torch
from diffing_core.methods.diff_mining.evidence import DocumentSums, log_odds, q_values, sign_flip_p_values
from diffing_core.methods.diff_mining.settings import DiffMiningSettings
from diffing_core.methods.diff_mining.source import Reading
from diffing_core.sums import float64_device

OF_ROWS = ("difference", "base", "tuned", "positive")
Statistics = dict[str, np.ndarray]  # a column of the vocabulary table [G] by its name


class TokenSums:
    """Sums over all positions, per vocabulary entry [V]; those of whole rows stay where the models are."""

    def __init__(self, vocab_size: int, device: Any) -> None:
        self._rows_SV = torch.zeros(len(OF_ROWS), vocab_size, dtype=torch.float64, device=float64_device(device))
        self.top_V, self.bottom_V = np.zeros((2, vocab_size), np.int64)
        self.n_positions = 0

    def of_rows(self) -> dict[str, np.ndarray]:
        """Sums of OF_ROWS, by name."""
        return dict(zip(OF_ROWS, self._rows_SV.cpu().numpy(), strict=True))

    def add(self, reading: Reading) -> None:
        """Adds the rows of R positions."""
        positive_RV = torch.gt(reading.difference_RV, 0, out=torch.empty_like(reading.difference_RV))
        sums = reading.difference_RV.sum(0), reading.base_probability_V, reading.tuned_probability_V, positive_RV.sum(0)
        for sum_V, added_V in zip(self._rows_SV, sums, strict=True):
            sum_V += added_V.to(sum_V.device)
        self.n_positions += len(reading.sequence_R)

    def count(self, top_RK: np.ndarray, bottom_RK: np.ndarray) -> None:
        """Counts the ids at both ends of R positions."""
        self.top_V += np.bincount(top_RK.ravel(), minlength=len(self.top_V))
        self.bottom_V += np.bincount(bottom_RK.ravel(), minlength=len(self.bottom_V))


def statistics(sums: TokenSums, documents: DocumentSums, n_documents: int, settings: DiffMiningSettings) -> Statistics:
    """Of each group: counts and probabilities add up over its members, differences are averaged.

    Tested are groups that at least one model uses, in enough documents: a choice that is blind to signs.
    """
    groups, n_positions, of_rows = documents.groups, max(1, sums.n_positions), sums.of_rows()
    raised_G, lowered_G = documents.raised_G, documents.lowered_G
    top_G, bottom_G = groups.counts(sums.top_V), groups.counts(sums.bottom_V)
    base_G, tuned_G = (groups.sums(of_rows[side]) / n_positions for side in ("base", "tuned"))
    tested_G = used(base_G, tuned_G, settings) & (raised_G + lowered_G >= settings.min_documents)
    p_G = np.where(tested_G, sign_flip_p_values(top_G - bottom_G, documents.squares_G), np.nan)
    odds_G, z_G = log_odds(raised_G, lowered_G, n_documents, settings.prior_weight)
    return {
        "token_id": groups.foremost(sums.top_V + sums.bottom_V),
        "mean_difference": groups.means(of_rows["difference"]) / n_positions,
        "count_top": top_G,
        "count_bottom": bottom_G,
        "fraction_positive": groups.means(of_rows["positive"]) / n_positions,
        "documents_raised": raised_G,
        "documents_lowered": lowered_G,
        "log_odds": odds_G,
        "log_odds_z": z_G,
        "p_value": p_G,
        "q_value": q_values(p_G, tested_G),
        "mean_base_probability": base_G,
        "mean_tuned_probability": tuned_G,
    }


def used(base_G: np.ndarray, tuned_G: np.ndarray, settings: DiffMiningSettings) -> np.ndarray:
    """Groups to which at least one model gives probability; d of the others is noise of untrained weights."""
    return np.maximum(base_G, tuned_G) >= settings.min_probability
