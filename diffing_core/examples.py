"""The probe sequences in which something is largest, with a value for each of their tokens.

A method measures G quantities ("groups": a statistic at a layer, say) at every token. `TopExamples` keeps,
per group, the sequences with the largest maximum and those with the largest mean, and writes them as one
columnar table, tokens and values as lists of one length, so that SQL can rank them and a report can colour
the text. A sequence is named by its place in the corpus, which is a key column of every stored table.

Shapes: G groups, N tokens of a block, T tokens of one sequence that methods see.
"""

import heapq
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from diffing_core.blocks import StreamContext
from diffing_core.corpus import ROLES
from diffing_core.tables import Column, Role, TableSpec

RANKINGS = ("max", "mean")


def text_columns(unit: str, role: Role) -> tuple[Column, ...]:
    """The columns of one text with a value at each of its tokens; `text_row` fills them."""
    return (
        Column("sequence", "int32", "Index of the probe sequence, counted through all corpora that were read.", low=0),
        Column("position", "int32", "Position of the largest value in the sequence, from 0.", low=0),
        Column("first_position", "int32", "Position of the first token listed: those skipped have no value.", low=0),
        Column("tokens", "list<string>", "Tokens of the whole sequence as text, one by one. Untrusted."),
        Column("speakers", "list<string>", "Role whose turn it is at each of these tokens."),
        Column("is_template", "list<bool>", "Whether each of them belongs to the chat template."),
        Column("values", "list<float32>", "The quantity at each of these tokens.", unit, role),
    )


def text_row(context: StreamContext, sequence: int, first: int, value_T: np.ndarray) -> dict[str, Any]:
    """Those columns of a sequence whose tokens from `first` on have the values [T]."""
    whole, seen = context.corpus.sequences[sequence], slice(first, first + len(value_T))
    return {
        "sequence": sequence,
        "position": first + int(value_T.argmax()),
        "first_position": first,
        "tokens": context.token_texts(whole.token_T[seen]),
        "speakers": np.take(ROLES, whole.role_T[seen]).tolist(),
        "is_template": whole.template_T[seen].tolist(),
        "values": value_T,
    }


def around_peak(row: Mapping[str, Any], before: int, after: int) -> str:
    """The text of such a row, from so many tokens before its largest value to so many behind it."""
    peak = row["position"] - row["first_position"]
    return "".join(row["tokens"][max(0, peak - before) : peak + after + 1])


def examples_spec(
    name: str, doc: str, groups: tuple[Column, ...], *, unit: str = "", role: Role = "effect"
) -> TableSpec:
    """The table of a method's top examples; `groups` are the key columns that tell its quantities apart.

    `role` is that of the scores: `effect` unless some quantity is not zero for identical models.
    """
    return TableSpec(
        name,
        doc,
        (*(column.name for column in groups), "ranked_by", "rank"),
        (
            *groups,
            Column("ranked_by", "string", "What orders the sequences: max or mean of their tokens' values.", role="key"),
            Column("rank", "int32", "1 is the largest.", role="key", low=1),
            Column("score", "float64", "That maximum or mean.", unit, role),
            *text_columns(unit, role),
        ),
        heavy=True,
    )


class _Example(NamedTuple):
    """Ordered by score, then by earlier sequence; no two of a group share a sequence."""

    score: float
    minus_sequence: int
    first_position: int
    value_T: np.ndarray


class TopExamples:
    """The `per_group` sequences with the largest scores per group and ranking.

    Fed block by block, each sequence contiguous, wherever the blocks are cut. Of equal scores the earlier
    sequence comes first. A sequence that never rises above zero is no example. Memory: one open sequence,
    and groups × rankings × per_group rows of values.
    """

    def __init__(self, n_groups: int, per_group: int, rankings: Sequence[str] = RANKINGS) -> None:
        self._rankings = tuple(rankings)
        self._per_group = per_group
        self._kept: list[list[list[_Example]]] = [[[] for _ in range(n_groups)] for _ in self._rankings]
        self._floor_RG = np.zeros((len(self._rankings), n_groups))
        self._sequence = -1
        self._first_position = 0
        self._open: list[np.ndarray] = []

    def add(self, sequence_N: np.ndarray, position_N: np.ndarray, value_GN: np.ndarray) -> None:
        """Adds the values of N tokens in every group, float32."""
        starts = np.flatnonzero(np.diff(sequence_N, prepend=-1))
        for begin, end in itertools.pairwise([*starts.tolist(), len(sequence_N)]):
            if sequence_N[begin] != self._sequence:
                self._close()
                self._sequence = int(sequence_N[begin])
                self._first_position = int(position_N[begin])
            self._open.append(value_GN[:, begin:end])

    def table(self, spec: TableSpec, context: StreamContext, groups: Mapping[str, Sequence[Any]]) -> pa.Table:
        """The table, best first; `groups` gives each key column its value in each of the G groups."""
        self._close()
        columns: dict[str, list[Any]] = {name: [] for name in spec.schema.names}
        for ranking, kept_G in zip(self._rankings, self._kept, strict=True):
            for group, kept in enumerate(kept_G):
                keys = {name: values[group] for name, values in groups.items()}
                for rank, example in enumerate(sorted(kept, reverse=True), start=1):
                    row = keys | {"ranked_by": ranking, "rank": rank} | _row(example, context)
                    for name, values in columns.items():
                        values.append(row[name])
        return spec.table(columns)

    def _close(self) -> None:
        """Scores the open sequence as a whole, so that no cut shows, and keeps it where it is large enough."""
        if not self._open:
            return
        value_GT = np.concatenate(self._open, axis=1)
        self._open = []
        score_RG = np.stack([getattr(value_GT.astype(np.float64), ranking)(axis=1) for ranking in self._rankings])
        for ranking, group in np.argwhere((score_RG > 0) & (score_RG >= self._floor_RG)).tolist():
            kept = self._kept[ranking][group]
            example = _Example(
                float(score_RG[ranking, group]), -self._sequence, self._first_position, value_GT[group].copy()
            )
            if len(kept) < self._per_group:
                heapq.heappush(kept, example)
            else:
                heapq.heappushpop(kept, example)
            if len(kept) == self._per_group:
                self._floor_RG[ranking, group] = kept[0].score


def _row(example: _Example, context: StreamContext) -> dict[str, Any]:
    return {"score": example.score} | text_row(context, -example.minus_sequence, example.first_position, example.value_T)
