"""Topics: a non-negative factorisation of the (position × token) matrix of raised tokens.

    X ≈ H Wᵀ      X[i, v] = max(d, 0), or 1, for the K largest d of position i; Frobenius or KL loss
    mass_t = Σ_i H[i, t] · Σ_v W[v, t]      prevalence_t = share of i whose largest H[i, t] Σ_v W[v, t] is t
    concentration_t = 1 − entropy(W[:, t] / Σ_v W[v, t]) / log(number of tokens)

    cosines[t, u] = W[:, t] · W[:, u] / (‖W[:, t]‖ ‖W[:, u]‖)

W is scaled so that each topic's weights sum to 1. The fit is seeded and reads a bounded, uniform sample
of positions.

Suffixes: N positions of a block, P positions of the sample, C room for them, K top-k, G groups of tokens, T topics.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from diffing_core.methods.diff_mining.factorisation import factorise
from diffing_core.methods.diff_mining.settings import DiffMiningSettings
from diffing_core.sampling import position_hash

NEGLIGIBLE = 1e-6


class PositionSample:
    """The `limit` positions of least hash, with their K entries: uniform, and the same in whatever order they come.

    Held in two arrays made once: small ones that outlive their block would cut the heap to pieces.
    """

    def __init__(self, limit: int, k: int, seed: int) -> None:
        self._limit = limit
        self._seed = seed
        self._n_held = 0
        self._bound = np.uint64(2**64 - 1)
        self._key_C = np.empty(2 * limit, np.uint64)
        self._ids_CK = np.empty((2 * limit, k), np.int32)
        self._values_CK = np.empty((2 * limit, k), np.float32)

    def add(self, sequence_key_N: np.ndarray, position_N: np.ndarray, ids_NK: np.ndarray, values_NK: np.ndarray) -> None:
        """Offers N positions: token ids and their differences."""
        key_N = position_hash(sequence_key_N, position_N, self._seed)
        kept = np.flatnonzero(key_N <= self._bound)
        for rows in np.split(kept, range(self._limit, len(kept), self._limit)):
            if self._n_held + len(rows) > len(self._key_C):
                self._drop_the_rest()
            place = slice(self._n_held, self._n_held + len(rows))
            self._key_C[place], self._ids_CK[place], self._values_CK[place] = key_N[rows], ids_NK[rows], values_NK[rows]
            self._n_held += len(rows)

    def entries(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids and differences of the sample, int32 and float32 [P, K], ordered by hash."""
        least = self._least()
        return self._ids_CK[least], self._values_CK[least]

    def _least(self) -> np.ndarray:
        return np.argsort(self._key_C[: self._n_held])[: self._limit]

    def _drop_the_rest(self) -> None:
        least = self._least()
        for held in (self._key_C, self._ids_CK, self._values_CK):
            held[: len(least)] = held[least]
        self._n_held = len(least)
        self._bound = self._key_C[self._limit - 1]


@dataclass(frozen=True)
class Topics:
    """Topics by falling mass; `weight_TG` is 0 outside the matrix's tokens."""

    weight_TG: np.ndarray
    mass_T: np.ndarray
    prevalence_T: np.ndarray
    concentration_T: np.ndarray
    cosine_TT: np.ndarray
    n_positions: int
    n_tokens: int

    def __len__(self) -> int:
        return len(self.mass_T)


def find_topics(
    group_PK: np.ndarray, values_PK: np.ndarray, listable_G: np.ndarray, settings: DiffMiningSettings
) -> Topics | None:
    """Topics of a sample of positions over the listable groups; None where nothing is raised."""
    binary, merged = settings.nmf_entries == "binary", settings.merge_variants
    matrix, groups = entry_matrix(group_PK, values_PK, listable_G, merged=merged, binary=binary)
    n_topics = min(settings.topics, *matrix.shape)
    if not n_topics:
        return None
    activation_PT, weight_TC = factorise(matrix, n_topics, settings)
    return _describe(activation_PT.astype(np.float64), weight_TC.astype(np.float64), groups, len(listable_G))


def entry_matrix(
    group_PK: np.ndarray, values_PK: np.ndarray, listable_G: np.ndarray, *, merged: bool = False, binary: bool = False
) -> tuple[Any, np.ndarray]:
    """Sparse [positions, tokens] of the positive entries, float32, and the group of each column.

    Where variants were merged, they add up within a position. Positions without an entry are left out.
    """
    from scipy.sparse import csr_matrix

    raised_PK = (values_PK > 0) & listable_G[group_PK]
    group_E = group_PK[raised_PK]
    n_entries_P = raised_PK.sum(1)
    row_ends = np.append(0, n_entries_P[n_entries_P > 0].cumsum())
    groups = np.flatnonzero(np.bincount(group_E, minlength=len(listable_G)))
    column_G = np.zeros(len(listable_G), np.int32)
    column_G[groups] = np.arange(len(groups))
    shape = (len(row_ends) - 1, len(groups))
    matrix = csr_matrix((values_PK[raised_PK], column_G[group_E], row_ends), shape=shape, dtype=np.float32)
    if merged:
        matrix.sum_duplicates()
    if binary:
        matrix.data[:] = 1
    return matrix, groups


def _describe(activation_PT: np.ndarray, weight_TC: np.ndarray, groups: np.ndarray, n_groups: int) -> Topics:
    total_T = weight_TC.sum(1)
    part_PT = activation_PT * total_T
    alive = np.flatnonzero(part_PT.sum(0) > 0)
    order = alive[np.argsort(-part_PT.sum(0)[alive], kind="stable")]
    part_PT, share_TC = part_PT[:, order], weight_TC[order] / total_T[order, None]
    leader_P = part_PT.argmax(1)[part_PT.max(1, initial=0) > 0]
    weight_TG = np.zeros((len(order), n_groups))
    weight_TG[:, groups] = share_TC
    return Topics(
        weight_TG=weight_TG,
        mass_T=part_PT.sum(0),
        prevalence_T=np.bincount(leader_P, minlength=len(order)) / len(part_PT),
        concentration_T=_concentration(share_TC),
        cosine_TT=_cosines(share_TC),
        n_positions=len(part_PT),
        n_tokens=len(groups),
    )


def _concentration(share_TC: np.ndarray) -> np.ndarray:
    n_tokens = share_TC.shape[1]
    if n_tokens == 1:
        return np.ones(len(share_TC))
    entropy_T = -(share_TC * np.log(np.maximum(share_TC, np.finfo(float).tiny))).sum(1)
    return 1 - entropy_T / np.log(n_tokens)


def _cosines(share_TC: np.ndarray) -> np.ndarray:
    unit_TC = share_TC / np.linalg.norm(share_TC, axis=1, keepdims=True)
    return np.clip(unit_TC @ unit_TC.T, 0, 1)
