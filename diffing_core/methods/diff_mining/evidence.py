"""How sure one may be that a token is raised: documents are counted, since positions of one depend on each other.

    x_s      = count_top − count_bottom of the token in document s
    log_odds = log (r+α)/(n−r−α) − log (l+α)/(n−l−α)     r, l documents with x_s > 0, x_s < 0; w prior_weight;
                                                         α = w (r+l)/2 prior documents; n = (1+w) S in all
    z        = log_odds / √(1/(r+α) + 1/(l+α))
    p        = min(1, 2 c Φ̄(|Σ_s x_s| / √Σ_s x_s²))      two-sided

The prior is the token's own frequency at both ends, so it shrinks the odds towards "as often raised as
lowered". If that were so, the x_s might change sign document by document; their self-normalised sum then has
Gaussian tails up to c = 1/(4 Φ̄(√2)) ≈ 3.18 for any number of documents and any |x_s|.

References: Monroe, Colaresi and Quinn 2008 (log-odds); Bentkus and Dzindzalieta 2015 (c, which is sharp).
Suffixes: R rows, K top-k, V vocabulary, G groups of entries that are listed as one, S documents.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np

from diffing_core.methods.diff_mining.cleanup import Groups
from diffing_core.stats import benjamini_hochberg


@dataclass
class DocumentSums:
    """Sums over documents for each group, int64 [G]: x_s², x_s > 0, x_s < 0."""

    groups: Groups
    squares_G: np.ndarray
    raised_G: np.ndarray
    lowered_G: np.ndarray

    @classmethod
    def zeros(cls, groups: Groups) -> "DocumentSums":
        """No document yet."""
        return cls(groups, *(np.zeros(len(groups), np.int64) for _ in range(3)))

    def add(self, net_V: np.ndarray) -> None:
        """Adds one document, by its x_s of every vocabulary entry."""
        net_G = self.groups.counts(net_V)
        self.squares_G += net_G * net_G
        self.raised_G += net_G > 0
        self.lowered_G += net_G < 0


class DocumentCounts:
    """Sums over documents for several groupings; only documents that are being read are held."""

    def __init__(self, vocab_size: int, *groupings: Groups) -> None:
        self._vocab_size = vocab_size
        self._open: dict[int, np.ndarray] = {}
        self.sums = tuple(DocumentSums.zeros(groups) for groups in groupings)
        self.n_documents = 0

    def add(
        self, sequence_R: np.ndarray, differs_R: np.ndarray, top_RK: np.ndarray, bottom_RK: np.ndarray, ended: Collection[int]
    ) -> None:
        """Adds R positions, and takes in the documents that `ended`; at positions that do not differ, nothing is largest."""
        for sequence in np.unique(sequence_R).tolist():
            rows_R = differs_R & (sequence_R == sequence)
            net_V = self._tally(top_RK[rows_R]) - self._tally(bottom_RK[rows_R])
            self._open[sequence] = self._open.get(sequence, 0) + net_V
            if sequence in ended:
                self.close([sequence])

    def close(self, sequences: Iterable[int]) -> None:
        """Takes in the documents that have come to their end, if they had a counted position."""
        for sequence in sequences:
            if sequence in self._open:
                net_V = self._open.pop(sequence)
                self.n_documents += 1
                for sums in self.sums:
                    sums.add(net_V)

    def _tally(self, ids_RK: np.ndarray) -> np.ndarray:
        return np.bincount(ids_RK.ravel(), minlength=self._vocab_size)


def log_odds(
    raised_G: np.ndarray, lowered_G: np.ndarray, n_documents: int, prior_weight: float
) -> tuple[np.ndarray, np.ndarray]:
    """Log-odds in nats and their z, float64 [G]; 0 where no document counts. Swapping the ends negates both."""
    prior_G = prior_weight * (raised_G + lowered_G) / 2
    seen = prior_G > 0
    raised, lowered = (raised_G + prior_G)[seen], (lowered_G + prior_G)[seen]
    whole = (1 + prior_weight) * n_documents
    odds_G, z_G = np.zeros(len(raised_G)), np.zeros(len(raised_G))
    odds_G[seen] = np.log(raised / (whole - raised)) - np.log(lowered / (whole - lowered))
    z_G[seen] = odds_G[seen] / np.sqrt(1 / raised + 1 / lowered)
    return odds_G, z_G


def sign_flip_p_values(net_G: np.ndarray, squares_G: np.ndarray) -> np.ndarray:
    """Two-sided p-values of Σ x_s given Σ x_s², [G]; valid for any number of documents."""
    from scipy.stats import norm

    z_G = np.abs(net_G) / np.sqrt(np.maximum(squares_G, 1))
    return np.minimum(1.0, norm.sf(z_G) / (2 * norm.sf(np.sqrt(2))))


def q_values(p_G: np.ndarray, tested_G: np.ndarray) -> np.ndarray:
    """Benjamini–Hochberg among the tested groups, NaN for the rest, [G]."""
    q_G = np.full(len(p_G), np.nan)
    q_G[tested_G] = benjamini_hochberg(p_G[tested_G].tolist())
    return q_G
