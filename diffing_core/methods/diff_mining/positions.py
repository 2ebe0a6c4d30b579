"""Positions as labels: counted from the start of a text, and in a chat from the first token of the answer.

Suffixes: S sequences of the corpus, N tokens of a block, R rows, K top-k, L labels, V vocabulary.
"""

import numpy as np

from diffing_core.blocks import TokenBlock
from diffing_core.corpus import ProbeCorpus
from diffing_core.methods.diff_mining.settings import DiffMiningSettings
from diffing_core.position_labels import origin


class AnswerWindow:
    """The label of every position, which positions are counted, and where a sequence ends."""

    def __init__(self, corpus: ProbeCorpus, settings: DiffMiningSettings) -> None:
        self._origin_S = np.asarray([origin(sequence) for sequence in corpus.sequences])
        self._is_chat_S = np.asarray([sequence.is_chat for sequence in corpus.sequences])
        self._last_S = np.asarray([len(sequence) - 1 for sequence in corpus.sequences])
        self._seen_from_S = corpus.first_seen_S
        self._first, self._end = -settings.before_answer, settings.answer_positions

    def labels(self, sequence_N: np.ndarray, position_N: np.ndarray) -> np.ndarray:
        """Position less that of the answer's first token; far below 0 in a chat without an answer, [N]."""
        return position_N - self._origin_S[sequence_N]

    def counted(self, block: TokenBlock) -> np.ndarray:
        """All positions of texts; of chats all, or those of the answer that the settings name, bool [N]."""
        if self._end is None:
            return np.ones(len(block), bool)
        label_N = self.labels(block.sequence_N, block.position_N)
        return ~self._is_chat_S[block.sequence_N] | ((label_N >= self._first) & (label_N < self._end))

    @property
    def n_counted(self) -> int:
        """Positions of the whole corpus that are counted."""
        end_S = self._last_S + 1
        if self._end is None:
            return int((end_S - self._seen_from_S).clip(0).sum())
        first_S = np.where(self._is_chat_S, np.maximum(self._seen_from_S, self._origin_S + self._first), self._seen_from_S)
        end_S = np.where(self._is_chat_S, np.minimum(end_S, self._origin_S + self._end), end_S)
        return int((end_S - first_S).clip(0).sum())

    def ended(self, block: TokenBlock) -> list[int]:
        """Sequences whose last position lies in the block."""
        return block.sequence_N[block.position_N == self._last_S[block.sequence_N]].tolist()


class PositionCounts:
    """How often each entry is among the K largest and smallest at the first labels; [V, L] twice, exact."""

    def __init__(self, vocab_size: int, settings: DiffMiningSettings) -> None:
        self.labels_L = np.arange(-settings.before_answer, settings.density_positions)
        self.positions_L = np.zeros(len(self.labels_L), np.int64)
        self.top_VL, self.bottom_VL = (np.zeros((vocab_size, len(self.labels_L)), np.int32) for _ in range(2))

    def add(self, label_R: np.ndarray, differs_R: np.ndarray, top_RK: np.ndarray, bottom_RK: np.ndarray) -> None:
        """Adds R positions; at those that do not differ, nothing is largest."""
        place_R = label_R - self.labels_L[0]
        inside_R = (place_R >= 0) & (place_R < len(self.labels_L))
        self.positions_L += np.bincount(place_R[inside_R], minlength=len(self.labels_L))
        inside_R &= differs_R
        for counts_VL, ids_RK in ((self.top_VL, top_RK), (self.bottom_VL, bottom_RK)):
            np.add.at(counts_VL.reshape(-1), (ids_RK[inside_R] * counts_VL.shape[1] + place_R[inside_R, None]).ravel(), 1)
