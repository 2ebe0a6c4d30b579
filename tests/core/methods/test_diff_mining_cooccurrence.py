"""diff_mining's positional densities, co-occurrence and likelihood-ratio windows against plain loops."""

import itertools

import numpy as np
import pytest

from diffing_core.corpus import ROLES, ProbeCorpus, ProbeSequence
from diffing_core.methods.diff_mining import METHOD
from diffing_core.models import ModelPair
from diffing_core.paired_pass import paired_pass
from tests import model_files
from tests.mining_toys import (
    COOCCURRENCE,
    ORDERINGS,
    POSITIONS,
    WINDOWS,
    corpus_of,
    listed,
    mine,
    random_differences,
    tokenizer_of,
    words_of,
)

LENGTHS = [9, 14, 7, 30, 12, 8]
M = sum(LENGTHS)
SEQUENCE_M = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
POSITION_M = np.concatenate([np.arange(length) for length in LENGTHS])


def ends_of(difference_MV: np.ndarray, k: int) -> tuple[list[set[int]], list[set[int]]]:
    """The ids among the k largest and the k smallest of every position."""
    order_MV = np.argsort(-difference_MV, axis=1, kind="stable")
    return [set(ids) for ids in order_MV[:, :k].tolist()], [set(ids) for ids in order_MV[:, -k:].tolist()]


# Positional densities


def test_positional_counts_equal_a_loop():
    difference_MV = random_differences(0, M, 40)
    tables = mine(difference_MV, LENGTHS, top_k=4, topics=0, shortlist=6, density_positions=10)
    top, bottom = ends_of(difference_MV, 4)
    shortlist = [row["token_id"] for row in listed(tables, "top_k_occurring")[:6]]
    rows = tables[POSITIONS].to_pylist()
    assert [(row["token_id"], row["position"]) for row in rows] == [(t, p) for t in shortlist for p in range(10)]
    for row in rows:
        there = np.flatnonzero(row["position"] == POSITION_M)
        assert row["n_positions"] == len(there)
        assert row["count_top"] == sum(row["token_id"] in top[index] for index in there)
        assert row["count_bottom"] == sum(row["token_id"] in bottom[index] for index in there)


def test_positions_of_chats_count_from_the_answer():
    user, assistant = ROLES.index("user"), ROLES.index("assistant")
    role_T = np.asarray([user] * 4 + [assistant] * 8, np.int8)
    template_T = np.asarray([True] + [False] * 3 + [True] * 2 + [False] * 6)
    sequence = ProbeSequence(np.ones(12, np.int32), role_T, template_T)
    corpus = ProbeCorpus("chats", (sequence,) * 3, 3)
    difference_MV = random_differences(0, 36, 40)
    difference_MV[:, 5] = -9
    difference_MV[6::12, 5] = 9  # raised at the answer's first token alone
    rows = mine(difference_MV, corpus, top_k=3, topics=0, before_answer=2)[POSITIONS].to_pylist()
    density = {row["position"]: row["count_top"] for row in rows if row["token_id"] == 5}
    assert density == {-2: 0, -1: 0, 0: 3, 1: 0, 2: 0, 3: 0, 4: 0, 5: 0}


def test_positions_at_which_nothing_differs_are_counted_without_a_token():
    difference_MV = random_differences(0, 20, 40)
    difference_MV[10:] = 0
    rows = mine(difference_MV, [10, 10], top_k=4, topics=0)[POSITIONS].to_pylist()
    assert {row["n_positions"] for row in rows} == {2}
    assert max(row["count_top"] for row in rows) == 1


# Co-occurrence


def cooccurrence_by_loops(difference_MV: np.ndarray, k: int) -> dict[tuple[int, int], list[int]]:
    """Sequences, sequences of one sign, positions, positions of one sign, for every pair that meets."""
    found: dict[tuple[int, int], list[int]] = {}
    top, bottom = ends_of(difference_MV, k)
    of_sequence = [np.flatnonzero(sequence == SEQUENCE_M) for sequence in range(len(LENGTHS))]
    by_sequence = [[set().union(*(end[i] for i in rows)) for rows in of_sequence] for end in (top, bottom)]
    for column, (up, down) in {0: by_sequence, 2: [top, bottom]}.items():
        for raised, lowered in zip(up, down, strict=True):
            for one in raised | lowered:
                for other in raised | lowered:
                    counts = found.setdefault((one, other), [0, 0, 0, 0])
                    counts[column] += 1
                    counts[column + 1] += {one, other} <= raised or {one, other} <= lowered
    return found


def test_co_occurrence_equals_loops_over_positions_and_sequences():
    difference_MV = random_differences(0, M, 30)
    tables = mine(difference_MV, LENGTHS, top_k=4, topics=0, shortlist=8)
    expected = cooccurrence_by_loops(difference_MV, 4)
    rows = tables[COOCCURRENCE].to_pylist()
    for row in rows:
        counts = [row[name] for name in ("sequences", "sequences_same_sign", "positions", "positions_same_sign")]
        assert counts == expected[row["token_id"], row["other_id"]]
        assert (row["n_sequences"], row["n_positions"]) == (len(LENGTHS), M)
    shortlist = [row["token_id"] for row in listed(tables, "top_k_occurring")[:8]]
    pairs = {(one, other) for at, one in enumerate(shortlist) for other in shortlist[at:] if (one, other) in expected}
    assert {(row["token_id"], row["other_id"]) for row in rows} == pairs


def test_a_token_with_itself_shows_where_it_occurs_at_all():
    difference_MV = random_differences(0, M, 30)
    tables = mine(difference_MV, LENGTHS, top_k=4, topics=0, shortlist=3)
    first = listed(tables, "top_k_occurring")[0]
    [own] = [row for row in tables[COOCCURRENCE].to_pylist() if row["token_id"] == row["other_id"] == first["token_id"]]
    assert own["positions"] == own["positions_same_sign"] == first["count_top"] + first["count_bottom"]


def test_toolkit_defect_same_sign_matrices_are_copies_of_the_unsigned():
    """One token is raised wherever another is lowered: always together, never at one end."""
    difference_MV = random_differences(0, M, 30)
    difference_MV[:, 3], difference_MV[:, 4], difference_MV[:, 5] = 9, -9, 8
    difference_MV[0, 4] = 7  # raised once, so that it is in the list
    rows = mine(difference_MV, LENGTHS, top_k=3, topics=0)[COOCCURRENCE].to_pylist()
    pairs = {(row["token"], row["other"]): row for row in rows}
    apart, together = pairs["w3", "w4"], pairs["w3", "w5"]
    assert (apart["positions"], apart["positions_same_sign"]) == (M, 1)
    assert (apart["sequences"], apart["sequences_same_sign"]) == (6, 1)
    assert (together["positions"], together["positions_same_sign"]) == (M, M)
    assert (together["sequences"], together["sequences_same_sign"]) == (6, 6)


def test_toolkit_defect_co_occurrence_is_computed_and_never_saved():
    assert COOCCURRENCE in {spec.name for spec in METHOD.tables}
    assert mine(random_differences(0, M, 30), LENGTHS, top_k=4)[COOCCURRENCE].num_rows > 0


def test_co_occurrence_reads_whole_sequences_up_to_its_limit():
    difference_MV = random_differences(0, M, 30)
    options = {"top_k": 4, "topics": 0, "cooccurrence_positions": 40}
    rows = mine(difference_MV, LENGTHS, **options)[COOCCURRENCE].to_pylist()
    n_sequences, n_positions = rows[0]["n_sequences"], rows[0]["n_positions"]
    assert n_positions <= 40
    assert n_positions in {sum(chosen) for chosen in itertools.combinations(LENGTHS, n_sequences)}
    one = mine(difference_MV, LENGTHS, **options | {"cooccurrence_positions": 1})[COOCCURRENCE].to_pylist()
    assert one[0]["n_sequences"] == 1


def test_merged_variants_occur_together_as_one_token():
    words = ["<eos>", "Tea", "tea", *(f"w{index}" for index in range(3, 30))]
    difference_MV = random_differences(0, M, 30)
    difference_MV[:, 1] = np.where(np.arange(M) % 2, 9, 0)
    difference_MV[:, 2] = np.where(np.arange(M) % 2, 0, 9)
    difference_MV[:, 7] = 8
    tables = mine(difference_MV, LENGTHS, words=words, top_k=3, topics=0, merge_variants=True)
    [row] = [row for row in tables[COOCCURRENCE].to_pylist() if {row["token"], row["other"]} == {"tea", "w7"}]
    assert row["positions_same_sign"] == row["positions"] == M
    density = [row for row in tables[POSITIONS].to_pylist() if row["token"] == "tea"]
    assert all(row["count_top"] >= row["n_positions"] for row in density)


def test_an_empty_shortlist_turns_densities_and_co_occurrence_off():
    tables = mine(random_differences(0, M, 30), LENGTHS, top_k=4, shortlist=0)
    assert tables[POSITIONS].num_rows == tables[COOCCURRENCE].num_rows == 0
    assert tables[ORDERINGS].num_rows > 0


# Likelihood-ratio windows


def ratios_by_hand(difference_MV: np.ndarray, corpus: ProbeCorpus) -> list[np.ndarray]:
    """log p_tuned − log p_base of every token but the first, per sequence."""
    starts = np.cumsum([0, *(len(sequence) for sequence in corpus.sequences)])
    return [
        np.asarray([difference_MV[start + i, token] for i, token in enumerate(sequence.token_T[1:])], float)
        for start, sequence in zip(starts, corpus.sequences, strict=False)
    ]


def windows_by_hand(ratio_T: np.ndarray, width: int, step: int) -> dict[int, float]:
    """Sum by the position of the window's first token."""
    n = min(width, len(ratio_T))
    starts = sorted({*range(0, len(ratio_T) - n, step), len(ratio_T) - n})
    return {start + 1: sum(ratio_T[start : start + n]) for start in starts}


@pytest.mark.parametrize(("width", "step"), [(5, 2), (20, 5), (1, 1), (3, 7)])
def test_windows_equal_a_loop_over_all_of_them(width: int, step: int):
    corpus = corpus_of(LENGTHS, 30)
    difference_MV = random_differences(0, M, 30)
    tables = mine(difference_MV, corpus, topics=0, window_tokens=width, window_step=step)
    expected = {}
    for sequence, ratio_T in enumerate(ratios_by_hand(difference_MV, corpus)):
        sums = windows_by_hand(ratio_T, width, step)
        best, worst = max(sums, key=sums.get), min(sums, key=sums.get)
        expected |= {(sequence, at): sums[at] for at in (best,) if sums[at] > 0}
        expected |= {(sequence, at): sums[at] for at in (worst,) if sums[at] < 0}
    rows = tables[WINDOWS].to_pylist()
    assert {(row["sequence"], row["position"]) for row in rows} == expected.keys()
    for row in rows:
        assert row["log_likelihood_ratio"] == pytest.approx(expected[row["sequence"], row["position"]], abs=1e-5)
        token_T = corpus.sequences[row["sequence"]].token_T[row["position"] :][: row["n_tokens"]]
        assert row["text"] == "".join(words_of(30)[token] for token in token_T)
        assert row["n_tokens"] == min(width, LENGTHS[row["sequence"]] - 1)
    values = [row["log_likelihood_ratio"] for row in rows]
    assert values == sorted(values, reverse=True)


def test_only_the_best_windows_are_kept():
    corpus = corpus_of([10] * 60, 30)
    difference_MV = random_differences(0, 600, 30)
    few, all_ = (mine(difference_MV, corpus, topics=0, windows=n)[WINDOWS].to_pylist() for n in (3, 60))
    raised = [row for row in all_ if row["log_likelihood_ratio"] > 0]
    lowered = [row for row in all_ if row["log_likelihood_ratio"] < 0]
    assert few == raised[:3] + lowered[-3:]


def test_a_passage_that_finetuning_taught_is_the_first_window():
    corpus = corpus_of([40] * 5, 30)
    difference_MV = random_differences(0, 200, 30)
    taught = corpus.sequences[2].token_T[15:35]
    difference_MV[2 * 40 + 14 + np.arange(20), taught] = 5
    row = mine(difference_MV, corpus, topics=0, window_step=1)[WINDOWS].to_pylist()[0]
    assert (row["sequence"], row["position"], row["n_tokens"]) == (2, 15, 20)
    assert row["log_likelihood_ratio"] == pytest.approx(100)


def test_windows_are_off_where_none_is_wanted():
    assert mine(random_differences(0, M, 30), corpus_of(LENGTHS, 30), windows=0)[WINDOWS].num_rows == 0


def test_tokens_that_the_corpus_skips_are_in_no_window():
    tokenizer = tokenizer_of(words_of(model_files.VOCAB))
    pair = ModelPair.of(model_files.build(seed=0), model_files.build(seed=1), tokenizer)
    sequences = corpus_of([12, 9, 3], model_files.VOCAB).sequences
    settings = METHOD.settings(topics=0, top_k=4, window_tokens=30)
    found = []
    for skipped_tokens in (0, 3):
        corpus = ProbeCorpus("skipping", sequences, 3, skip_first_tokens=skipped_tokens)
        [result] = paired_pass([pair], corpus, [(METHOD, settings)])
        found.append(result.tables[WINDOWS].to_pylist())
    whole, skipped = found
    assert {row["position"] for row in whole} == {1}
    assert {row["position"] for row in skipped} == {4}
    assert {(row["sequence"], row["n_tokens"]) for row in skipped} == {(0, 8), (1, 5)}


def test_toolkit_defect_the_sequence_likelihood_ratio_is_never_called():
    """It is on by default, and swapping the models negates the same windows."""
    corpus = corpus_of(LENGTHS, 30)
    difference_MV = random_differences(0, M, 30)
    there, back = (
        {(row["sequence"], row["position"]): row["log_likelihood_ratio"] for row in tables[WINDOWS].to_pylist()}
        for tables in (mine(sign * difference_MV, corpus) for sign in (1, -1))
    )
    assert len(there) > 0
    assert there == {key: -value for key, value in back.items()}
