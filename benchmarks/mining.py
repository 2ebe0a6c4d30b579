"""Diff mining: memory against corpus length, lists against the whole matrix, NMF collection against a loop."""

import json
import subprocess
import sys
from typing import Any

import numpy as np

from benchmarks.figure import Figure, cpu_s, in_turn, own_peak_mb
from benchmarks.pairs import cohort, corpus
from benchmarks.stream import TOKENS_PER_BATCH, VOCABULARY, passed
from diffing_core.blocks import StreamContext, TokenBlock
from diffing_core.methods.base import Method, Need
from diffing_core.methods.diff_mining import METHOD
from diffing_core.methods.diff_mining.topics import entry_matrix
from diffing_core.paired_pass import paired_pass
from diffing_core.settings import Settings

SMALL = {"d_model": 128, "n_layers": 4, "vocabulary": VOCABULARY}


def diff_mining_memory(lengths: tuple[int, ...] = (8192, 32768, 131072)) -> list[Figure]:
    """Peak memory of diff mining alone on ever longer corpora, each in a process of its own."""
    peaks = {n: _peak_mb(n) for n in lengths}
    parts = {f"{n} tokens (MB)": peak for n, peak in peaks.items()}
    return [
        Figure("diff_mining_peak_mb", max(peaks.values()), "MB", 1000, "lower", parts),
        Figure("diff_mining_peak_mb_growth", peaks[lengths[-1]] - peaks[lengths[0]], "MB", 100, "lower", parts),
    ]


def diff_mining_exactness(n_tokens: int = 2048) -> list[Figure]:
    """Share of list places that agree with counting in the whole matrix of differences, sorted row by row in float64.

    The matrix is kept by a method of its own in the same pass, so that both see the same differences.
    """
    [pair] = cohort(1, **SMALL)
    probe = corpus(n_tokens, vocabulary=VOCABULARY)
    settings = METHOD.settings(min_probability=0, drop_punctuation=False, topics=0, whole_vocabulary=True)
    methods = [(METHOD, settings), (WHOLE, Settings())]
    mined, whole = paired_pass([pair], probe, methods, tokens_per_batch=TOKENS_PER_BATCH)
    difference_MV = whole.tables["whole"]
    top_V, bottom_V = (_counted(sign * difference_MV, settings.top_k) for sign in (1, -1))
    best = np.lexsort((-difference_MV.mean(0), -top_V))[: settings.listed]
    rows = mined.tables["diff_mining_orderings"].to_pylist()
    listed = [row["token_id"] for row in rows if row["ordering"] == "top_k_occurring"]
    vocabulary = mined.tables["diff_mining_vocabulary"]
    parts = {
        "count_top equal": float(np.mean(vocabulary["count_top"].to_numpy() == top_V)),
        "count_bottom equal": float(np.mean(vocabulary["count_bottom"].to_numpy() == bottom_V)),
        "whole matrix (MB)": difference_MV.nbytes / 2**20,
    }
    return [Figure("diff_mining_lists_equal", float(np.mean(listed == best)), "share", 1, "higher", parts)]


def nmf_collection(n_positions: int = 8192, top_k: int = 100) -> list[Figure]:
    """Positions × K entries made into a sparse matrix, against an interpreted loop over the same pairs."""
    draw = np.random.default_rng(0)
    ids_PK = np.argsort(draw.random((n_positions, VOCABULARY), dtype=np.float32), axis=1)[:, :top_k]
    values_PK = draw.normal(1, 1, ids_PK.shape).astype(np.float32)
    everything = np.ones(VOCABULARY, bool)
    taken = in_turn(
        {
            "vectorised (s)": lambda: entry_matrix(ids_PK, values_PK, everything),
            "loop (s)": lambda: _collected_in_a_loop(ids_PK, values_PK),
        },
        3,
        cpu_s,
    )
    matrix, _ = entry_matrix(ids_PK, values_PK, everything)
    looped, columns = _collected_in_a_loop(ids_PK, values_PK)
    assert (matrix != looped[:, np.argsort(list(columns))]).nnz == 0
    parts = taken | {"entries per s": matrix.nnz / taken["vectorised (s)"]}
    return [Figure("nmf_collection_speedup", taken["loop (s)"] / taken["vectorised (s)"], "×", 20, "higher", parts)]


class _WholeFold:
    """Keeps every difference of the corpus, as a method must not."""

    layers = ()

    def __init__(self, context: StreamContext, _: Settings) -> None:
        starts = np.cumsum([0, *(len(sequence) for sequence in context.corpus.sequences)])
        self._starts_S = starts[:-1]
        self._difference_MV = np.zeros((starts[-1], context.vocab_size))

    def update(self, block: TokenBlock) -> None:
        """Adds N rows."""
        self._difference_MV[self._starts_S[block.sequence_N] + block.position_N] = block.logprob_difference_NV.numpy()

    def finish(self) -> dict[str, Any]:
        """The matrix, float64 [tokens, vocabulary]."""
        return {"whole": self._difference_MV}


WHOLE = Method(
    name="whole", version="1", kind="stream", needs=frozenset({Need.LOGPROBS}), settings=Settings, tables=(),
    reference="", findings=None, headline=lambda _: {}, start=_WholeFold,
)  # fmt: skip


def _counted(values_MV: np.ndarray, k: int) -> np.ndarray:
    """How often each column is among the k largest of a row, of equals the first, [V]."""
    order_MK = np.argsort(-values_MV, axis=1, kind="stable")[:, :k]
    return np.bincount(order_MK.ravel(), minlength=values_MV.shape[1])


def _collected_in_a_loop(ids_PK: np.ndarray, values_PK: np.ndarray) -> tuple[Any, dict[int, int]]:
    """Three lists, entry by entry, and the column of each token."""
    from scipy.sparse import csr_matrix

    rows: list[int] = []
    columns: list[int] = []
    values: list[float] = []
    column_of: dict[int, int] = {}
    for row in range(len(ids_PK)):
        for place in range(ids_PK.shape[1]):
            token, value = int(ids_PK[row, place]), float(values_PK[row, place])
            if value > 0:
                rows.append(row)
                columns.append(column_of.setdefault(token, len(column_of)))
                values.append(value)
    return csr_matrix((values, (rows, columns)), dtype=np.float32), column_of


def _peak_mb(n_tokens: int) -> float:
    command = [sys.executable, "-m", "benchmarks.mining", str(n_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    passed(cohort(1, **SMALL), corpus(int(sys.argv[1]), vocabulary=VOCABULARY), ("diff_mining",))
    sys.stdout.write(f"{own_peak_mb()}\n")
