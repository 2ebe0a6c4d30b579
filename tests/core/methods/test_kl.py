"""KL and its relatives against closed forms and against plain forwards in float64."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal

from diffing_core import blocks as blocks_module
from diffing_core.blocks import Side, TokenBlock
from diffing_core.corpus import ROLES, ProbeCorpus, ProbeSequence
from diffing_core.methods import get_method
from diffing_core.methods.kl import fold as fold_module
from diffing_core.methods.kl.declaration import KlSettings
from diffing_core.methods.kl.measures import DIVERGENCES, Measures, measure
from diffing_core.models import ModelPair, Subject
from diffing_core.paired_pass import paired_pass
from diffing_core.pairs import Pair
from tests import model_files
from tests.model_files import VOCAB

LENGTHS = (12, 9, 5, 12, 7, 1)
KL = get_method("kl")
LN2 = float(np.log(2))


def block(base_NV: Any, tuned_NV: Any, next_N: Sequence[int] | None = None) -> TokenBlock:
    """A block whose sides read these logits."""
    base_NV, tuned_NV = (torch.as_tensor(logits) for logits in (base_NV, tuned_NV))
    n, vocab = base_NV.shape
    base, tuned = (Side({0: logits_NV}, 0, lambda states: states, vocab) for logits_NV in (base_NV, tuned_NV))
    index_N, next_N = np.arange(n), torch.tensor(next_N or [-1] * n)
    return TokenBlock(
        torch.zeros(n), next_N, 0 * index_N, index_N, np.zeros(n, np.int8), np.zeros(n, bool), base, tuned
    )


def block_of(base: Sequence[float], tuned: Sequence[float]) -> TokenBlock:
    """One token with these two distributions."""
    return block(*(torch.tensor([values], dtype=torch.float64).log().float() for values in (base, tuned)))


def measured(shown: TokenBlock) -> dict[str, np.ndarray]:
    """The numbers per token of one block."""
    return {name: values_N.numpy() for name, values_N in whole(shown).token.items()}


def whole(shown: TokenBlock) -> Measures:
    return measure(shown.base, shown.tuned, shown.logprob_difference_NV, shown.next_N)


def exact(base_NV: torch.Tensor, tuned_NV: torch.Tensor) -> dict[str, torch.Tensor]:
    """The four measures in float64, by another road than the method's."""
    q, p = (logits_NV.double().softmax(-1) for logits_NV in (base_NV, tuned_NV))
    m = (p + q) / 2

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.xlogy(a, a / b).nan_to_num(0).sum(-1)

    js_N = (kl(p, m) + kl(q, m)) / 2
    return {
        "kl_nats": kl(p, q),
        "reverse_kl_nats": kl(q, p),
        "js_nats": js_N,
        "total_variation": (p - q).abs().sum(-1) / 2,
    }


def corpus(lengths: Sequence[int] = LENGTHS, skip: int = 0, seed: int = 0) -> ProbeCorpus:
    """Few different tokens, so that contexts repeat."""
    draw = np.random.default_rng(seed)
    sequences = tuple(
        ProbeSequence(
            draw.integers(2, 9, n).astype(np.int32), draw.integers(0, 3, n).astype(np.int8), draw.random(n) < 0.5
        )
        for n in lengths
    )
    return ProbeCorpus("probe", sequences, len(sequences), skip_first_tokens=skip)


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    base, tuned = (Subject.of(model_files.build(seed=seed), revision=str(seed)) for seed in (0, 1))
    return ModelPair(base, tuned, model_files.tokenizer(), Pair("m", "o"), VOCAB)


def run(
    pair: ModelPair, probe: ProbeCorpus | None = None, budget: int = 4096, **settings: Any
) -> dict[str, pl.DataFrame]:
    [result] = paired_pass([pair], probe or corpus(), [(KL, KlSettings(**settings))], tokens_per_batch=budget)
    assert result.error is None, result.error
    return {name: pl.from_arrow(table) for name, table in result.tables.items()}


def logits(pair: ModelPair, tokens_T: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Both models' logits of one sequence alone."""
    return tuple(side.module(torch.from_numpy(tokens_T)[None].long()).logits[0] for side in (pair.base, pair.tuned))


def by_hand(pair: ModelPair, probe: ProbeCorpus) -> pl.DataFrame:
    """One row per token that the method is shown, from float64."""
    frames = []
    for index, sequence in enumerate(probe.sequences):
        base_NV, tuned_NV = logits(pair, sequence.token_T)
        facts = {"sequence": index, "position": np.arange(len(sequence)), "token_id": sequence.token_T, "role": sequence.role_T,
                 "is_template": sequence.template_T, "next_id": np.append(sequence.token_T[1:], -1),
                 "differs": (base_NV.argmax(-1) != tuned_NV.argmax(-1)).numpy()}  # fmt: skip
        measured = {name: values.numpy() for name, values in exact(base_NV, tuned_NV).items()}
        log_p, log_q = (side_NV.double().log_softmax(-1) for side_NV in (tuned_NV, base_NV))
        measured |= {f"{side}_entropy_nats": -(each.exp() * each).sum(-1).numpy() for side, each in (("base", log_q), ("tuned", log_p))}
        true_N = torch.from_numpy(sequence.token_T[1:]).long()[:, None]
        facts["delta_logprob"] = [*(log_p - log_q)[:-1].gather(1, true_N)[:, 0].tolist(), None]
        frames.append(pl.DataFrame(facts | measured, schema_overrides={"sequence": pl.Int32, "position": pl.Int32}))
    return pl.concat(frames).filter(pl.col("position") >= probe.skip_first_tokens)


# ---- closed forms -------------------------------------------------------------------------------------------------


def test_two_distributions_over_three_tokens_by_hand() -> None:
    found = whole(block_of([0.5, 0.25, 0.25], [0.25, 0.25, 0.5]))
    token, contribution_V = found.token, found.vocabulary["contribution"]
    js = 0.5 * (0.25 * np.log(0.25 / 0.375) + 0.5 * np.log(0.5 / 0.375))
    assert token["kl_nats"][0] == pytest.approx(0.25 * LN2, rel=1e-6)
    assert token["reverse_kl_nats"][0] == pytest.approx(0.25 * LN2, rel=1e-6)
    assert token["js_nats"][0] == pytest.approx(2 * js, rel=1e-5)
    assert token["total_variation"][0] == pytest.approx(0.25, rel=1e-6)
    np.testing.assert_allclose(contribution_V, [-0.25 * LN2, 0, 0.5 * LN2], atol=1e-7)


def test_direction_is_tuned_against_base() -> None:
    found = measured(block_of([0.9, 0.1], [0.5, 0.5]))
    assert found["kl_nats"][0] == pytest.approx(0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(5), rel=1e-6)
    assert found["reverse_kl_nats"][0] == pytest.approx(0.9 * np.log(0.9 / 0.5) + 0.1 * np.log(0.2), rel=1e-5)


def test_entropies_favourites_and_the_true_token_by_hand() -> None:
    base_NV, tuned_NV = (torch.tensor([values]).log() for values in ([0.5, 0.25, 0.25], [0.125, 0.125, 0.75]))
    shown = whole(block(base_NV, tuned_NV, [1]))
    assert shown.token["base_entropy_nats"][0] == pytest.approx(1.5 * LN2, rel=1e-6)
    assert shown.token["tuned_entropy_nats"][0] == pytest.approx(0.75 * LN2 - 0.75 * np.log(0.75), rel=1e-6)
    assert shown.token["delta_logprob"][0] == pytest.approx(-LN2, rel=1e-6)
    assert shown.token["gained_nats"][0] == pytest.approx(0.75 * np.log(3), rel=1e-6)
    assert shown.token["lost_nats"][0] == pytest.approx(-0.125 * np.log(4), rel=1e-6)
    assert {name: int(tokens_N[0]) for name, tokens_N in shown.favoured.items()} == {
        "base": 0, "tuned": 2, "gained": 2, "lost": 0,
    }  # fmt: skip


@pytest.mark.parametrize("scale", [1e-3, 0.1, 3.0, 30.0])
def test_random_logits_agree_with_float64(scale: float) -> None:
    base_NV = 4 * torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
    tuned_NV = base_NV + scale * torch.randn(200, 50, generator=torch.Generator().manual_seed(1))
    found = measured(block(base_NV, tuned_NV))
    for name, expected_N in exact(base_NV, tuned_NV).items():
        np.testing.assert_allclose(found[name], expected_N, atol=3e-7, rtol=3e-4, err_msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_that_both_models_rule_out_change_nothing(dtype: torch.dtype) -> None:
    base_NV, tuned_NV = (torch.randn(9, 20, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (0, 1))
    ruled_out_NV = torch.full((9, 5), torch.finfo(dtype).min, dtype=dtype)
    plain = measured(block(base_NV, tuned_NV))
    masked = measured(block(*(torch.cat([side_NV, ruled_out_NV], 1) for side_NV in (base_NV, tuned_NV))))
    for name, values_N in plain.items():
        np.testing.assert_allclose(masked[name], values_N, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("low", [-1e4, -1e6, -1e9, float(np.finfo(np.float32).min)])
def test_what_one_model_alone_rules_out_costs_js_no_digits(low: float) -> None:
    base_NV, tuned_NV = (torch.randn(9, 50, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    base_NV[:, :5] = low
    p_NV, q_NV = (side_NV.double().softmax(-1) for side_NV in (base_NV, tuned_NV))
    m_NV = (p_NV + q_NV) / 2
    expected_N = (torch.xlogy(p_NV, p_NV / m_NV) + torch.xlogy(q_NV, q_NV / m_NV)).sum(-1) / 2
    for one, other in ((base_NV, tuned_NV), (tuned_NV, base_NV)):
        np.testing.assert_allclose(measured(block(one, other))["js_nats"], expected_N, rtol=1e-5)


def test_bounds_and_symmetry() -> None:
    base_NV, tuned_NV = (30 * torch.randn(500, 20, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    forth = measured(block(base_NV, tuned_NV))
    back = measured(block(tuned_NV, base_NV))
    np.testing.assert_allclose(forth["js_nats"], back["js_nats"], rtol=1e-6, atol=4e-7)
    np.testing.assert_allclose(forth["total_variation"], back["total_variation"], rtol=1e-6)
    np.testing.assert_allclose(forth["kl_nats"], back["reverse_kl_nats"], rtol=1e-6)
    assert all(forth[name].min() >= 0 for name in DIVERGENCES)
    assert 0.9 * LN2 < forth["js_nats"].max() <= LN2 + 1e-6
    assert 0.9 < forth["total_variation"].max() <= 1 + 1e-6


def test_distributions_without_overlap_are_finite() -> None:
    found = measured(block([[300.0, -300.0]], [[-300.0, 300.0]]))
    assert found["kl_nats"][0] == pytest.approx(600)
    assert found["js_nats"][0] == pytest.approx(LN2, rel=1e-4)
    assert found["total_variation"][0] == 1


@pytest.mark.parametrize("step", [0.5, 1e-2, 1e-3])
def test_a_small_divergence_of_a_large_vocabulary_is_no_rounding_error(step: float) -> None:
    """Float32 probabilities of 150 thousand tokens add up to 1 only within 1e-5: more than the smallest KL here."""
    draw = torch.Generator().manual_seed(0)
    base_NV = 3 * torch.randn(8, 150_000, generator=draw)
    tuned_NV = base_NV + step * torch.randn(8, 150_000, generator=draw)
    found, expected = measured(block(base_NV, tuned_NV)), exact(base_NV, tuned_NV)
    for name in DIVERGENCES:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=3e-8 if "kl" in name else 1e-6, err_msg=name)


def test_equal_logits_give_exactly_zero() -> None:
    logits_NV = 50 * torch.randn(100, 30, generator=torch.Generator().manual_seed(0))
    found = whole(block(logits_NV, logits_NV.clone()))
    assert not any(found.token[name].any() for name in (*DIVERGENCES, "delta_logprob", "gained_nats", "lost_nats"))
    assert not found.vocabulary["contribution"].any()


def test_a_constant_added_to_all_logits_changes_nothing() -> None:
    base_NV, tuned_NV = (torch.randn(100, 30, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    plain = measured(block(base_NV, tuned_NV))
    shifted = measured(block(base_NV + 64, tuned_NV - 32))
    for name in DIVERGENCES:
        np.testing.assert_allclose(shifted[name], plain[name], rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 0.1, 0.02])
def test_kl_is_computed_in_float32_for_bf16_models_and_never_negative(scale: float) -> None:
    """The toolkit's softmax in bf16: at 0.02, 55 % of the tokens came out negative and the mean twice as large."""
    draw = torch.Generator().manual_seed(0)
    base_NV = (3 * torch.randn(400, 200, generator=draw)).bfloat16()
    tuned_NV = (base_NV.float() + scale * torch.randn(400, 200, generator=draw)).bfloat16()
    found = measured(block(base_NV, tuned_NV))
    expected_N = exact(base_NV, tuned_NV)["kl_nats"].numpy()
    assert found["kl_nats"].min() >= 0
    np.testing.assert_allclose(found["kl_nats"], expected_N, atol=1e-6, rtol=1e-4)
    assert found["kl_nats"].mean() == pytest.approx(expected_N.mean(), rel=1e-3)


# ---- tiny models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [0, 2])
def test_tables_equal_a_computation_by_hand(pair: ModelPair, skip: int) -> None:
    probe = corpus(skip=skip)
    tables, tokens = run(pair, probe, budget=20), by_hand(pair, probe)
    close = {"check_exact": False, "rel_tol": 1e-3, "abs_tol": 1e-5, "check_dtypes": False}
    shown = ["sequence", "position", *DIVERGENCES]
    assert_frame_equal(tables["kl_tokens"].select(shown), tokens.select(shown), **close)
    means = [pl.col(name).mean() for name in (*DIVERGENCES, "delta_logprob", "base_entropy_nats", "tuned_entropy_nats")]
    means.insert(len(DIVERGENCES), pl.col("differs").mean().alias("argmax_differs"))
    largest = pl.col("kl_nats").max().alias("max_kl_nats")
    by_sequence = tokens.group_by("sequence").agg(pl.len().alias("n_tokens"), *means[:4], largest, *means[4:])
    assert_frame_equal(tables["kl_sequences"], by_sequence.sort("sequence"), **close)
    places = tokens.with_columns(pl.col("role").map_elements(lambda role: ROLES[role], pl.String).alias("speaker"))
    grain = ["position", "speaker", "is_template"]
    by_place = places.group_by(grain).agg(pl.len().alias("n_tokens"), *means)
    assert_frame_equal(tables["kl_positions"].sort(grain), by_place.sort(grain), **close)
    for place, column in (("read", "token_id"), ("next", "next_id")):
        hot = (
            tokens.filter(pl.col(column) >= 0)
            .group_by(pl.col(column).alias("token_id"))
            .agg(pl.len().alias("n_contexts"), pl.col("kl_nats").mean(), pl.col("kl_nats").std(ddof=0).alias("sd_kl_nats"))
            .filter(pl.col("n_contexts") >= 3)
        )
        found = tables["kl_hot_tokens"].filter(pl.col("place") == place).drop("place", "token")
        assert_frame_equal(found, hot.sort("token_id"), **close)


def test_only_tokens_that_occur_often_enough_are_hot(pair: ModelPair) -> None:
    often = run(pair, min_contexts=1)["kl_hot_tokens"]
    seldom = run(pair, min_contexts=6)["kl_hot_tokens"]
    assert seldom["n_contexts"].min() >= 6
    assert 0 < len(seldom) < len(often)
    counted = dict(often.group_by("place").agg(pl.col("n_contexts").sum()).iter_rows())
    assert counted == {"read": corpus().n_tokens, "next": corpus().n_tokens - len(LENGTHS)}
    assert often["token"].to_list() == [f"w{token_id}" for token_id in often["token_id"]]
    assert len(run(pair, min_contexts=1000)["kl_hot_tokens"]) == 0


def test_a_temperature_divides_both_models_logits(pair: ModelPair) -> None:
    probe = corpus()
    shown = run(pair, probe, temperature=2.0)["kl_tokens"]
    halves = [[logits_NV / 2 for logits_NV in logits(pair, each.token_T)] for each in probe.sequences]
    for name in DIVERGENCES:
        expected = np.concatenate([exact(*sides)[name] for sides in halves])
        np.testing.assert_allclose(shown[name], expected, rtol=1e-3, atol=1e-6)
    assert KlSettings(temperature=2.0).settings_id() != KlSettings().settings_id()


def test_examples_show_the_sequences_that_differ_most_token_by_token(pair: ModelPair) -> None:
    tables = run(pair, examples=2)
    tokens, shown = tables["kl_tokens"], tables["kl_examples"]
    for ranking, score in (("max", pl.col("kl_nats").max()), ("mean", pl.col("kl_nats").mean())):
        best = tokens.group_by("sequence").agg(score).sort("kl_nats", descending=True).head(2)
        rows = shown.filter(pl.col("statistic") == "kl_nats", pl.col("ranked_by") == ranking).sort("rank")
        assert rows["sequence"].to_list() == best["sequence"].to_list()
        np.testing.assert_allclose(rows["score"], best["kl_nats"], rtol=1e-6)
    for row in shown.filter(pl.col("statistic") == "kl_nats").to_dicts():
        of_sequence = tokens.filter(pl.col("sequence") == row["sequence"])
        assert row["tokens"] == of_sequence["token"].to_list()
        np.testing.assert_allclose(row["values"], of_sequence["kl_nats"], rtol=1e-6)


def test_grouping_after_many_tiles_loses_none(pair: ModelPair, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_block = run(pair)
    monkeypatch.setattr(fold_module, "TILES_TOGETHER", 3)
    monkeypatch.setattr(blocks_module, "VALUES_PER_TILE", {"cpu": 2 * VOCAB})
    for name, frame in run(pair).items():
        assert_frame_equal(frame, whole_block[name], rel_tol=1e-5, abs_tol=1e-7)


@pytest.mark.parametrize("skip", [0, 2])
def test_skipped_first_tokens_are_not_counted_as_zeros(pair: ModelPair, skip: int) -> None:
    """The toolkit set them to zero and then took means and medians over them."""
    probe = corpus(skip=skip)
    tables = run(pair, probe, top_tokens=VOCAB)
    vocabulary = tables["kl_vocabulary"]
    assert set(vocabulary["token_id"]) == set(range(VOCAB)) - {model_files.tokenizer().eos_token_id}
    for side, name in enumerate(("mean_base_probability", "mean_tuned_probability")):
        rows_NV = torch.cat([logits(pair, each.token_T)[side].double().softmax(-1)[skip:] for each in probe.sequences])
        expected_V = rows_NV.mean(0).numpy()
        np.testing.assert_allclose(vocabulary[name], expected_V[vocabulary["token_id"].to_numpy()], rtol=1e-4)
    assert len(tables["kl_tokens"]) == probe.n_tokens == sum(max(0, n - skip) for n in LENGTHS)


def test_contributions_of_the_vocabulary_sum_to_the_mean_over_tokens(pair: ModelPair) -> None:
    plain = ModelPair(pair.base, pair.tuned, model_files.tokenizer(), pair.pair, VOCAB)
    plain.tokenizer.eos_token = None
    tables = run(plain, top_tokens=VOCAB)
    assert len(tables["kl_vocabulary"]) == VOCAB
    assert tables["kl_vocabulary"]["contribution_nats"].sum() == pytest.approx(
        tables["kl_tokens"]["kl_nats"].mean(), rel=1e-4
    )
    assert tables["kl_vocabulary"]["contribution_nats"].is_sorted(descending=True)


def test_mean_does_not_depend_on_the_length_of_sequences() -> None:
    """Every model here ignores its context, so a text twice as long has the same mean."""
    sides = []
    for seed in (0, 1):
        model = model_files.build(seed=seed)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.zero_()
        sides.append(Subject.of(model, revision=str(seed)))
    pair = ModelPair(*sides, model_files.tokenizer(), Pair("m", "o"), VOCAB)
    tokens_T = np.arange(2, 10, dtype=np.int32)
    probe = ProbeCorpus(
        "probe",
        tuple(ProbeSequence(np.tile(tokens_T, n), np.zeros(8 * n, np.int8), np.zeros(8 * n, bool)) for n in (1, 2, 5)),
        3,
    )
    means = run(pair, probe)["kl_sequences"]["kl_nats"].to_numpy()
    np.testing.assert_allclose(means, means[0], rtol=1e-5)
    assert means[0] > 0.01


@pytest.mark.parametrize(("limit", "n_rows"), [(0, 0), (11, 0), (12, 12), (20, 12), (21, 21), (1000, sum(LENGTHS))])
def test_token_rows_are_those_of_leading_sequences_whatever_the_batches(
    pair: ModelPair, limit: int, n_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks_module, "VALUES_PER_BLOCK", {"cpu": 16 * VOCAB})
    monkeypatch.setattr(blocks_module, "LEAST_BLOCK_ROWS", 1)
    listed = [run(pair, budget=budget, token_rows=limit)["kl_tokens"] for budget in (1, 24, 4096)]
    assert [len(frame) for frame in listed] == [n_rows] * 3
    for frame in listed[1:]:
        assert frame.select("sequence", "position", "token", "next_token").equals(
            listed[0].select("sequence", "position", "token", "next_token")
        )
    if n_rows:
        assert listed[0]["sequence"].unique().to_list() == list(range(sum(np.cumsum(LENGTHS) <= limit)))


def test_rows_name_the_token_its_true_follower_and_their_probability(pair: ModelPair) -> None:
    probe, rows = corpus(), run(pair)["kl_tokens"]
    sequence = probe.sequences[1]
    of_one = rows.filter(pl.col("sequence") == 1)
    words = [f"w{token}" for token in sequence.token_T]
    assert of_one["token"].to_list() == words
    assert of_one["next_token"].to_list() == [*words[1:], None]
    base_NV, tuned_NV = (each.double().log_softmax(-1) for each in logits(pair, sequence.token_T))
    delta_N = (tuned_NV - base_NV)[torch.arange(len(words) - 1), torch.from_numpy(sequence.token_T[1:]).long()]
    np.testing.assert_allclose(of_one["delta_logprob"].to_list()[:-1], delta_N, atol=1e-4)
    assert of_one["delta_logprob"].to_list()[-1] is None
    assert of_one["argmax_agrees"].to_list() == (base_NV.argmax(-1) == tuned_NV.argmax(-1)).tolist()
    assert of_one["speaker"].to_list() == [ROLES[role] for role in sequence.role_T]
    gained_N = (tuned_NV.exp() * (tuned_NV - base_NV)).argmax(-1)
    assert of_one["gained_token"].to_list() == [f"w{token}" for token in gained_N.tolist()]


def test_findings_and_headline_follow_from_the_tables(pair: ModelPair) -> None:
    [result] = paired_pass([pair], corpus(), [(KL, KlSettings(shown=5))])
    shown = KL.findings(result.tables, result.settings)
    vocabulary = pl.from_arrow(result.tables["kl_vocabulary"])
    assert [finding.item for finding in shown] == vocabulary["token"].head(5).to_list()
    sequences = pl.from_arrow(result.tables["kl_sequences"])
    assert KL.headline(result.tables) == {
        "mean_kl_nats": pytest.approx(sequences["kl_nats"].mean()),
        "max_sequence_kl_nats": sequences["kl_nats"].max(),
        "n_sequences": len(LENGTHS),
    }
