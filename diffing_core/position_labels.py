"""Positions at which differences are averaged: counted from the start of a text, or from the answer of a chat.

Position 7 of one chat has nothing to do with position 7 of another, so chats count from the first token of
the first answer; negative positions lie in the template (and perhaps the question) before it.
"""

import numpy as np

from diffing_core.blocks import TokenBlock
from diffing_core.corpus import ProbeCorpus, ProbeSequence
from diffing_core.sums import Grouping
from diffing_core.tables import Column

NO_ANSWER = 2**31
COUNTED_FROM = Column(
    "counted_from", "string", "Whence the position counts: start (of a text), answer (of a chat), or all (every token).",
    role="key",
)  # fmt: skip
POSITION = Column(
    "position", "int32", "Position from there, from 0, negative before an answer; null is every token.", role="key",
    nullable=True,
)  # fmt: skip


class PositionLabels:
    """Numbers the labels (counted_from, position): 0 is every token, ("all", None)."""

    def __init__(self, corpus: ProbeCorpus, positions: int, before_answer: int) -> None:
        is_chat_S = np.asarray([sequence.is_chat for sequence in corpus.sequences])
        starts = [] if is_chat_S.all() else [("start", position) for position in range(positions)]
        answers = [("answer", position) for position in range(-before_answer, positions)] if is_chat_S.any() else []
        self.labels: list[tuple[str, int | None]] = [("all", None), *starts, *answers]
        self._end = positions
        self._origin_S = np.asarray([origin(sequence) for sequence in corpus.sequences])
        self._lowest_S = np.where(is_chat_S, -before_answer, 0)
        self._number_of_origin_S = np.where(is_chat_S, 1 + len(starts) + before_answer, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def numbers(self, block: TokenBlock) -> np.ndarray:
        """The label number of each of N tokens; 0 where a token has no label but `all`."""
        position_N = block.position_N - self._origin_S[block.sequence_N]
        labelled_N = (position_N >= self._lowest_S[block.sequence_N]) & (position_N < self._end)
        return np.where(labelled_N, self._number_of_origin_S[block.sequence_N] + position_N, 0)

    def grouping(self, block: TokenBlock) -> Grouping:
        """The labelled tokens of a block, by label number."""
        number_N = self.numbers(block)
        rows = np.flatnonzero(number_N)
        return Grouping(number_N[rows], rows)


def origin(sequence: ProbeSequence) -> int:
    """Where position 0 lies: at the start of a text, at the first token of the answer in a chat.

    A chat that is cut before its answer has none: its opening must not be averaged with answers.
    """
    if not sequence.is_chat:
        return 0
    return NO_ANSWER if sequence.answer_start is None else sequence.answer_start
