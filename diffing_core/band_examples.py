"""Texts from all over the range of a latent's activation, not only its peak: what it means shows in between too.

A sequence belongs to the band in which its largest activation lies, as a share of the latent's largest anywhere
(BANDS). Of the highest band the strongest sequences are shown, of the others a random choice, the same in every run.

Reference: quantile examples of https://arxiv.org/abs/2504.02922.

Shapes: G latents, N rows of a block, S sequences, T tokens of one sequence.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from diffing_core.activation_pairs import PairedRows
from diffing_core.examples import text_columns, text_row
from diffing_core.fit_reading import FitReading
from diffing_core.sampling import position_hash
from diffing_core.tables import Column, Role, TableSpec

BANDS = (0.0, 0.25, 0.5, 0.75, 0.95)  # lower edges
Read = Callable[[], Iterable[tuple[PairedRows, np.ndarray]]]


class _Chosen(NamedTuple):
    """One sequence of a latent, and its place in its band."""

    group: int
    sequence: int
    band: float
    rank: int


def bands_spec(name: str, doc: str, groups: tuple[Column, ...], *, unit: str = "", role: Role = "effect") -> TableSpec:
    """The table; `groups` are the key columns that tell latents apart."""
    return TableSpec(
        name,
        doc,
        (*(column.name for column in groups), "band", "rank"),
        (
            *groups,
            Column("band", "float64", "Lower edge of the band, as share of the latent's largest activation.", role="key"),
            Column("rank", "int32", "Place in the band, from 1; in the highest by size.", role="key", low=1),
            Column("score", "float64", "Largest activation in the sequence.", unit, role),
            *text_columns(unit, role),
        ),
        heavy=True,
    )


def examples_by_band(
    spec: TableSpec, reading: FitReading, read: Read, groups: Mapping[str, Sequence[Any]], per_band: int
) -> pa.Table:
    """The table, by latent, highest band first; `groups` gives each key column its value for each of G latents.

    `read` is called twice and gives rows in stored order with their activations, float32 [G, N], none negative.
    """
    chosen = _choice(_peaks(reading, read), per_band)
    value_T = _values(reading, read, {(each.group, each.sequence) for each in chosen})
    rows = [
        {name: values[each.group] for name, values in groups.items()}
        | _row(each, reading, value_T[each.group, each.sequence])
        for each in chosen
    ]
    return spec.table({name: [row[name] for row in rows] for name in spec.schema.names})


def _peaks(reading: FitReading, read: Read) -> np.ndarray:
    """Largest activation of each latent in each sequence, [G, S]; [0, S] if nothing is read."""
    n_sequences = len(reading.context.corpus.sequences)
    peak_GS: np.ndarray | None = None
    for rows, value_GN in read():
        if peak_GS is None:
            peak_GS = np.zeros((len(value_GN), n_sequences), np.float32)
        sequence_N = reading.sequence_N(rows)
        starts = np.flatnonzero(np.diff(sequence_N, prepend=-1))
        found_GX = np.maximum.reduceat(value_GN, starts, axis=1)
        at_X = sequence_N[starts]
        np.maximum.at(peak_GS, (slice(None), at_X), found_GX)
    return np.zeros((0, n_sequences), np.float32) if peak_GS is None else peak_GS


def _choice(peak_GS: np.ndarray, per_band: int) -> list[_Chosen]:
    chosen = []
    for group, peak_S in enumerate(peak_GS):
        active = np.flatnonzero(peak_S)
        share_A = peak_S[active] / peak_S.max(initial=0)
        band_A = np.searchsorted(BANDS, share_A, side="right") - 1
        order_A = position_hash(active, np.full_like(active, group), 0)
        for band in reversed(range(len(BANDS))):
            members = np.flatnonzero(band_A == band)
            key = -share_A[members] if band == len(BANDS) - 1 else order_A[members]
            best = active[members[np.argsort(key, kind="stable")[:per_band]]]
            chosen += [_Chosen(group, int(sequence), BANDS[band], rank) for rank, sequence in enumerate(best, start=1)]
    return chosen


def _values(reading: FitReading, read: Read, wanted: set[tuple[int, int]]) -> dict[tuple[int, int], np.ndarray]:
    """Activations of the chosen sequences at all their tokens."""
    sequences = reading.context.corpus.sequences
    groups_of: dict[int, list[int]] = {}
    for group, sequence in sorted(wanted):
        groups_of.setdefault(sequence, []).append(group)
    found = {(group, sequence): np.zeros(len(sequences[sequence]), np.float32) for group, sequence in wanted}
    for rows, value_GN in read() if wanted else ():
        sequence_N = reading.sequence_N(rows)
        starts = np.flatnonzero(np.diff(sequence_N, prepend=-1))
        for begin, end in itertools.pairwise([*starts.tolist(), len(rows)]):
            sequence, here = int(sequence_N[begin]), slice(begin, end)
            for group in groups_of.get(sequence, ()):
                found[group, sequence][rows.position_N[here]] = value_GN[group, here]
    return found


def _row(each: _Chosen, reading: FitReading, value_T: np.ndarray) -> dict[str, Any]:
    first = int(reading.context.corpus.first_seen_S[each.sequence])
    return {
        "band": each.band,
        "rank": each.rank,
        "score": float(value_T.max()),
    } | text_row(reading.context, each.sequence, first, value_T[first:])
