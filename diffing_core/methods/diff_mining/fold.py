"""The fold of `diff_mining`: one reading of each block, shared by all that is counted.

Blocks may be of one position only. What is found in them is counted when there is enough of it, since to count is to go
through arrays as long as the vocabulary.

Suffixes: R positions read, V vocabulary, K top-k.
"""

import numpy as np

from diffing_core.blocks import StreamContext, TokenBlock
from diffing_core.methods.base import Tables
from diffing_core.methods.diff_mining.cleanup import CleanUp, Groups
from diffing_core.methods.diff_mining.cooccurrence import Cooccurrence, position_table
from diffing_core.methods.diff_mining.counts import TokenSums, statistics
from diffing_core.methods.diff_mining.evidence import DocumentCounts
from diffing_core.methods.diff_mining.extremes import largest
from diffing_core.methods.diff_mining.listing import Listing
from diffing_core.methods.diff_mining.positions import AnswerWindow, PositionCounts
from diffing_core.methods.diff_mining.schema import COOCCURRENCE, ORDERINGS, POSITIONS, TOPICS, VOCABULARY, WINDOWS
from diffing_core.methods.diff_mining.settings import DiffMiningSettings
from diffing_core.methods.diff_mining.source import Reading, Source
from diffing_core.methods.diff_mining.topics import PositionSample, find_topics
from diffing_core.methods.diff_mining.windows import LikelihoodWindows

POSITIONS_TOGETHER = 512


class DiffMiningFold:
    """Sums over positions and documents, [V]; counts by position, [V, L]; two bounded samples of 2 K ids a position."""

    def __init__(self, context: StreamContext, settings: DiffMiningSettings) -> None:
        self._context = context
        self._settings = settings
        self._k = min(settings.top_k, context.vocab_size // 2)
        self._positions = AnswerWindow(context.corpus, settings)
        self._source = Source(context, settings, self._positions.n_counted)
        self.layers = self._source.layers
        self._clean_up = CleanUp.of(context, settings)
        self._sums = TokenSums(context.vocab_size, context.base.device)
        groupings = [Groups.singly(context.vocab_size), *([self._clean_up.groups] if settings.merge_variants else [])]
        self._documents = DocumentCounts(context.vocab_size, *groupings)
        self._waiting: list[tuple[np.ndarray, ...]] = []
        self._ended: set[int] = set()
        self._sample = PositionSample(settings.nmf_positions, self._k, settings.seed)
        self._by_position = PositionCounts(context.vocab_size, settings)
        self._cooccurrence = Cooccurrence(context.corpus, self._k, settings)
        self._windows = LikelihoodWindows(context, settings)

    def update(self, block: TokenBlock) -> None:
        """Adds N positions, those of them that are counted."""
        ended = self._positions.ended(block)
        reading = self._source.read(block, self._positions.counted(block))
        if reading is not None:
            self._read(reading)
        self._ended.update(ended)
        if sum(len(sequence_R) for sequence_R, *_ in self._waiting) >= POSITIONS_TOGETHER:
            self._count_waiting()
        if self._settings.windows:
            self._windows.add(block, ended)

    def finish(self) -> Tables:
        """The six tables."""
        self._count_waiting()
        of_V, of_G = (
            statistics(self._sums, self._documents.sums[which], self._documents.n_documents, self._settings)
            for which in (0, -1)
        )
        listing = Listing(self._context, self._settings, self._clean_up, of_V, of_G, self._sums.n_positions)
        ids_PK, value_PK = self._sample.entries()
        topics = find_topics(self._clean_up.groups.of_V[ids_PK], value_PK, listing.listable_G, self._settings)
        orderings = listing.orderings(topics)
        shortlist = orderings[0].groups[: self._settings.shortlist]
        return {
            ORDERINGS.name: listing.ordering_table(orderings),
            VOCABULARY.name: listing.vocabulary_table(orderings),
            TOPICS.name: listing.topic_table(topics),
            POSITIONS.name: position_table(self._by_position, listing, shortlist),
            COOCCURRENCE.name: self._cooccurrence.table(listing, shortlist),
            WINDOWS.name: self._windows.table(),
        }

    def _read(self, reading: Reading) -> None:
        """Sums the rows of R positions, and finds both ends of each.

        A position at which nothing differs has no largest difference; it counts as a position and adds
        to no count, so that identical models leave every count at 0.
        """
        top_RK, value_RK = largest(reading.difference_RV, self._k)
        bottom_RK, drop_RK = largest(-reading.difference_RV, self._k)
        differs_R = value_RK[:, 0] > -drop_RK[:, 0]
        self._sums.add(reading)
        self._waiting.append((reading.sequence_R, reading.position_R, differs_R, top_RK, bottom_RK, value_RK))

    def _count_waiting(self) -> None:
        """Counts what was found, then takes in the documents that have come to their end."""
        if self._waiting:
            self._count(*map(np.concatenate, zip(*self._waiting, strict=True)))
        self._documents.close(self._ended)
        self._waiting, self._ended = [], set()

    def _count(
        self, sequence_R: np.ndarray, position_R: np.ndarray, differs_R: np.ndarray, top_RK: np.ndarray,
        bottom_RK: np.ndarray, value_RK: np.ndarray,
    ) -> None:  # fmt: skip
        self._sums.count(top_RK[differs_R], bottom_RK[differs_R])
        self._documents.add(sequence_R, differs_R, top_RK, bottom_RK, self._ended)
        if self._settings.topics:
            key_R = self._context.corpus.key_S[sequence_R]
            self._sample.add(*(each[differs_R] for each in (key_R, position_R, top_RK, value_RK)))
        if self._settings.shortlist:
            label_R = self._positions.labels(sequence_R, position_R)
            self._by_position.add(label_R, differs_R, top_RK, bottom_RK)
            self._cooccurrence.add(sequence_R, differs_R, top_RK, bottom_RK)
