"""Constancy of the activation difference: closed forms, plain loops, simulation, and plain forwards."""

from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from diffing_core.blocks import StreamContext
from diffing_core.corpus import ROLES, ProbeCorpus, ProbeSequence
from diffing_core.methods import get_method
from diffing_core.methods.readable_traces import (
    EIGEN_SHARES,
    ReadableTracesFold,
    ReadableTracesSettings,
    constancy,
    jaccard,
    sampled_sequences,
    signs,
)
from diffing_core.models import ModelPair, Subject
from diffing_core.paired_pass import paired_pass
from diffing_core.pairs import Pair
from tests import model_files
from tests.model_files import LAYERS, VOCAB, WIDTH

TRACES = get_method("readable_traces")
LENGTHS = (12, 9, 3, 12, 7, 5)


def texts(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> tuple[ProbeSequence, ...]:
    draw = np.random.default_rng(seed)
    return tuple(
        ProbeSequence(draw.integers(2, VOCAB, n).astype(np.int32), np.zeros(n, np.int8), np.zeros(n, bool)) for n in lengths
    )


def chat(seed: int) -> ProbeSequence:
    """Three tokens of the user, two of the template, four of the answer."""
    tokens_T = np.random.default_rng(seed).integers(2, VOCAB, 9).astype(np.int32)
    user, assistant = ROLES.index("user"), ROLES.index("assistant")
    return ProbeSequence(tokens_T, np.repeat([user, assistant], [3, 6]).astype(np.int8), np.isin(np.arange(9), [3, 4]))


def corpus(*sequences: ProbeSequence, skip: int = 0) -> ProbeCorpus:
    sequences = sequences or texts()
    return ProbeCorpus("probe", sequences, len(sequences), skip_first_tokens=skip)


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    sides = (Subject.of(model_files.build(seed=seed)) for seed in (0, 1))
    return ModelPair(*sides, model_files.tokenizer(), Pair("m", "o"), VOCAB)


def run(pair: ModelPair, probe: ProbeCorpus | None = None, **settings: Any) -> pl.DataFrame:
    asked = [(TRACES, ReadableTracesSettings(**settings))]
    [result] = paired_pass([pair], probe or corpus(), asked, tokens_per_batch=30)
    assert result.error is None, result.error
    return pl.from_arrow(result.tables["readable_traces"])


def measured(delta_SD: np.ndarray, flips: int = 1000, in_first_S: np.ndarray | None = None) -> dict[str, Any]:
    in_first_S = np.arange(len(delta_SD)) % 2 == 0 if in_first_S is None else in_first_S
    return constancy(delta_SD @ delta_SD.T, in_first_S, signs(flips, len(delta_SD), 0))


def cosine(left_D: np.ndarray, right_D: np.ndarray) -> float:
    return float(left_D @ right_D / np.linalg.norm(left_D) / np.linalg.norm(right_D))


# ---- statistics ---------------------------------------------------------------------------------------------------


def test_one_vector_added_to_every_text_is_wholly_bias() -> None:
    vector_D = np.array([3.0, 0, 4])
    found = measured(np.tile(vector_D, (12, 1)))
    for name in ("bias_fraction", "unbiased_bias_fraction", "split_half_cosine", "leave_one_out_cosine"):
        assert found[name] == pytest.approx(1), name
    assert (found["norm"], found["unbiased_squared_norm"]) == (pytest.approx(5), pytest.approx(25))
    np.testing.assert_allclose(found["eigen_shares"], [1, 0, 0, 0, 0], atol=1e-12)
    assert found["p_value"] < 0.01


def test_orthogonal_differences_have_no_constant_part() -> None:
    found = measured(2 * np.eye(8))
    assert found["bias_fraction"] == pytest.approx(1 / 8)
    assert found["unbiased_squared_norm"] == pytest.approx(0, abs=1e-12)
    assert found["leave_one_out_cosine"] == found["split_half_cosine"] == 0
    assert found["p_value"] == 1, "every sign pattern gives the same length"
    np.testing.assert_allclose(found["eigen_shares"], [1 / 8] * EIGEN_SHARES)


@pytest.mark.parametrize("seed", range(4))
def test_the_gram_matrix_gives_what_loops_over_vectors_give(seed: int) -> None:
    draw = np.random.default_rng(seed)
    delta_SD = draw.normal(size=(9, 5)) + draw.normal(size=5)
    in_first_S = draw.random(9) < 0.5
    found, mean_D, n = measured(delta_SD, 200, in_first_S), delta_SD.mean(0), 9
    square = (delta_SD**2).sum(1).mean()
    assert found["norm"] == pytest.approx(np.linalg.norm(mean_D))
    assert found["bias_fraction"] == pytest.approx(mean_D @ mean_D / square)
    unbiased = sum(delta_SD[i] @ delta_SD[j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    assert found["unbiased_squared_norm"] == pytest.approx(unbiased)
    assert found["unbiased_bias_fraction"] == pytest.approx(unbiased / square)
    assert found["split_half_cosine"] == pytest.approx(cosine(delta_SD[in_first_S].mean(0), delta_SD[~in_first_S].mean(0)))
    others = [cosine(delta_SD[i], np.delete(delta_SD, i, 0).mean(0)) for i in range(n)]
    assert found["leave_one_out_cosine"] == pytest.approx(np.mean(others))
    values = np.linalg.svd(delta_SD, compute_uv=False) ** 2
    np.testing.assert_allclose(found["eigen_shares"], values / values.sum(), atol=1e-12)
    lengths = [np.linalg.norm(sign_S @ delta_SD) for sign_S in signs(200, n, 0)]
    assert found["p_value"] == pytest.approx(np.mean(np.asarray(lengths) >= lengths[0] * (1 - 1e-9)))


def test_the_estimate_is_unbiased_where_the_plain_fraction_is_not() -> None:
    draw = np.random.default_rng(0)
    mu_D = np.array([0.3, 0, 0, 0])
    found = [measured(mu_D + draw.normal(size=(10, 4)), 1) for _ in range(4000)]
    assert np.mean([each["unbiased_squared_norm"] for each in found]) == pytest.approx(0.09, abs=0.02)
    assert np.mean([each["norm"] ** 2 for each in found]) == pytest.approx(0.09 + 4 / 10, abs=0.02)


def test_p_values_are_uniform_where_differences_are_symmetric_about_zero() -> None:
    draw = np.random.default_rng(0)
    scale_S1 = draw.exponential(size=(15, 1))
    p_values = np.asarray([measured(scale_S1 * draw.normal(size=(15, 6)), 99)["p_value"] for _ in range(1000)])
    for level in (0.05, 0.2, 0.5):
        assert (p_values <= level).mean() == pytest.approx(level, abs=0.05)


def test_one_text_is_no_evidence() -> None:
    found = measured(np.ones((1, 3)))
    assert found["p_value"] == 1
    nulls = ("unbiased_squared_norm", "unbiased_bias_fraction", "split_half_cosine", "leave_one_out_cosine")
    assert [found[name] for name in nulls] == [None] * 4


def test_jaccard_of_lists() -> None:
    assert jaccard(["a", "b", "c"], ["c", "d"]) == 1 / 4
    assert jaccard([], []) == 0


# ---- sample -------------------------------------------------------------------------------------------------------


def test_sample_is_of_distinct_texts_and_does_not_depend_on_their_order() -> None:
    sequences = texts((8,) * 30)
    chosen = {tuple(sequences[index].token_T) for index in sampled_sequences(corpus(*sequences, *sequences[:10]), 12)}
    turned = corpus(*reversed(sequences))
    assert len(chosen) == 12
    assert chosen == {tuple(turned.sequences[index].token_T) for index in sampled_sequences(turned, 12)}
    assert len(sampled_sequences(corpus(*sequences, *sequences), 100)) == 30


def test_texts_that_are_skipped_whole_are_no_samples() -> None:
    assert sorted(sampled_sequences(corpus(skip=5), 100)) == [0, 1, 3, 4]


def test_results_do_not_depend_on_the_order_of_texts(pair: ModelPair) -> None:
    forth, back = (run(pair, corpus(*order)).sort(TRACES.tables[0].grain) for order in (texts(), texts()[::-1]))
    for name in ("bias_fraction", "split_half_cosine", "leave_one_out_cosine", "token_agreement", "p_value"):
        np.testing.assert_allclose(forth[name].cast(float).to_numpy(), back[name].cast(float).to_numpy(), atol=1e-5)
    assert forth["tokens_half_1"].to_list() == back["tokens_half_1"].to_list()


def test_memory_is_bounded_by_the_setting_and_not_by_the_corpus(pair: ModelPair) -> None:
    probe = corpus(*texts((4,) * 900))
    context = StreamContext(pair.base, pair.tuned, pair.tokenizer, probe, n_layers=LAYERS, d_model=WIDTH, vocab_size=VOCAB)
    few, small = ({"max_sequences": 100}, {"max_sequences": 900, "memory_mb": 1})
    held = [ReadableTracesFold(context, ReadableTracesSettings(**settings))._delta_LSGD for settings in (few, small)]
    assert held[0].shape[1] == 100
    assert 100 < held[1].shape[1] < 900
    assert held[1].nbytes <= 2**20


# ---- whole --------------------------------------------------------------------------------------------------------


def differences(pair: ModelPair, probe: ProbeCorpus, layer: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """δ and h_base of every token that the method is shown, [T, D] per text, from plain forwards in float64."""
    deltas, bases = [], []
    for sequence in probe.sequences:
        token_1T = torch.from_numpy(sequence.token_T)[None].long()
        base_TD, tuned_TD = (
            side.module(token_1T, output_hidden_states=True).hidden_states[layer + 1][0].double().numpy()
            for side in (pair.base, pair.tuned)
        )
        deltas.append((tuned_TD - base_TD)[probe.skip_first_tokens :])
        bases.append(base_TD[probe.skip_first_tokens :])
    return deltas, bases


def assert_row(row: dict[str, Any], delta_SD: np.ndarray, base_norm: float, order: np.ndarray) -> None:
    expected = measured(delta_SD[order])
    assert row["n_sequences"] == len(delta_SD)
    assert row["relative_norm"] == pytest.approx(np.linalg.norm(delta_SD.mean(0)) / base_norm, rel=1e-4)
    for name in ("norm", "bias_fraction", "unbiased_squared_norm", "leave_one_out_cosine", "p_value"):
        assert row[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-6), name
    np.testing.assert_allclose(row["eigen_shares"], expected["eigen_shares"], atol=1e-5)


@pytest.mark.parametrize("skip", [0, 2])
def test_a_sample_is_a_texts_mean_over_its_tokens_or_its_difference_at_the_position(pair: ModelPair, skip: int) -> None:
    probe = corpus(skip=skip)
    frame = run(pair, probe, positions=4)
    order = sampled_sequences(probe, 100)
    for layer in range(LAYERS - 1):
        rows = {row["position"]: row for row in frame.filter(pl.col("layer") == layer).to_dicts()}
        assert set(rows) == {None, *range(skip, 4)}
        deltas, bases = differences(pair, probe, layer)
        mean_norm = np.mean([np.linalg.norm(base_TD, axis=1).mean() for base_TD in bases])
        assert_row(rows[None], np.stack([delta_TD.mean(0) for delta_TD in deltas]), mean_norm, order)
        for position in range(skip, 4):
            long_enough = [index for index in order if len(deltas[index]) > position - skip]
            at = position - skip
            delta_SD = np.stack([deltas[index][at] for index in long_enough])
            base_norm = np.mean([np.linalg.norm(bases[index][at]) for index in long_enough])
            assert_row(rows[position], delta_SD, base_norm, np.arange(len(long_enough)))


def test_chats_are_read_around_the_first_token_of_the_answer(pair: ModelPair) -> None:
    chats = [chat(seed) for seed in range(6)]
    rows = run(pair, corpus(*chats), positions=2, before_answer=2, layers=(1,))
    assert rows.select("counted_from", "position").rows() == [("all", None), *(("answer", p) for p in range(-2, 2))]
    assert set(rows["n_sequences"]) == {6}


def test_halves_agree_on_the_tokens_of_a_planted_direction(pair: ModelPair) -> None:
    """A vector added to every embedding is read by both halves; the swap of base and tuned reads the other end."""
    model = model_files.build(seed=0, tie_word_embeddings=False)
    moved = model_files.build(seed=0, tie_word_embeddings=False)
    direction_D = torch.nn.functional.normalize(model.lm_head.weight[11] / model.model.norm.weight, dim=0)
    with torch.no_grad():
        moved.model.embed_tokens.weight += 30 * direction_D
    planted = ModelPair(Subject.of(model), Subject.of(moved), pair.tokenizer, pair.pair, VOCAB)
    everywhere = run(planted, layers=(0,), top_tokens=5).row(by_predicate=pl.col("position").is_null(), named=True)
    assert everywhere["token_agreement"] > 0.6
    assert everywhere["tokens"][0] == "w11"
    assert everywhere["unbiased_bias_fraction"] > 0.9
    assert everywhere["split_half_cosine"] > 0.9


def test_identical_models_say_nothing(pair: ModelPair) -> None:
    same = ModelPair(pair.base, pair.base, pair.tokenizer, pair.pair, VOCAB)
    frame = run(same)
    assert set(frame["p_value"]) == {1.0}
    assert frame.select("tokens", "tokens_half_1", "tokens_half_2").unique().rows() == [([], [], [])]


def test_findings_are_the_tokens_that_both_halves_name(pair: ModelPair) -> None:
    settings = ReadableTracesSettings(shown=10, shown_layers=(0.5, 1.0), positions=2)
    [result] = paired_pass([pair], corpus(), [(TRACES, settings)])
    rows = {(row["layer"], row["position"]): row for row in result.tables["readable_traces"].to_pylist()}
    shown = TRACES.findings(result.tables, settings)
    assert shown
    assert {finding.layer for finding in shown} <= {1, 2}
    for finding in shown:
        row = rows[finding.layer, finding.position]
        assert finding.item in row["tokens"]
        assert finding.item in row["tokens_half_1"]
        assert finding.item in row["tokens_half_2"]
        assert (finding.score, finding.p_value) == (row["unbiased_bias_fraction"], row["p_value"])
        assert finding.score > 0


def test_findings_come_from_the_layers_that_were_read_wherever_they_lie(pair: ModelPair) -> None:
    settings = ReadableTracesSettings(layers=(0,), positions=2)
    [result] = paired_pass([pair], corpus(), [(TRACES, settings)])
    assert {finding.layer for finding in TRACES.findings(result.tables, settings)} == {0}
