"""The fold of `diff_mining`: counts per token and document, and a sample of positions for the topics.

Suffixes: N tokens of a block, V vocabulary, K top-k, S documents, G groups of tokens that count as one.
"""

from typing import Any

import numpy as np

from diffing_core.blocks import StreamContext, TokenBlock
from diffing_core.lazy import torch
from diffing_core.methods.base import Tables
from diffing_core.methods.diff_mining.declaration import DiffMiningSettings
from diffing_core.methods.diff_mining.evidence import DocumentCounts
from diffing_core.methods.diff_mining.listing import Listing, TokenSums, groups_of
from diffing_core.methods.diff_mining.topics import PositionSample, find_topics


class DiffMiningFold:
    """Sums over positions, [V]; net counts per document; K entries of at most `nmf_positions` positions."""

    def __init__(self, context: StreamContext, settings: DiffMiningSettings) -> None:
        self.layers = ()
        self._context = context
        self._settings = settings
        self._k = min(settings.top_k, context.vocab_size // 2)
        self._group_V = groups_of(context, merge_variants=settings.merge_variants)
        self._sums = TokenSums.zeros(context.vocab_size)
        last_position_S = np.asarray([len(sequence) - 1 for sequence in context.corpus.sequences])
        self._documents = DocumentCounts(self._group_V, last_position_S)
        self._sample = PositionSample(settings.nmf_positions, settings.seed)

    def update(self, block: TokenBlock) -> None:
        """Adds N positions.

        A position at which nothing differs has no largest difference; it counts as a position and adds
        to no count, so that identical models leave every count at 0.
        """
        difference_NV = self._difference(block)
        top_NK, value_NK = largest(difference_NV, self._k)
        bottom_NK, drop_NK = largest(-difference_NV, self._k)
        differs_N = value_NK[:, 0] > -drop_NK[:, 0]
        self._sums.add(block, difference_NV, top_NK[differs_N], bottom_NK[differs_N])
        self._documents.add(block, differs_N, top_NK, bottom_NK)
        if self._settings.topics:
            self._sample.add(*(each[differs_N] for each in (block.sequence_N, block.position_N, top_NK, value_NK)))

    def finish(self) -> Tables:
        """The three tables."""
        listing = Listing.of(self._context, self._settings, self._group_V, self._sums, self._documents)
        ids_PK, value_PK = self._sample.entries()
        topics = find_topics(self._group_V[ids_PK], value_PK, listing.listable_G, self._settings)
        return listing.tables(topics)

    def _difference(self, block: TokenBlock) -> Any:
        difference_NV = block.logprob_difference_NV
        if self._settings.centre == "mean":
            return difference_NV - difference_NV.mean(1, keepdim=True)
        return difference_NV


def largest(values_NV: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and values of the k < V largest entries of each row, falling, [N, k]; of equals the lowest ids.

    One entry more than wanted is taken, so that rows with a tie across the cut show themselves. On a CPU
    with V = 8192 and k = 100 a row takes 42 µs; partition takes 50, its indices 65, a full sort 520.
    """
    value_NK, id_NK = values_NV.topk(k + 1)
    tied = torch.nonzero(value_NK[:, k - 1] == value_NK[:, k])[:, 0]
    value_NK, id_NK = value_NK[:, :k], id_NK[:, :k]
    if len(tied):
        id_NK[tied] = _lowest_ids(values_NV[tied], value_NK[tied], id_NK[tied])
    return id_NK.cpu().numpy(), value_NK.cpu().numpy()


def _lowest_ids(values_RV: Any, value_RK: Any, id_RK: Any) -> Any:
    """Ids of R rows in which the entries equal to the smallest value taken are the first of their kind."""
    cut_R = value_RK[:, -1]
    n_above_R = (value_RK > cut_R[:, None]).sum(1)
    row_E, id_E = torch.nonzero(values_RV == cut_R[:, None], as_tuple=True)
    started_R = torch.searchsorted(row_E, torch.arange(len(cut_R), device=row_E.device))
    column_E = n_above_R[row_E] + torch.arange(len(row_E), device=row_E.device) - started_R[row_E]
    fits = column_E < value_RK.shape[1]
    id_RK[row_E[fits], column_E[fits]] = id_E[fits]
    return id_RK
