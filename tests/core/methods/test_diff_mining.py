"""diff_mining: counts against plain references, tests over documents, topics, and the toolkit's defects."""

import itertools
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from transformers import Qwen3Config, Qwen3ForCausalLM

from diffing_core.corpus import ProbeCorpus
from diffing_core.findings import findings_table
from diffing_core.methods.base import Tables
from diffing_core.methods.diff_mining import METHOD, extremes
from diffing_core.methods.diff_mining import fold as fold_module
from diffing_core.methods.diff_mining.cleanup import is_punctuation
from diffing_core.methods.diff_mining.evidence import log_odds, q_values, sign_flip_p_values
from diffing_core.methods.diff_mining.extremes import largest
from diffing_core.methods.diff_mining.factorisation import updated
from diffing_core.methods.diff_mining.topics import PositionSample, entry_matrix, find_topics
from diffing_core.models import ModelPair
from diffing_core.paired_pass import paired_pass
from diffing_core.sampling import position_hash
from tests.mining_toys import (
    ORDERINGS,
    TOPICS,
    VOCABULARY,
    corpus_of,
    counts_by_sorting,
    folded,
    listed,
    mine,
    random_differences,
    tokenizer_of,
    words_of,
)

# Numbers


def test_a_toy_by_hand():
    difference_MV = np.array([[3, 2, 1, -1, -2, -3], [3, -1, 2, 1, -3, -2], [-3, 1, 2, 3, -1, -2.0]])
    tables = mine(difference_MV, [3], top_k=2, topics=0)
    percents = [(row["token_id"], row["ordering_value"]) for row in listed(tables, "top_k_occurring")]
    assert percents == [(2, 200 / 3), (0, 200 / 3), (3, 100 / 3), (1, 100 / 3)]
    shares = [(row["token_id"], row["ordering_value"]) for row in listed(tables, "fraction_positive")]
    assert shares == [(2, 1), (0, 2 / 3), (3, 2 / 3), (1, 2 / 3)]
    by_id = {row["token_id"]: row for row in tables[VOCABULARY].to_pylist()}
    assert by_id[5]["count_bottom"] == 3
    assert by_id[0]["count_bottom"] == 1
    assert by_id[0]["mean_difference"] == 1
    assert by_id[2]["mean_difference"] == pytest.approx(5 / 3)


@pytest.mark.parametrize(("vocab_size", "k"), [(60, 5), (300, 100), (1000, 100)])
def test_lists_equal_a_float64_reference_on_raw_logit_differences(vocab_size: int, k: int):
    difference_MV = random_differences(1, 90, vocab_size)
    tables = mine(difference_MV, [30, 25, 35], top_k=k, listed=vocab_size, topics=0)
    top_V, bottom_V = counts_by_sorting(difference_MV, k)
    fraction_V = (difference_MV > 0).mean(0)
    for name, value_V in (("top_k_occurring", 100 * top_V / 90), ("fraction_positive", fraction_V)):
        rows = listed(tables, name)
        order_V = np.lexsort((-difference_MV.astype(np.float64).mean(0), -value_V))
        expected = [token for token in order_V if value_V[token] > 0]
        assert [row["token_id"] for row in rows] == expected
        np.testing.assert_allclose([row["ordering_value"] for row in rows], value_V[expected], rtol=1e-12)
        assert [row["count_bottom"] for row in rows] == bottom_V[expected].tolist()
        means = [row["mean_difference"] for row in rows]
        np.testing.assert_allclose(means, difference_MV.astype(np.float64).mean(0)[expected], atol=1e-6)


def test_log_odds_follow_the_closed_form():
    raised_G, lowered_G = np.array([30, 5, 0, 10]), np.array([10, 5, 0, 30])
    odds_G, z_G = log_odds(raised_G, lowered_G, 60, 1.0)
    first = np.log(50 / (120 - 50)) - np.log(30 / (120 - 30))
    assert odds_G[0] == pytest.approx(first)
    assert z_G[0] == pytest.approx(first / np.sqrt(1 / 50 + 1 / 30))
    assert odds_G[1] == odds_G[2] == z_G[2] == 0
    swapped_G, swapped_z_G = log_odds(lowered_G, raised_G, 60, 1.0)
    np.testing.assert_array_equal(swapped_G, -odds_G)
    np.testing.assert_array_equal(swapped_z_G, -z_G)


@pytest.mark.parametrize("weight", [0.01, 1.0, 50.0])
def test_log_odds_stay_finite_where_every_document_raises_a_token(weight: float):
    odds_G, z_G = log_odds(np.array([7, 0]), np.array([0, 7]), 7, weight)
    assert np.isfinite([odds_G, z_G]).all()
    assert odds_G[0] == -odds_G[1] > 0
    assert z_G[0] > 0


def test_a_larger_prior_shrinks_the_log_odds():
    odds = [log_odds(np.array([20]), np.array([5]), 40, weight)[0][0] for weight in (0.01, 1, 100)]
    assert odds[0] > odds[1] > odds[2] > 0


def test_log_odds_count_documents_not_positions():
    """The same positions in one long document or in twenty: only the twenty say something."""
    difference_MV = random_differences(10, 200, 40)
    difference_MV[:, 5] = 4
    one, twenty = (
        next(row for row in listed(mine(difference_MV, lengths, top_k=4, topics=0), "log_odds") if row["token_id"] == 5)
        for lengths in ([200], [10] * 20)
    )
    assert one["count_top"] == twenty["count_top"] == 200
    assert (one["documents_raised"], twenty["documents_raised"]) == (1, 20)
    assert twenty["ordering_value"] > 3 * one["ordering_value"] > 0


def test_documents_are_counted_by_their_net_sign():
    difference_MV = np.zeros((6, 8))
    difference_MV[:, 1] = 3, 3, -3, -3, 3, -3  # document 0 raises it twice, 1 lowers it twice, 2 does neither
    difference_MV[:, 2] = -1
    [row] = [
        row
        for row in mine(difference_MV, [2, 2, 2], top_k=1, topics=0, whole_vocabulary=True)[VOCABULARY].to_pylist()
        if row["token_id"] == 1
    ]
    assert (row["count_top"], row["count_bottom"]) == (3, 3)
    assert (row["documents_raised"], row["documents_lowered"]) == (1, 1)
    assert row["log_odds"] == 0


def test_ties_across_the_cut_go_to_the_lowest_ids():
    values_NV = torch.tensor([[0, 2, 1, 1, 1, 1.0], [5, 4, 3, 2, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 1, 0, 2, 1]])
    ids_NK, values_NK = largest(values_NV, 3)
    assert [sorted(ids) for ids in ids_NK.tolist()] == [[1, 2, 3], [0, 1, 2], [0, 1, 2], [2, 4, 5]]
    assert values_NK.tolist() == [[2, 1, 1], [5, 4, 3], [1, 1, 1], [2, 1, 1]]


def test_ties_equal_a_stable_sort():
    values_NV = torch.from_numpy(np.random.default_rng(0).integers(4, size=(40, 200)).astype(np.float32))
    ids_NK, _ = largest(values_NV, 30)
    expected_NK = np.argsort(-values_NV.numpy(), axis=1, kind="stable")[:, :30]
    np.testing.assert_array_equal(np.sort(ids_NK, 1), np.sort(expected_NK, 1))


@pytest.mark.parametrize("on_processor", [True, False])
@pytest.mark.parametrize("levels", [3, 50, 10**6])
@pytest.mark.parametrize(("vocab_size", "k"), [(8192, 100), (8191, 100), (1003, 7), (997, 1), (120, 40), (30, 29), (2, 1)])
def test_the_largest_are_those_of_a_stable_sort(vocab_size: int, k: int, levels: int, on_processor: bool):
    """Few levels tie everywhere, many nowhere; sizes that groups divide and sizes that they do not; both searches."""
    search = largest if on_processor else extremes._searched
    draw = np.random.default_rng(0)
    values_NV = (draw.integers(levels, size=(20, vocab_size)) - levels // 2).astype(np.float32)
    values_NV[:5] = np.sort(values_NV[:5], axis=1)
    values_NV[5] = 0
    values_NV[6, ::3] = -0.0
    ids_NK, found_NK = search(torch.from_numpy(values_NV), k)
    expected_NK = np.argsort(-values_NV.astype(np.float64), axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(np.sort(ids_NK, 1), np.sort(expected_NK, 1))
    np.testing.assert_array_equal(found_NK, np.take_along_axis(values_NV, expected_NK, 1))
    np.testing.assert_array_equal(found_NK, np.take_along_axis(values_NV, ids_NK, 1))


def test_top_k_is_at_most_half_of_a_small_vocabulary():
    tables = mine(random_differences(0, 20, 8), [20], top_k=100, topics=0, whole_vocabulary=True)
    assert sum(tables[VOCABULARY]["count_top"].to_pylist()) == 20 * 4


def test_mean_centring_takes_each_positions_mean_away():
    difference_MV = random_differences(2, 50, 40)
    tables = mine(difference_MV, [50], difference="centred", top_k=5, topics=0, whole_vocabulary=True)
    centred_MV = difference_MV - difference_MV.mean(1, keepdims=True)
    rows = tables[VOCABULARY].to_pydict()
    np.testing.assert_allclose(rows["fraction_positive"], (centred_MV > 0).mean(0), atol=1e-12)
    np.testing.assert_allclose(rows["mean_difference"], centred_MV.mean(0), atol=1e-6)


# Contract


def test_identical_models_find_nothing():
    tables = mine(np.zeros((60, 40)), [20, 20, 20], whole_vocabulary=True)
    assert tables[ORDERINGS].num_rows == tables[TOPICS].num_rows == 0
    for column in METHOD.tables[1].columns:
        if column.role in {"effect", "count"}:
            assert set(tables[VOCABULARY][column.name].to_pylist()) == {0}
    assert set(tables[VOCABULARY]["q_value"].to_pylist()) == {None}
    assert METHOD.findings(tables, METHOD.settings()) == []
    assert METHOD.headline(tables) == {"n_raised_tokens": 0, "n_topics": 0}


def test_positions_without_difference_are_counted_but_add_no_counts():
    difference_MV = random_differences(3, 20, 40)
    difference_MV[::2] = 0
    tables = mine(difference_MV, [20], top_k=4, topics=0, whole_vocabulary=True)
    top_V, _ = counts_by_sorting(difference_MV[1::2], 4)
    assert tables[VOCABULARY]["count_top"].to_pylist() == top_V.tolist()
    assert listed(tables, "top_k_occurring")[0]["ordering_value"] == 100 * top_V.max() / 20


@pytest.mark.parametrize("difference", ["log_prob", "centred"])
def test_swapping_the_models_negates_signed_effects_and_swaps_the_ends(difference: str):
    difference_MV = np.round(random_differences(4, 60, 40), 1)  # rounded, so that ties occur
    options = {"top_k": 6, "whole_vocabulary": True, "difference": difference}
    there, back = (mine(sign * difference_MV, [10] * 6, **options)[VOCABULARY].to_pydict() for sign in (1, -1))
    assert there["count_top"] == back["count_bottom"]
    assert there["count_bottom"] == back["count_top"]
    for name in ("mean_difference", "log_odds", "log_odds_z"):
        assert there[name] == [-value for value in back[name]]
    assert there["q_value"] == back["q_value"]


def test_results_do_not_depend_on_how_many_positions_are_counted_together(monkeypatch):
    lengths = [9, 1, 14, 2, 30, 4, 7]
    difference_MV = random_differences(5, sum(lengths), 60)
    made = []
    for together in (1, 10, 10**6):
        monkeypatch.setattr(fold_module, "POSITIONS_TOGETHER", together)
        made.append(mine(difference_MV, lengths, top_k=8, whole_vocabulary=True, merge_variants=True, min_documents=1))
    for other in made[1:]:
        assert {name: table.to_pylist() for name, table in other.items()} == {
            name: table.to_pylist() for name, table in made[0].items()
        }


def test_results_do_not_depend_on_blocks_or_their_order():
    lengths = [9, 14, 7, 30, 12, 8]
    difference_MV = random_differences(5, sum(lengths), 80)
    options = {"top_k": 10, "nmf_positions": 40, "whole_vocabulary": True}
    documents = np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1])
    halves = [half for rows in reversed(documents) for half in np.array_split(rows, 2)]
    whole, cut = (mine(difference_MV, lengths, cuts=cuts, **options) for cuts in ([np.arange(sum(lengths))], halves))
    for name, table in whole.items():
        for column in table.column_names:
            left, right = (np.asarray(each[column].to_pylist()) for each in (table, cut[name]))
            if left.dtype.kind == "f":
                np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)
            else:
                assert left.tolist() == right.tolist(), column


def tiny_model(seed: int, vocab_size: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def mine_pair(pair: ModelPair, corpus: ProbeCorpus, tokens_per_batch: int) -> Tables:
    settings = METHOD.settings(top_k=10, nmf_positions=60)
    (result,) = paired_pass([pair], corpus, [(METHOD, settings)], tokens_per_batch=tokens_per_batch)
    assert result.error is None
    return result.tables


def test_batch_size_and_padding_change_nothing():
    tokenizer = tokenizer_of(words_of(120))
    pair = ModelPair.of(tiny_model(0, 120), tiny_model(1, 120), tokenizer)
    corpus = corpus_of([5, 9, 21, 13, 8, 30, 4, 17], 120)
    alone, together = (mine_pair(pair, corpus, size)[VOCABULARY].to_pydict() for size in (1, 4096))
    assert alone["token_id"] == together["token_id"]
    assert alone["count_top"] == together["count_top"]
    np.testing.assert_allclose(alone["mean_difference"], together["mean_difference"], atol=1e-5)


def test_one_model_against_itself_has_no_findings():
    tokenizer = tokenizer_of(words_of(120))
    model = tiny_model(0, 120)
    tables = mine_pair(ModelPair.of(model, model, tokenizer), corpus_of([9, 12], 120), 4096)
    assert METHOD.findings(tables, METHOD.settings()) == []


def test_two_runs_are_equal():
    difference_MV = random_differences(6, 60, 50)
    first, second = (mine(difference_MV, [20] * 3, top_k=8) for _ in range(2))
    assert all(table.equals(second[name]) for name, table in first.items())


def test_a_planted_token_is_first_and_holds_over_documents():
    difference_MV = random_differences(7, 200, 60)
    difference_MV[:, 17] = 4
    tables = mine(difference_MV, [10] * 20, top_k=6)
    found = METHOD.findings(tables, METHOD.settings())
    assert (found[0].kind, found[0].item) == ("token", "w17")
    assert found[0].q_value < 0.01
    assert found[0].p_value <= found[0].q_value
    assert {finding.kind for finding in found[-3:]} == {"topic"}
    assert "w17" in found[-3].item.split()
    assert findings_table(found).num_rows == len(found)
    assert METHOD.headline(tables)["top_token"] == "w17"
    assert METHOD.headline(tables)["top_token_percent"] == 100


def test_declaring_the_method_loads_no_heavy_library():
    code = (
        "import sys, diffing_core.methods.diff_mining;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'sklearn', 'scipy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# The test over documents


def test_p_values_are_never_below_the_exact_sign_flip_test():
    draw = np.random.default_rng(0)
    for n in (1, 2, 5, 9, 12):
        for _ in range(20):
            size_S = draw.integers(1, draw.choice([2, 5, 50]) + 1, size=n)
            net_S = size_S * draw.choice([-1, 1], size=n)
            signs_FS = np.array(list(itertools.product([-1, 1], repeat=n)))
            exact = (abs(signs_FS @ size_S) >= abs(net_S.sum())).mean()
            bound = sign_flip_p_values(np.array([net_S.sum()]), np.array([(net_S**2).sum()]))[0]
            assert exact <= bound * (1 + 1e-9)
            assert bound <= 1


def test_under_a_sign_flip_null_few_tokens_pass():
    draw = np.random.default_rng(1)
    n_false = 0
    for seed in range(10):
        difference_MV = random_differences(seed, 300, 100)
        difference_MV *= np.repeat(draw.choice([-1, 1], size=30), 10)[:, None]
        q = mine(difference_MV, [10] * 30, top_k=10, topics=0, whole_vocabulary=True)[VOCABULARY]["q_value"]
        n_false += sum(value < 0.05 for value in q.to_pylist())
    assert n_false <= 2


def test_one_long_document_cannot_make_a_token_significant():
    difference_MV = random_differences(8, 300, 60)
    difference_MV[:150, 9] = 5
    tables = mine(difference_MV, [150] + [10] * 15, top_k=6, topics=0)
    row = next(row for row in listed(tables, "top_k_occurring") if row["token_id"] == 9)
    assert row["rank"] == 1
    assert row["q_value"] > 0.2


def test_tokens_in_too_few_documents_are_not_tested():
    difference_MV = random_differences(9, 40, 60)
    tables = mine(difference_MV, [10] * 4, top_k=6, topics=0)
    assert set(tables[ORDERINGS]["q_value"].to_pylist()) == {None}


def test_q_values_are_taken_among_the_tested():
    q_G = q_values(np.array([0.01, np.nan, 0.02, 0.5]), np.array([True, False, True, True]))
    np.testing.assert_allclose(q_G, [0.03, np.nan, 0.03, 0.5])


# Topics


def two_block_sample(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ids and differences [P, K]: the first 60 positions raise tokens 0 … 9, the other 40 raise 10 … 19."""
    draw = np.random.default_rng(seed)
    first = np.stack([draw.permutation(10)[:6] for _ in range(60)])
    second = np.stack([10 + draw.permutation(10)[:6] for _ in range(40)])
    return np.concatenate([first, second]), draw.uniform(0.5, 1.5, size=(100, 6)).astype(np.float32)


@pytest.mark.parametrize("loss", ["frobenius", "kullback-leibler"])
@pytest.mark.parametrize("entries", ["magnitude", "binary"])
def test_topics_recover_block_structure(loss: str, entries: str):
    ids_PK, values_PK = two_block_sample()
    settings = METHOD.settings(topics=2, nmf_loss=loss, nmf_entries=entries)
    topics = find_topics(ids_PK, values_PK, np.ones(25, bool), settings)
    assert set(np.flatnonzero(topics.weight_TG[0] > 1e-3)) == set(range(10))
    assert set(np.flatnonzero(topics.weight_TG[1] > 1e-3)) == set(range(10, 20))
    np.testing.assert_allclose(topics.prevalence_T, [0.6, 0.4])
    assert topics.mass_T[0] > topics.mass_T[1]
    np.testing.assert_allclose(topics.weight_TG.sum(1), 1)
    np.testing.assert_allclose(topics.concentration_T, 1 - np.log(10) / np.log(20), atol=0.03)
    np.testing.assert_allclose(topics.cosine_TT, np.eye(2), atol=1e-3)
    if entries == "binary":
        np.testing.assert_allclose(topics.mass_T, [360, 240], rtol=0.05)


def overlapping_sample() -> tuple[np.ndarray, np.ndarray]:
    """Two groups of positions that share three tokens."""
    draw = np.random.default_rng(3)
    first = np.stack([draw.permutation(12)[:8] for _ in range(80)])
    second = np.stack([9 + draw.permutation(12)[:8] for _ in range(80)])
    return np.concatenate([first, second]), draw.uniform(0.5, 1.5, size=(160, 8)).astype(np.float32)


@pytest.mark.parametrize("loss", ["frobenius", "kullback-leibler"])
@pytest.mark.parametrize("entries", ["magnitude", "binary"])
def test_orthogonal_topics_recover_block_structure(loss: str, entries: str):
    ids_PK, values_PK = two_block_sample()
    settings = METHOD.settings(topics=2, nmf_loss=loss, nmf_entries=entries, nmf_orthogonality=1000)
    topics = find_topics(ids_PK, values_PK, np.ones(25, bool), settings)
    assert set(np.flatnonzero(topics.weight_TG[0] > 1e-3)) == set(range(10))
    assert set(np.flatnonzero(topics.weight_TG[1] > 1e-3)) == set(range(10, 20))
    np.testing.assert_allclose(topics.prevalence_T, [0.6, 0.4])


@pytest.mark.parametrize("loss", ["frobenius", "kullback-leibler"])
def test_orthogonality_gives_every_token_one_topic(loss: str):
    ids_PK, values_PK = overlapping_sample()
    plain, orthogonal = (
        find_topics(
            ids_PK, values_PK, np.ones(21, bool), METHOD.settings(topics=2, nmf_loss=loss, nmf_orthogonality=weight)
        )
        for weight in (0, 1000)
    )
    assert plain.cosine_TT[0, 1] > 0.1
    if loss == "frobenius":
        assert orthogonal.cosine_TT[0, 1] < 1e-3
        assert (orthogonal.weight_TG / orthogonal.weight_TG.sum(0)).max(0).min() > 0.99
    else:  # a token that occurs under both topics cannot have weight 0 in either
        assert orthogonal.cosine_TT[0, 1] < plain.cosine_TT[0, 1] / 5


@pytest.mark.parametrize("loss", ["frobenius", "kullback-leibler"])
def test_an_update_follows_the_dense_formula(loss: str):
    draw = np.random.default_rng(0)
    x_PC, h_PT, w_CT = draw.poisson(0.7, (30, 20)).astype(float), draw.random((30, 3)), draw.random((20, 3))
    if loss == "frobenius":
        numerator, denominator = x_PC @ w_CT, h_PT @ w_CT.T @ w_CT
    else:
        numerator, denominator = (x_PC / (h_PT @ w_CT.T)) @ w_CT, np.ones_like(x_PC) @ w_CT
    expected_PT = h_PT * numerator / (denominator + 7 * (h_PT.sum(1, keepdims=True) - h_PT))
    np.testing.assert_allclose(updated(csr_matrix(x_PC), h_PT, w_CT, loss, 7), expected_PT)


@pytest.mark.parametrize("loss", ["frobenius", "kullback-leibler"])
def test_a_vanishing_penalty_leaves_the_plain_fit(loss: str):
    ids_PK, values_PK = overlapping_sample()
    plain, hardly = (
        find_topics(
            ids_PK, values_PK, np.ones(21, bool),
            METHOD.settings(topics=2, nmf_loss=loss, nmf_iterations=2000, nmf_orthogonality=weight),
        )
        for weight in (0, 1e-9)
    )  # fmt: skip
    np.testing.assert_allclose(plain.weight_TG, hardly.weight_TG, atol=0.01)
    np.testing.assert_allclose(plain.mass_T, hardly.mass_T, rtol=0.02)


def test_topic_metrics_follow_their_formulas():
    """Against a factorisation that is known exactly: two topics of two tokens each, one twice as frequent."""
    ids_PK = np.array([[0, 1], [0, 1], [2, 3]])
    values_PK = np.array([[3, 1], [3, 1], [2, 2]], np.float32)
    topics = find_topics(ids_PK, values_PK, np.ones(4, bool), METHOD.settings(topics=2))
    np.testing.assert_allclose(topics.weight_TG, [[0.75, 0.25, 0, 0], [0, 0, 0.5, 0.5]], atol=1e-3)
    np.testing.assert_allclose(topics.mass_T, [8, 4], rtol=1e-3)
    np.testing.assert_allclose(topics.prevalence_T, [2 / 3, 1 / 3])
    entropies = [-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)), np.log(2)]
    np.testing.assert_allclose(topics.concentration_T, [1 - each / np.log(4) for each in entropies], atol=5e-3)
    np.testing.assert_allclose(topics.cosine_TT, np.eye(2), atol=1e-3)


def test_topics_that_share_tokens_are_similar():
    ids_PK, values_PK = overlapping_sample()
    topics = find_topics(ids_PK, values_PK, np.ones(21, bool), METHOD.settings(topics=2))
    first_G, second_G = topics.weight_TG
    expected = first_G @ second_G / np.linalg.norm(first_G) / np.linalg.norm(second_G)
    np.testing.assert_allclose(topics.cosine_TT, [[1, expected], [expected, 1]])


def test_topics_are_fitted_to_listable_raised_tokens_only():
    ids_PK, values_PK = two_block_sample()
    listable_G = np.arange(20) != 3
    values_PK[ids_PK == 4] = -1
    topics = find_topics(ids_PK, values_PK, listable_G, METHOD.settings())
    assert topics.n_tokens == 18
    assert not topics.weight_TG[:, [3, 4]].any()


def test_fewer_topics_where_the_matrix_has_fewer_rows_or_columns():
    one = find_topics(np.array([[3, 5]]), np.array([[1, 2]], np.float32), np.ones(6, bool), METHOD.settings())
    assert len(one) == 1
    assert one.prevalence_T.tolist() == [1]
    assert find_topics(np.array([[3]]), np.array([[-1.0]]), np.ones(6, bool), METHOD.settings()) is None


def test_the_position_sample_is_uniform_seeded_and_blind_to_order():
    sequence_M, position_M = np.divmod(np.arange(4000), 40)
    ids_MK = np.stack([sequence_M, position_M], 1)
    drawn = []
    for seed, order in ((0, np.arange(4000)), (0, np.random.default_rng(0).permutation(4000)), (1, np.arange(4000))):
        sample = PositionSample(500, 2, seed)
        for rows in np.array_split(order, 33):
            sample.add(sequence_M[rows], position_M[rows], ids_MK[rows], ids_MK[rows] / 7)
        drawn.append(sample.entries())
    np.testing.assert_array_equal(drawn[0][0], drawn[1][0])
    np.testing.assert_array_equal(drawn[0][1], drawn[1][1])
    assert not np.array_equal(drawn[0][0], drawn[2][0])
    ids_PK, values_PK = drawn[0]
    assert (ids_PK.shape, ids_PK.dtype, values_PK.dtype) == ((500, 2), np.int32, np.float32)
    assert len(np.unique(ids_PK, axis=0)) == 500
    assert abs(ids_PK.mean(0) - [49.5, 19.5]).max() < 4


def test_hashes_are_well_spread():
    sequence_M, position_M = np.divmod(np.arange(64_000), 64)
    bins = np.bincount((position_hash(sequence_M, position_M, 0) >> np.uint64(56)).astype(int), minlength=256)
    assert abs(bins - 250).max() < 90


# Defects of the toolkit's diff mining, none of which may come back


def test_toolkit_defect_memory_grows_with_the_corpus():
    sizes = []
    for n_documents in (40, 400):
        difference_MV = random_differences(0, 10 * n_documents, 50)
        fold = folded(difference_MV, [10] * n_documents, top_k=5, nmf_positions=50, cooccurrence_positions=50)
        del fold._context, fold._source, fold._windows._context  # they hold the corpus itself
        sizes.append(len(pickle.dumps(vars(fold))))
    assert sizes[1] < 1.5 * sizes[0]


def test_toolkit_defect_nmf_entries_are_collected_one_by_one():
    draw = np.random.default_rng(0)
    ids_PK, values_PK = two_block_sample()
    values_PK -= 0.8
    matrix, groups = entry_matrix(ids_PK, values_PK, np.ones(20, bool))
    slow_PG = np.zeros((100, 20))
    for row, (ids_K, values_K) in enumerate(zip(ids_PK, values_PK, strict=True)):
        for token, value in zip(ids_K, values_K, strict=True):
            slow_PG[row, token] += max(value, 0)
    np.testing.assert_allclose(matrix.toarray(), slow_PG[slow_PG.any(1)][:, groups])
    ids_PK = np.argsort(draw.random((1000, 800)), axis=1)
    values_PK = draw.random(ids_PK.shape, dtype=np.float32)
    began = time.process_time()
    matrix, _ = entry_matrix(ids_PK, values_PK, np.ones(800, bool))
    assert matrix.nnz == 800_000
    assert time.process_time() - began < 2  # about 0.15 s; the interpreted loop needs 4 s


@pytest.mark.parametrize(("binary", "expected"), [(False, [[5, 2], [0, 7]]), (True, [[1, 1], [0, 1]])])
def test_merged_variants_add_up_within_a_position(*, binary: bool, expected: list[list[int]]):
    group_PK, values_PK = np.array([[1, 3, 1], [3, 3, 0]]), np.array([[4, 2, 1], [3, 4, -1]], np.float32)
    matrix, groups = entry_matrix(group_PK, values_PK, np.ones(5, bool), merged=True, binary=binary)
    assert groups.tolist() == [1, 3]
    assert matrix.toarray().tolist() == expected


def test_toolkit_defect_nmf_is_unseeded():
    ids_PK, values_PK = two_block_sample()
    first, second = (find_topics(ids_PK, values_PK, np.ones(20, bool), METHOD.settings()) for _ in range(2))
    np.testing.assert_array_equal(first.weight_TG, second.weight_TG)


def test_toolkit_defect_seed_has_no_effect():
    difference_MV = random_differences(0, 80, 40)
    masses = {
        tuple(mine(difference_MV, [80], top_k=5, nmf_positions=20, seed=seed)[TOPICS]["mass"].to_pylist())
        for seed in range(3)
    }
    assert len(masses) == 3


def test_toolkit_defect_raw_logit_offsets_decide_signs():
    draw = np.random.default_rng(0)
    base_MV, tuned_MV, offset_M1 = draw.normal(size=(30, 40)), draw.normal(size=(30, 40)), draw.normal(size=(30, 1))
    whole = []
    for logits_MV in (tuned_MV, tuned_MV + 9 * offset_M1):
        sides = [torch.from_numpy(each).log_softmax(-1).numpy() for each in (base_MV, logits_MV)]
        tables = mine(sides[1] - sides[0], [30], base_MV=sides[0], top_k=5, topics=0, whole_vocabulary=True)
        whole.append(tables[VOCABULARY].to_pydict())
    assert whole[0]["fraction_positive"] == whole[1]["fraction_positive"]
    assert whole[0]["count_top"] == whole[1]["count_top"]
    np.testing.assert_allclose(whole[0]["mean_difference"], whole[1]["mean_difference"], atol=1e-5)
    raw_V, _ = counts_by_sorting(tuned_MV + 9 * offset_M1 - base_MV, 5)
    assert whole[0]["count_top"] == raw_V.tolist()  # the sets of the largest are the toolkit's


def test_toolkit_defect_clean_up_is_not_wired():
    words = ["<eos>", "\ufffd", "\n", *(f"w{index}" for index in range(3, 30))]
    difference_MV = random_differences(0, 60, 30)
    difference_MV[:, :4] = 5, 4, 3, 2
    tables = mine(difference_MV, [6] * 10, words=words, top_k=6, readable_only=True)
    assert not {0, 1, 2} & set(tables[ORDERINGS]["token_id"].to_pylist())
    assert not {0, 1, 2} & set(tables[VOCABULARY]["token_id"].to_pylist())
    assert listed(tables, "top_k_occurring")[0]["token_id"] == 3


def test_toolkit_defect_tokens_that_neither_model_uses_lead_the_lists():
    difference_MV = random_differences(0, 60, 30)
    difference_MV[:, 5:7] = 6
    base_MV = np.full((60, 30), np.log(1 / 30))
    base_MV[:, 5] = -30
    base_MV[:, 6] = np.log(1e-6) - 3  # below the limit in the base, above it in the tuned model
    everything, used = (
        mine(difference_MV, [60], base_MV=base_MV, top_k=6, min_probability=limit) for limit in (0, 1e-6)
    )
    assert [row["token_id"] for row in listed(everything, "top_k_occurring")[:2]] == [5, 6]
    assert listed(used, "top_k_occurring")[0]["token_id"] == 6
    assert 5 not in used[ORDERINGS]["token_id"].to_pylist()


def test_toolkit_defect_merging_variants_breaks_the_sort():
    words = ["<eos>", "Tea", "tea", "TEA", *(f"w{index}" for index in range(4, 30))]
    difference_MV = random_differences(0, 60, 30)
    difference_MV[:, 1:4] -= 9
    difference_MV[:30, 1], difference_MV[30:50, 2], difference_MV[50:, 3] = 9, 9, 9
    lengths = [10] * 6
    apart, merged = (
        mine(difference_MV, lengths, words=words, top_k=4, readable_only=True, merge_variants=merge)
        for merge in (False, True)
    )
    alone = {row["token"]: row for row in apart[VOCABULARY].to_pylist()}
    (row,) = [row for row in listed(merged, "top_k_occurring") if row["token"] == "tea"]
    assert row["token_id"] == 1  # the variant counted most, of equals the first
    for name in ("count_top", "count_bottom", "mean_base_probability"):
        assert row[name] == pytest.approx(sum(alone[word][name] for word in ("Tea", "tea", "TEA")))
    assert row["mean_difference"] == pytest.approx(difference_MV[:, 1:4].astype(float).mean(), abs=1e-6)
    assert len(listed(merged, "top_k_occurring")) == len({row["token"] for row in listed(merged, "top_k_occurring")})
    assert "tea" in merged[TOPICS]["top_words"].to_pylist()[0].split()


def test_merged_variants_are_tested_as_one_token():
    """In every document one variant is raised and another lowered: together, nothing happened."""
    words = ["<eos>", "Tea", "tea", *(f"w{index}" for index in range(3, 30))]
    difference_MV = random_differences(0, 100, 30)
    difference_MV[:, 1], difference_MV[:, 2] = 9, -9
    apart, merged = (
        mine(difference_MV, [10] * 10, words=words, top_k=4, merge_variants=merge, topics=0, whole_vocabulary=True)
        for merge in (False, True)
    )
    assert [row["q_value"] < 0.05 for row in apart[VOCABULARY].to_pylist()[1:3]] == [True, True]
    (row,) = [row for row in listed(merged, "top_k_occurring") if row["token"] == "tea"]
    assert (row["count_top"], row["count_bottom"], row["q_value"]) == (100, 100, None)
    assert row["documents_raised"] == row["documents_lowered"] == row["log_odds"] == 0


def test_the_vocabulary_table_keeps_every_variant_as_it_was_counted():
    words = ["<eos>", "Tea", "tea", "!!", *(f"w{index}" for index in range(4, 30))]
    difference_MV = random_differences(0, 100, 30)
    difference_MV[:, 1:4] = 9, 8, 7
    options = {"words": words, "top_k": 4, "readable_only": True, "topics": 0}
    apart, merged = (mine(difference_MV, [10] * 10, merge_variants=merge, **options) for merge in (False, True))
    assert next(row["token"] for row in listed(merged, "top_k_occurring")) == "tea"
    assert not {"Tea", "!!"} & {row["token"] for row in listed(merged, "top_k_occurring")}
    raw = {row["token"]: row for row in apart[VOCABULARY].to_pylist()}
    kept = {row["token"]: row for row in merged[VOCABULARY].to_pylist()}
    assert {"Tea", "tea"} <= kept.keys()
    assert all(kept[token] == raw[token] for token in kept.keys() & raw.keys())


@pytest.mark.parametrize(
    ("text", "expected"),
    [(".", True), (" ...", True), ("$", True), ("—", True), ("a.", False), ("😊", False), ("1", False), (" ", False)],
)
def test_punctuation_is_what_has_no_letter_digit_or_picture(text: str, *, expected: bool):
    assert is_punctuation(text) == expected


@pytest.mark.parametrize("drop", [True, False])
def test_punctuation_is_left_out_of_the_lists_only_if_asked(*, drop: bool):
    words = ["<eos>", ".", *(f"w{index}" for index in range(2, 30))]
    difference_MV = random_differences(0, 60, 30)
    difference_MV[:, 1] = 9
    tables = mine(difference_MV, [6] * 10, words=words, top_k=6, drop_punctuation=drop, whole_vocabulary=True)
    assert ("." in tables[ORDERINGS]["token"].to_pylist()) != drop
    assert ("." in " ".join(tables[TOPICS]["top_words"].to_pylist())) != drop
    assert tables[VOCABULARY].to_pylist()[1]["count_top"] == 60


def test_findings_show_first_what_is_raised_rather_than_lowered():
    """A token that is as often among the smallest occurs most, and comes after those that documents agree on."""
    difference_MV = random_differences(11, 200, 60)
    difference_MV[:, 8] = np.where(np.arange(200) % 20 < 10, 9, -9)
    difference_MV[:, 9] = np.where(np.arange(200) % 20 < 9, 8, 0)
    found = METHOD.findings(mine(difference_MV, [10] * 20, top_k=3, topics=0), METHOD.settings())
    items = [finding.item for finding in found]
    scores = {finding.item: finding.score for finding in found}
    assert scores["w8"] == 50 > scores["w9"]
    assert items.index("w9") < items.index("w8")
