"""At which positions shortlisted tokens are raised and lowered, and which of them together.

What occurs together is read off a sample of whole sequences, chosen by a hash before the pass begins, of
which the ids at both ends of every position are kept. A token's sign at a position is the end at which it is.

Suffixes: R positions read, P positions of the sample, K top-k, S sequences, L shortlisted groups, V vocabulary.
"""


import numpy as np
import pyarrow as pa

from diffing_core.corpus import ProbeCorpus
from diffing_core.methods.diff_mining.listing import Listing
from diffing_core.methods.diff_mining.positions import PositionCounts
from diffing_core.methods.diff_mining.schema import COOCCURRENCE, POSITIONS
from diffing_core.methods.diff_mining.settings import DiffMiningSettings
from diffing_core.sampling import position_hash


class Cooccurrence:
    """The ids at both ends of the positions of some whole sequences."""

    def __init__(self, corpus: ProbeCorpus, k: int, settings: DiffMiningSettings) -> None:
        length_S = np.asarray([len(sequence) for sequence in corpus.sequences])
        order = np.argsort(position_hash(corpus.key_S, np.zeros_like(length_S), settings.seed))
        n_chosen = max(1, np.searchsorted(length_S[order].cumsum(), settings.cooccurrence_positions, side="right"))
        self._chosen_S = np.zeros(len(length_S), bool)
        self._chosen_S[order[:n_chosen]] = True
        n_places = length_S[order[:n_chosen]].sum()
        self._sequence_P, self._differs_P = np.empty(n_places, np.int64), np.empty(n_places, bool)
        self._top_PK, self._bottom_PK = (np.empty((n_places, k), np.int32) for _ in range(2))
        self._n_held = 0

    def add(self, sequence_R: np.ndarray, differs_R: np.ndarray, top_RK: np.ndarray, bottom_RK: np.ndarray) -> None:
        """Keeps the positions of chosen sequences."""
        kept = np.flatnonzero(self._chosen_S[sequence_R])
        place = slice(self._n_held, self._n_held + len(kept))
        self._sequence_P[place], self._differs_P[place] = sequence_R[kept], differs_R[kept]
        self._top_PK[place], self._bottom_PK[place] = top_RK[kept], bottom_RK[kept]
        self._n_held += len(kept)

    def table(self, listing: Listing, shortlist: np.ndarray) -> pa.Table:
        """Every pair of the shortlist that meets, and each token with itself."""
        if not self._n_held or not len(shortlist):
            return COOCCURRENCE.empty()
        order = np.argsort(self._sequence_P[: self._n_held], kind="stable")
        sequences, sequence_P = np.unique(self._sequence_P[order], return_inverse=True)
        ends_PL = [
            _present(ids_PK[order], listing.clean_up.groups.of_V, shortlist) & self._differs_P[order, None]
            for ids_PK in (self._top_PK, self._bottom_PK)
        ]
        ends_SL = [_any_of(sequence_P, present_PL) for present_PL in ends_PL]
        counts = _meetings("sequences", *ends_SL) | _meetings("positions", *ends_PL)
        first, second = np.nonzero(np.triu(counts["sequences"]))
        ids, texts = listing.of_G["token_id"][shortlist], np.asarray(listing.texts(shortlist), object)
        return COOCCURRENCE.table(
            {name: count_LL[first, second] for name, count_LL in counts.items()}
            | {
                "token_id": ids[first],
                "token": texts[first],
                "other_id": ids[second],
                "other": texts[second],
                "n_sequences": np.full(len(first), len(sequences)),
                "n_positions": np.full(len(first), len(sequence_P)),
            }
        )


def position_table(counts: PositionCounts, listing: Listing, shortlist: np.ndarray) -> pa.Table:
    """Counts of every shortlisted token at every label that was met."""
    met = np.flatnonzero(counts.positions_L)
    member_LV = [np.flatnonzero(listing.clean_up.groups.of_V == group) for group in shortlist]
    if not len(met) or not member_LV:
        return POSITIONS.empty()
    of_label = np.tile(met, len(shortlist))
    return POSITIONS.table(
        {
            "token_id": np.repeat(listing.of_G["token_id"][shortlist], len(met)),
            "token": np.repeat(np.asarray(listing.texts(shortlist), object), len(met)),
            "position": counts.labels_L[of_label],
            "n_positions": counts.positions_L[of_label],
            "count_top": np.concatenate([counts.top_VL[members].sum(0)[met] for members in member_LV]),
            "count_bottom": np.concatenate([counts.bottom_VL[members].sum(0)[met] for members in member_LV]),
        }
    )


def _present(ids_PK: np.ndarray, group_V: np.ndarray, shortlist: np.ndarray) -> np.ndarray:
    """Which shortlisted groups are among the ids of each position, bool [P, L]."""
    place_G = np.full(group_V.max() + 1, len(shortlist))
    place_G[shortlist] = np.arange(len(shortlist))
    present_PL = np.zeros((len(ids_PK), len(shortlist) + 1), bool)  # one column for all that is not shortlisted
    np.put_along_axis(present_PL, place_G[group_V[ids_PK]], True, axis=1)
    return present_PL[:, :-1]


def _any_of(sequence_P: np.ndarray, present_PL: np.ndarray) -> np.ndarray:
    """Presence anywhere in each sequence, bool [S, L]; positions come sorted by sequence."""
    return np.logical_or.reduceat(present_PL, np.flatnonzero(np.diff(sequence_P, prepend=-1)))


def _meetings(name: str, top_PL: np.ndarray, bottom_PL: np.ndarray) -> dict[str, np.ndarray]:
    """Rows that have both of two tokens, [L, L]: at whichever ends, and both at one end."""
    either_LL, top_LL, bottom_LL, both_LL = (
        _together(each) for each in (top_PL | bottom_PL, top_PL, bottom_PL, top_PL & bottom_PL)
    )
    return {name: either_LL, f"{name}_same_sign": top_LL + bottom_LL - both_LL}


def _together(present_PL: np.ndarray) -> np.ndarray:
    """Rows that have both of two columns, int64 [L, L]; float32 counts exactly up to 2²⁴ rows, and fast."""
    weight_PL = present_PL.astype(np.float32)
    return (weight_PL.T @ weight_PL).astype(np.int64)
