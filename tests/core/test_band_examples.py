"""Examples by band of activation."""

from collections.abc import Iterator

import numpy as np
import pytest

from diffing_core.activation_pairs import COLUMNS, PairedRows
from diffing_core.band_examples import BANDS, bands_spec, examples_by_band
from diffing_core.blocks import StreamContext
from diffing_core.corpus import ProbeCorpus, ProbeSequence
from diffing_core.tables import Column
from tests import model_files

SPEC = bands_spec("toy_examples", "Examples.", (Column("latent", "int32", "Number.", role="key"),))
PEAKS = np.array([1.0, 0.97, 0.8, 0.76, 0.6, 0.3, 0.2, 0.1, 0.0])
LENGTH = 6


class Reading:
    """Nine sequences of six tokens; sequence s peaks at position s mod 6 with PEAKS[s]."""

    def __init__(self) -> None:
        sequences = tuple(
            ProbeSequence(np.full(LENGTH, 2 + s, np.int32), np.zeros(LENGTH, np.int8), np.zeros(LENGTH, bool)) for s in range(9)
        )
        corpus = ProbeCorpus("probe", sequences, 9)
        tokenizer = model_files.tokenizer()
        self.context = StreamContext(None, None, tokenizer, corpus, 1, 4, model_files.VOCAB)  # type: ignore[arg-type]

    def sequence_N(self, rows: PairedRows) -> np.ndarray:
        return rows.sequence_N


def read(cut: int = 54, first: int = 0) -> Iterator[tuple[PairedRows, np.ndarray]]:
    """Two latents, the second twice as strong, in blocks of `cut` rows."""
    value_ST = np.zeros((9, LENGTH), np.float32)
    value_ST[np.arange(9), np.arange(9) % LENGTH] = PEAKS
    sequence_N, position_N = np.repeat(np.arange(9), LENGTH), np.tile(np.arange(LENGTH), 9)
    kept = np.flatnonzero(position_N >= first)
    value_N = value_ST.reshape(-1)
    for start in range(0, len(kept), cut):
        at = kept[start : start + cut]
        facts = dict.fromkeys(COLUMNS, at) | {"sequence_N": sequence_N[at], "position_N": position_N[at]}
        yield PairedRows(**facts), np.stack([value_N[at], 2 * value_N[at]])


def table(**options: int) -> list[dict]:
    return examples_by_band(SPEC, Reading(), lambda: read(**options), {"latent": [3, 5]}, 10).to_pylist()


def test_every_active_sequence_lies_in_the_band_of_its_peak() -> None:
    rows = [row for row in table() if row["latent"] == 3]
    assert [row["band"] for row in rows] == sorted((row["band"] for row in rows), reverse=True)
    by_band = {band: {row["sequence"] for row in rows if row["band"] == band} for band in BANDS}
    assert by_band == {0.95: {0, 1}, 0.75: {2, 3}, 0.5: {4}, 0.25: {5}, 0.0: {6, 7}}
    assert [row["sequence"] for row in rows[:2]] == [0, 1]


def test_bands_are_shares_of_the_latents_own_largest_activation() -> None:
    first, second = ([row for row in table() if row["latent"] == latent] for latent in (3, 5))
    assert {(row["sequence"], row["band"]) for row in first} == {(row["sequence"], row["band"]) for row in second}
    assert second[0]["score"] == pytest.approx(2.0)


def test_values_tokens_and_peak_belong_together() -> None:
    for row in table():
        assert row["tokens"] == [f"w{2 + row['sequence']}"] * LENGTH
        assert row["position"] == row["sequence"] % LENGTH == int(np.argmax(row["values"]))
        assert max(row["values"]) == pytest.approx(row["score"])


def test_where_blocks_are_cut_changes_nothing() -> None:
    assert table(cut=4) == table()


def test_rows_left_out_are_zeros_and_shift_no_token() -> None:
    whole, late = ({(row["latent"], row["sequence"]): row for row in table(first=first)} for first in (0, 1))
    assert (3, 0) in whole and (3, 0) not in late  # its peak is at position 0
    for key, row in late.items():
        assert row["values"] == whole[key]["values"]


def test_no_more_than_asked_for_per_band() -> None:
    rows = examples_by_band(SPEC, Reading(), read, {"latent": [3, 5]}, 1).to_pylist()
    assert len(rows) == 2 * len(BANDS)
    assert [row["sequence"] for row in rows if row["band"] == BANDS[-1]] == [0, 0]
