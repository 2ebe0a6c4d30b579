"""Rows gathered by block of documents, for sums that a jackknife leaves out a block at a time.

Suffix: N rows.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from diffing_core.activation_pairs import PairedRows, joined
from diffing_core.sampling import position_hash

N_BLOCKS = 20
WAITING_BYTES = 2**29
LEAST_TOGETHER, MOST_TOGETHER = 512, 4096


def block_of(document_N: np.ndarray, n_blocks: int = N_BLOCKS) -> np.ndarray:
    """Block of each row's document, by a hash: documents of all kinds are in every block."""
    return (position_hash(document_N, np.zeros(len(document_N), np.int64), 0) % np.uint64(n_blocks)).astype(np.int64)


def by_block(blocks: Iterable[PairedRows]) -> Iterator[tuple[int, PairedRows]]:
    """The rows of one block of documents at a time: as many as may wait, since a batch costs as much as the dictionary is large."""
    waiting: dict[int, list[PairedRows]] = {block: [] for block in range(N_BLOCKS)}
    for rows in blocks:
        block_N = block_of(rows.document_N)
        for block in np.unique(block_N).tolist():
            waiting[block].append(rows.take(np.flatnonzero(block_N == block)))
            if sum(map(len, waiting[block])) >= _rows_together(rows):
                yield block, joined(waiting[block])
                waiting[block] = []
    yield from ((block, joined(parts)) for block, parts in waiting.items() if parts)


def _rows_together(rows: PairedRows) -> int:
    """Rows of a batch, of which those of all blocks may wait at a time."""
    bytes_of_row = 2 * rows.base_ND.shape[1] * rows.base_ND.element_size()
    return min(MOST_TOGETHER, max(LEAST_TOGETHER, WAITING_BYTES // (N_BLOCKS * bytes_of_row)))
