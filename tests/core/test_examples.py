"""Top examples against a plain sort, however the blocks are cut."""

import itertools
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pytest

from diffing_core.blocks import StreamContext
from diffing_core.corpus import ProbeCorpus, ProbeSequence
from diffing_core.examples import TopExamples, examples_spec
from diffing_core.identity import RunKey
from diffing_core.lake import Lake
from diffing_core.pairs import Pair
from diffing_core.tables import Column
from tests import model_files
from tests.model_files import VOCAB

LENGTHS = (7, 1, 12, 4, 4, 9, 1, 3)
ARRIVAL = (2, 5, 0, 3, 4, 7, 1, 6)  # a corpus is read longest first
SPEC = examples_spec(
    "examples",
    "Examples.",
    (Column("statistic", "string", "What is large.", role="key"), Column("layer", "int32", "Where.", role="key")),
)
GROUPS = {"statistic": ["norm", "angle"], "layer": [0, 3]}


def corpus(skip: int = 0) -> ProbeCorpus:
    draw = np.random.default_rng(0)
    sequences = tuple(
        ProbeSequence(draw.integers(2, VOCAB, n).astype(np.int32), np.zeros(n, np.int8), np.zeros(n, bool)) for n in LENGTHS
    )
    return ProbeCorpus("probe", sequences, len(sequences), skip_first_tokens=skip)


def context(probe: ProbeCorpus) -> StreamContext:
    return StreamContext(None, None, model_files.tokenizer(), probe, n_layers=4, d_model=2, vocab_size=VOCAB)


def measured(seed: int, levels: int | None = None) -> dict[int, np.ndarray]:
    """Values of two groups per sequence, [2, T]; with `levels` there are many ties."""
    draw = np.random.default_rng(seed)
    values = {index: draw.exponential(size=(2, n)) for index, n in enumerate(LENGTHS)}
    return {index: (np.ceil(each * levels) / levels if levels else each).astype(np.float32) for index, each in values.items()}


def collected(
    values: dict[int, np.ndarray], per_group: int = 3, cuts: int = 0, skip: int = 0, arrival: tuple[int, ...] = ARRIVAL
) -> pl.DataFrame:
    probe = corpus(skip)
    kept = [index for index in arrival if LENGTHS[index] > skip]
    sequence_N = np.concatenate([np.full(LENGTHS[index] - skip, index) for index in kept])
    position_N = np.concatenate([np.arange(skip, LENGTHS[index]) for index in kept])
    value_GN = np.concatenate([values[index][:, skip:] for index in kept], axis=1)
    inner = np.random.default_rng(cuts).choice(np.arange(1, len(sequence_N)), cuts, replace=False).tolist()
    top = TopExamples(2, per_group)
    for begin, end in itertools.pairwise(sorted([0, *inner, len(sequence_N)])):
        top.add(sequence_N[begin:end], position_N[begin:end], value_GN[:, begin:end])
    return pl.from_arrow(top.table(SPEC, context(probe), GROUPS))


def by_sorting(values: dict[int, np.ndarray], group: int, ranking: str, skip: int = 0) -> list[tuple[float, int]]:
    """(score, sequence), best first, from all sequences."""
    scores = [
        (float(getattr(each[group, skip:].astype(np.float64), ranking)()), index)
        for index, each in values.items()
        if each.shape[1] > skip
    ]
    return sorted(scores, key=lambda row: (-row[0], row[1]))


@pytest.mark.parametrize("per_group", [1, 3, 50])
@pytest.mark.parametrize("cuts", [0, 1, 10, 40])
@pytest.mark.parametrize("levels", [None, 2])
def test_kept_examples_are_the_first_of_a_sort_wherever_blocks_are_cut(per_group: int, cuts: int, levels: int | None) -> None:
    values = measured(cuts, levels)
    frame = collected(values, per_group, cuts)
    for group, ranking in itertools.product((0, 1), ("max", "mean")):
        rows = frame.filter((pl.col("layer") == GROUPS["layer"][group]) & (pl.col("ranked_by") == ranking))
        expected = by_sorting(values, group, ranking)[:per_group]
        assert rows["rank"].to_list() == list(range(1, len(expected) + 1))
        assert list(zip(rows["score"], rows["sequence"], strict=True)) == expected


def test_tables_do_not_depend_on_cuts_or_order_of_arrival() -> None:
    whole = collected(measured(0, 3))
    assert whole.equals(collected(measured(0, 3), cuts=17))
    assert whole.equals(collected(measured(0, 3), arrival=ARRIVAL[::-1]))


@pytest.mark.parametrize("skip", [0, 2])
def test_tokens_and_values_cover_the_whole_sequence_from_the_first_token_seen(skip: int) -> None:
    """The toolkit's skipped tokens came in as zeros; here they are absent, and positions stay those of the sequence."""
    values, probe = measured(1), corpus(skip)
    for row in collected(values, skip=skip, cuts=5).to_dicts():
        expected_T = values[row["sequence"]][GROUPS["layer"].index(row["layer"]), skip:]
        np.testing.assert_array_equal(np.float32(row["values"]), expected_T)
        assert row["tokens"] == [f"w{token}" for token in probe.sequences[row["sequence"]].token_T[skip:]]
        assert (row["first_position"], row["position"]) == (skip, skip + int(expected_T.argmax()))
        assert row["values"][row["position"] - row["first_position"]] == max(row["values"])


def test_sequences_in_which_nothing_rises_above_zero_are_no_examples() -> None:
    values = {index: np.zeros_like(each) for index, each in measured(0).items()}
    assert len(collected(values)) == 0
    values[3][1] = [0, 2, -4, 0]
    rows = collected(values)
    assert rows.select("layer", "ranked_by", "sequence", "position").rows() == [(3, "max", 3, 1)]


def test_memory_is_bounded_by_groups_and_not_by_the_corpus() -> None:
    top = TopExamples(2, 4)
    for sequence in range(500):
        places = np.full(6, sequence), np.arange(6)
        top.add(*places, np.random.default_rng(sequence).random((2, 6)).astype(np.float32))
    kept = [example for of_ranking in top._kept for of_group in of_ranking for example in of_group]
    assert len(kept) == 2 * 2 * 4
    assert all(example.value_T.base is None for example in kept), "a view would keep its whole block alive"


def test_the_floor_follows_what_is_kept() -> None:
    """The toolkit's table of least scores never noted that its store had been refreshed, and let everything through."""
    top = TopExamples(1, 2)
    for sequence, height in enumerate((1, 5, 3, 9, 2)):
        top.add(np.full(2, sequence), np.arange(2), np.full((1, 2), height, np.float32))
    top.table(examples_spec("one", "One.", ()), context(corpus()), {})
    assert top._floor_RG.tolist() == [[5], [5]]


def test_values_belong_to_their_group_and_not_only_to_their_sequence() -> None:
    """The toolkit's merge mapped details by sequence, so one group was coloured with another's values."""
    values = {0: np.array([[1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1]], np.float32)}
    rows = collected(values, arrival=(0,)).filter(pl.col("ranked_by") == "max")
    assert dict(rows.select("layer", "values").rows()) == {0: [1, 2, 3, 4, 5, 6, 7], 3: [7, 6, 5, 4, 3, 2, 1]}


def test_one_text_in_two_corpora_keeps_both_names(tmp_path: Path) -> None:
    """In the toolkit's store the second dataset replaced the name of the first."""
    lake, table = Lake(tmp_path), collected(measured(0)).to_arrow().cast(SPEC.schema)
    for name in ("chats", "texts"):
        key = RunKey(Pair("m", "o"), "kl", "1", "settings", "base", "adapter", name, "the same text", "diff")
        lake.write(SPEC, key, table)
    assert set(lake.read(SPEC)["corpus"].to_pylist()) == {"chats", "texts"}


def test_an_example_is_named_by_its_place_in_the_corpus_and_found_again_in_sql() -> None:
    """The toolkit named sequences by a salted hash, another one in every process, so stores could not be joined."""
    values = measured(2)
    [found] = duckdb.from_arrow(collected(values).to_arrow()).query(
        "examples",
        "select sequence, values[position - first_position + 1], tokens[position - first_position + 1] from examples"
        " where statistic = 'angle' and ranked_by = 'max' and rank = 1",
    ).fetchall()
    score, sequence = by_sorting(values, 1, "max")[0]
    token = corpus().sequences[sequence].token_T[int(values[sequence][1].argmax())]
    assert found == (sequence, score, f"w{token}")
