"""How sure one may be that a token is raised: log-odds of its counts, and a test over documents.

    log_odds = log (y⁺+α)/(n+α₀−y⁺−α) − log (y⁻+α)/(n+α₀−y⁻−α)     y± = count_top, count_bottom; n their sum over V
    z        = log_odds / √(1/(y⁺+α) + 1/(y⁻+α))                  α = prior_weight (y⁺+y⁻)/2, α₀ = Σ α
    p        = min(1, 2 c Φ̄(|Σ_s x_s| / √Σ_s x_s²))                x_s = count_top − count_bottom in document s

z takes occurrences as independent and only ranks. p takes the document as the unit: if a token is as
likely raised as lowered, the x_s may change sign document by document, and their self-normalised sum
has Gaussian tails up to c = 1/(4 Φ̄(√2)) ≈ 3.18 for any number of documents and any |x_s|.

References: Monroe, Colaresi and Quinn 2008 (log-odds); Bentkus and Dzindzalieta 2015 (c, which is sharp).
Suffixes: N tokens, K top-k, V vocabulary, G groups of tokens that count as one, S documents.
"""

import numpy as np

from diffing_core.blocks import TokenBlock
from diffing_core.stats import benjamini_hochberg

LEAST = 1e-9


class DocumentCounts:
    """Σ x_s² and the number of x_s ≠ 0 per group, in memory of the vocabulary.

    A document is open until its last position has come (documents are read in order, so few are open).
    """

    def __init__(self, group_V: np.ndarray, last_position_S: np.ndarray) -> None:
        self._group_V = group_V
        self._n_groups = int(group_V.max()) + 1
        self._last_S = last_position_S
        self._open: dict[int, np.ndarray] = {}
        self._squares_G = np.zeros(self._n_groups, np.int64)
        self._documents_G = np.zeros(self._n_groups, np.int64)

    def add(self, block: TokenBlock, counted_N: np.ndarray, top_NK: np.ndarray, bottom_NK: np.ndarray) -> None:
        """Adds the ids at both ends of N positions; those not `counted` only end their document."""
        sequences, row_N = np.unique(block.sequence_N, return_inverse=True)
        first_N1 = (row_N * self._n_groups)[counted_N, None]
        net_SG = self._tally(first_N1, top_NK[counted_N], len(sequences))
        net_SG -= self._tally(first_N1, bottom_NK[counted_N], len(sequences))
        ended = set(block.sequence_N[block.position_N == self._last_S[block.sequence_N]].tolist())
        for sequence, net_G in zip(sequences.tolist(), net_SG, strict=True):
            whole_G = self._open.pop(sequence, 0) + net_G
            if sequence in ended:
                self._close(whole_G)
            else:
                self._open[sequence] = whole_G

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Σ x_s² and documents with x_s ≠ 0, int64 [G]."""
        while self._open:
            self._close(self._open.popitem()[1])
        return self._squares_G, self._documents_G

    def _tally(self, first_N1: np.ndarray, ids_NK: np.ndarray, n_sequences: int) -> np.ndarray:
        cells = (first_N1 + self._group_V[ids_NK]).ravel()
        return np.bincount(cells, minlength=n_sequences * self._n_groups).reshape(n_sequences, -1)

    def _close(self, net_G: np.ndarray) -> None:
        self._squares_G += net_G * net_G
        self._documents_G += net_G != 0


def log_odds(top_G: np.ndarray, bottom_G: np.ndarray, prior_weight: float) -> tuple[np.ndarray, np.ndarray]:
    """Log-odds in nats and their z, float64 [G]; 0 where a group was never counted. Swapping the ends negates both."""
    prior_G = prior_weight * (top_G + bottom_G) / 2
    seen = prior_G > 0
    top, bottom = (top_G + prior_G)[seen], (bottom_G + prior_G)[seen]
    other_top = np.maximum(top_G.sum() + prior_G.sum() - top, LEAST)
    other_bottom = np.maximum(bottom_G.sum() + prior_G.sum() - bottom, LEAST)
    odds_G, z_G = np.zeros(len(top_G)), np.zeros(len(top_G))
    odds_G[seen] = np.log(top / other_top) - np.log(bottom / other_bottom)
    z_G[seen] = odds_G[seen] / np.sqrt(1 / top + 1 / bottom)
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
