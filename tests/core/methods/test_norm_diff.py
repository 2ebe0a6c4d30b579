"""Movement of residuals against closed forms and against plain forwards."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal

from diffing_core.blocks import Side, StreamContext, TokenBlock
from diffing_core.corpus import ROLES, ProbeCorpus, ProbeSequence
from diffing_core.distributions import RESOLUTION
from diffing_core.methods import get_method
from diffing_core.methods.norm_diff import STATISTICS, NormDiffFold, NormDiffSettings, movement
from diffing_core.models import ModelPair, Subject
from diffing_core.paired_pass import paired_pass
from diffing_core.pairs import Pair
from tests import model_files
from tests.model_files import LAYERS, VOCAB, WIDTH

LENGTHS = (12, 9, 5, 12, 7)
NORM_DIFF = get_method("norm_diff")


def corpus(skip: int = 0) -> ProbeCorpus:
    draw = np.random.default_rng(0)
    sequences = tuple(
        ProbeSequence(
            draw.integers(2, 9, n).astype(np.int32), draw.integers(0, 3, n).astype(np.int8), draw.random(n) < 0.5
        )
        for n in LENGTHS
    )
    return ProbeCorpus("probe", sequences, len(sequences), skip_first_tokens=skip)


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    base, tuned = (Subject.of(model_files.build(seed=seed), revision=str(seed)) for seed in (0, 1))
    return ModelPair(base, tuned, model_files.tokenizer(), Pair("m", "o"), VOCAB)


def run(pair: ModelPair, probe: ProbeCorpus, **settings: Any) -> dict[str, pl.DataFrame]:
    [result] = paired_pass([pair], probe, [(NORM_DIFF, NormDiffSettings(**settings))], tokens_per_batch=30)
    assert result.error is None, result.error
    return {name: pl.from_arrow(table) for name, table in result.tables.items()}


def folded(
    base_ND: torch.Tensor, tuned_ND: torch.Tensor, token_N: Sequence[int] | None = None, blocks: int = 2, **settings: Any
) -> dict[str, pl.DataFrame]:
    """The tables of made-up residuals at one layer."""
    n, width = base_ND.shape
    probe = ProbeCorpus("made-up", (ProbeSequence(np.zeros(n, np.int32), np.zeros(n, np.int8), np.zeros(n, bool)),), 1)
    nobody = SimpleNamespace(device=torch.device("cpu"))
    context = StreamContext(nobody, nobody, model_files.tokenizer(), probe, n_layers=1, d_model=width, vocab_size=VOCAB)
    fold = NormDiffFold(context, NormDiffSettings(**settings))
    token_N = torch.tensor(token_N or [2] * n)
    for rows in np.array_split(np.arange(n), blocks):
        sides = [Side({0: states_ND[rows]}, 0, lambda states: states, VOCAB) for states_ND in (base_ND, tuned_ND)]
        roles, flags = np.zeros(len(rows), np.int8), np.zeros(len(rows), bool)
        fold.update(TokenBlock(token_N[rows], token_N[rows], 0 * rows, rows, roles, flags, *sides))
    return {name: pl.from_arrow(table) for name, table in fold.finish().items()}


def by_hand(pair: ModelPair, probe: ProbeCorpus) -> pl.DataFrame:
    """One row per layer and token that the method is shown, in float64."""
    rows = []
    for index, sequence in enumerate(probe.sequences):
        tokens_BT = torch.from_numpy(sequence.token_T)[None].long()
        states = [side.module(tokens_BT, output_hidden_states=True).hidden_states for side in (pair.base, pair.tuned)]
        for layer in range(LAYERS - 1):
            base_TD, tuned_TD = (hidden[layer + 1][0].double() for hidden in states)
            for position, (base_D, tuned_D) in enumerate(zip(base_TD, tuned_TD, strict=True)):
                norm, base_norm = float((tuned_D - base_D).norm()), float(base_D.norm())
                cosine = float(base_D @ tuned_D) / base_norm / float(tuned_D.norm())
                rows.append({"layer": layer, "sequence": index, "position": position, "token_id": int(sequence.token_T[position]),
                             "speaker": ROLES[sequence.role_T[position]], "is_template": bool(sequence.template_T[position]),
                             "norm": norm, "relative_norm": norm / base_norm, "base_norm": base_norm, "cosine_distance": 1 - cosine,
                             "tuned_norm": float(tuned_D.norm()), "delta": (tuned_D - base_D).numpy()})  # fmt: skip
    return pl.DataFrame(rows, schema_overrides={"delta": pl.Object}).filter(pl.col("position") >= probe.skip_first_tokens)


def means(tokens: pl.DataFrame, *grain: str) -> pl.DataFrame:
    averaged = [pl.col(name).mean().alias(f"mean_{name}") for name in STATISTICS[:3]]
    return tokens.group_by(grain).agg(pl.len().alias("n_tokens"), *averaged).sort(grain)


def assert_close(found: pl.DataFrame, expected: pl.DataFrame) -> None:
    assert_frame_equal(
        found.select(expected.columns), expected, check_exact=False, rel_tol=1e-3, abs_tol=1e-6, check_dtypes=False
    )


def moved(base_ND: torch.Tensor, tuned_ND: torch.Tensor) -> dict[str, np.ndarray]:
    return dict(zip(STATISTICS, movement(base_ND, tuned_ND, tuned_ND - base_ND).numpy(), strict=True))


def test_movement_by_hand() -> None:
    base_ND, tuned_ND = (
        torch.tensor([[3.0, 4.0], [1.0, 0.0], [2.0, 0.0]]),
        torch.tensor([[3.0, 0.0], [-1.0, 0.0], [5.0, 0.0]]),
    )
    measured = moved(base_ND, tuned_ND)
    np.testing.assert_allclose(measured["norm"], [4, 2, 3])
    np.testing.assert_allclose(measured["base_norm"], [5, 1, 2])
    np.testing.assert_allclose(measured["tuned_norm"], [3, 1, 5])
    np.testing.assert_allclose(measured["relative_norm"], [0.8, 2, 1.5])
    np.testing.assert_allclose(measured["cosine_distance"], [0.4, 2, 0], atol=1e-7)


def test_equal_residuals_do_not_move_at_all() -> None:
    states_ND = 1e3 * torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    states_ND[7] = 0
    measured = moved(states_ND, states_ND.clone())
    assert not any(measured[name].any() for name in ("norm", "relative_norm", "cosine_distance"))


def test_small_angles_are_not_lost_in_rounding() -> None:
    """1 − cos in float32 ends at 6e-8; an angle of 1e-4 has a distance of 5e-9."""
    base_ND = torch.tensor([[1000.0, 0.0]])
    assert moved(base_ND, torch.tensor([[1000.0, 0.1]]))["cosine_distance"][0] == pytest.approx(5e-9, rel=1e-3)


@pytest.mark.parametrize("scale", [1e-3, 0.1, 0.5, 1.0, 2.0, 1e3])
def test_cosine_distances_of_residuals_of_any_size_agree_with_float64(scale: float) -> None:
    draw = torch.Generator().manual_seed(0)
    base_ND = torch.randn(200, 64, generator=draw)
    for noise in (1e-3, 0.3, 3.0):
        tuned_ND = scale * (base_ND + noise * torch.randn(200, 64, generator=draw))
        expected_N = 1 - torch.nn.functional.cosine_similarity(base_ND.double(), tuned_ND.double(), dim=-1)
        np.testing.assert_allclose(moved(base_ND, tuned_ND)["cosine_distance"], expected_N, rtol=1e-3, atol=5e-7)


def test_difference_is_taken_in_float32_for_bf16_models() -> None:
    """Subtracted in bf16 and averaged there, the toolkit's differences were rounded twice."""
    draw = torch.Generator().manual_seed(0)
    base_ND = (100 + torch.randn(64, 16, generator=draw)).bfloat16()
    tuned_ND = (base_ND.float() * 1.01).bfloat16()
    exact_N = (tuned_ND.double() - base_ND.double()).norm(dim=-1)
    layer = folded(base_ND, tuned_ND)["norm_diff_layers"].row(0, named=True)
    assert layer["mean_norm"] == pytest.approx(float(exact_N.mean()), rel=1e-6)
    assert layer["max_norm"] == pytest.approx(float(exact_N.max()), rel=1e-6)


@pytest.mark.parametrize("fits", [True, False])
def test_percentiles_are_really_computed(fits: bool) -> None:
    """The toolkit's never were: a list from its configuration failed the test for being a list."""
    norm_N = torch.from_numpy(np.random.default_rng(0).lognormal(0, 1.5, 2000).astype(np.float32))
    base_ND = torch.zeros(2000, 3)
    base_ND[:, 0] = 1
    tuned_ND = base_ND.clone()
    tuned_ND[:, 1] = norm_N
    needed = 2000 * len(STATISTICS)
    table = folded(base_ND, tuned_ND, exact_values=needed if fits else needed - 1)["norm_diff_distributions"]
    row = table.row(by_predicate=pl.col("statistic") == "norm", named=True)
    assert (row["exact"], row["n_tokens"]) == (fits, 2000)
    for share in (25, 50, 75, 90, 95, 99):
        exact = np.quantile(norm_N.double().numpy(), share / 100)
        assert row[f"p{share}"] == pytest.approx(exact, rel=1e-9 if fits else RESOLUTION / 2 + 1e-3)
    assert row["mean"] == pytest.approx(float(norm_N.double().mean()), rel=1e-6)
    assert row["std"] == pytest.approx(float(norm_N.double().std(correction=0)), rel=1e-6)
    assert (row["min"], row["max"]) == (float(norm_N.min()), float(norm_N.max()))


def test_histograms_hold_every_token_once_in_the_bin_it_belongs_to(pair: ModelPair) -> None:
    tables, tokens = run(pair, corpus()), by_hand(pair, corpus())
    for layer in range(LAYERS - 1):
        for statistic in STATISTICS:
            bins = tables["norm_diff_histograms"].filter((pl.col("layer") == layer) & (pl.col("statistic") == statistic))
            values = tokens.filter(pl.col("layer") == layer)[statistic].to_numpy()
            for low, high, n_tokens in bins.select("low", "high", "n_tokens").rows():
                assert n_tokens == ((values >= low) & (values < high)).sum() > 0
            assert bins["n_tokens"].sum() == len(values)


def test_identical_models_fill_only_the_bin_of_exact_zeros() -> None:
    states_ND = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    tables = folded(states_ND, states_ND)
    moved_rows = tables["norm_diff_histograms"].filter(pl.col("statistic").is_in(STATISTICS[:3]))
    assert moved_rows.select("bin", "low", "high", "n_tokens").unique().rows() == [(0, 0.0, 0.0, 30)]
    assert set(tables["norm_diff_distributions"].filter(pl.col("statistic").is_in(STATISTICS[:3]))["max"]) == {0.0}
    assert not tables["norm_diff_examples"]["statistic"].is_in(STATISTICS[:3]).any()


@pytest.mark.parametrize("skip", [0, 2])
def test_tables_equal_a_computation_by_hand(pair: ModelPair, skip: int) -> None:
    probe = corpus(skip)
    tables, tokens = run(pair, probe, layers=(0, 1), min_contexts=1), by_hand(pair, probe)
    layers = tables["norm_diff_layers"]
    assert_close(layers, means(tokens, "layer"))
    others = tokens.group_by("layer").agg(
        pl.col("base_norm").mean().alias("mean_base_norm"), pl.col("tuned_norm").mean().alias("mean_tuned_norm"),
        pl.col("norm").max().alias("max_norm"),
    ).sort("layer")  # fmt: skip
    assert_close(layers, others)
    grain = ["layer", "position", "speaker", "is_template"]
    assert_close(tables["norm_diff_positions"].sort(grain), means(tokens, *grain))
    grain = ["layer", "token_id"]
    assert_close(tables["norm_diff_tokens"].sort(grain), means(tokens, *grain).rename({"n_tokens": "n_contexts"}))


def test_skipped_first_tokens_are_not_counted_as_zeros(pair: ModelPair) -> None:
    """The toolkit set them to zero and counted them: minimum 0, mean and median too low."""
    norm_N = by_hand(pair, corpus(skip=2)).filter(pl.col("layer") == 1)["norm"].to_numpy()
    tables = run(pair, corpus(skip=2), layers=(1,))
    row = tables["norm_diff_distributions"].row(by_predicate=pl.col("statistic") == "norm", named=True)
    assert row["n_tokens"] == sum(LENGTHS) - 2 * len(LENGTHS)
    for name, expected in (("mean", norm_N.mean()), ("min", norm_N.min()), ("p50", np.median(norm_N))):
        assert row[name] == pytest.approx(expected, rel=1e-4), name
    assert set(tables["norm_diff_examples"]["first_position"]) == {2}


def test_every_token_of_the_corpus_counts_once(pair: ModelPair) -> None:
    """The toolkit did not tell validation entries from training ones and read every dataset twice on the latter."""
    tables, n_tokens = run(pair, corpus()), sum(LENGTHS)
    assert set(tables["norm_diff_layers"]["n_tokens"]) == {n_tokens}
    for name in ("norm_diff_positions", "norm_diff_histograms"):
        keys = [key for key in ("layer", "statistic") if key in tables[name].columns]
        assert set(tables[name].group_by(keys).agg(pl.col("n_tokens").sum())["n_tokens"]) == {n_tokens}


def assert_vector(row: dict[str, Any], tokens: pl.DataFrame) -> None:
    mean_D = np.mean(tokens["delta"].to_list(), axis=0)
    base_norm = tokens["base_norm"].mean()
    np.testing.assert_allclose(row["vector"], mean_D, atol=1e-5)
    assert row["n_tokens"] == len(tokens)
    assert row["norm"] == pytest.approx(np.linalg.norm(mean_D), rel=1e-4)
    assert row["mean_base_norm"] == pytest.approx(base_norm, rel=1e-4)
    assert row["relative_norm"] == pytest.approx(np.linalg.norm(mean_D) / base_norm, rel=1e-4)


def test_mean_vectors_over_all_tokens_positions_and_template_tokens(pair: ModelPair) -> None:
    vectors, tokens = run(pair, corpus(), positions=4)["norm_diff_vectors"], by_hand(pair, corpus())
    template = sorted(set(tokens.filter("is_template")["token_id"]))
    for layer in range(LAYERS - 1):
        here = tokens.filter(pl.col("layer") == layer)
        rows = {(row["mean_over"], row["value"]): row for row in vectors.filter(pl.col("layer") == layer).to_dicts()}
        assert set(rows) == {("all", None), *(("position", p) for p in range(4)), *(("template_token", t) for t in template)}
        assert_vector(rows["all", None], here)
        for position in range(4):
            assert_vector(rows["position", position], here.filter(pl.col("position") == position))
        for token in template:
            assert rows["template_token", token]["token"] == f"w{token}"
            assert_vector(rows["template_token", token], here.filter((pl.col("token_id") == token) & pl.col("is_template")))


def test_only_the_commonest_template_tokens_have_a_vector(pair: ModelPair) -> None:
    tokens = by_hand(pair, corpus()).filter(pl.col("is_template") & (pl.col("layer") == 0))
    counts = tokens["token_id"].value_counts().sort("count", "token_id", descending=[True, False])
    vectors = run(pair, corpus(), template_tokens=2, positions=0, layers=(0,))["norm_diff_vectors"]
    assert vectors.filter(pl.col("mean_over") == "template_token")["value"].to_list() == sorted(counts["token_id"][:2])
    assert vectors["mean_over"].to_list() == ["all", "template_token", "template_token"]


def test_mean_vectors_do_not_drift_in_storage_dtype() -> None:
    """The toolkit's bf16 running means: after 50,000 one-row updates with a signal of 0.1 σ, an error of 12.7 %."""
    draw = torch.Generator().manual_seed(0)
    base_ND = torch.randn(3000, WIDTH, generator=draw).bfloat16()
    tuned_ND = (base_ND.float() + 0.1 + torch.randn(3000, WIDTH, generator=draw)).bfloat16()
    vectors = folded(base_ND, tuned_ND, blocks=1500)["norm_diff_vectors"]
    exact_D = (tuned_ND.double() - base_ND.double()).mean(0)
    np.testing.assert_allclose(vectors.filter(pl.col("mean_over") == "all")["vector"][0], exact_D, atol=1e-6)


def test_examples_are_the_sequences_that_moved_most_with_every_tokens_value(pair: ModelPair) -> None:
    examples, tokens = run(pair, corpus(), examples=2)["norm_diff_examples"], by_hand(pair, corpus())
    for (layer, statistic, ranking), rows in examples.filter(pl.col("layer") < LAYERS - 1).group_by("layer", "statistic", "ranked_by"):
        here = tokens.filter(pl.col("layer") == layer).sort("position")
        scores = here.group_by("sequence").agg(getattr(pl.col(statistic), ranking)()).sort(statistic, descending=True)
        np.testing.assert_allclose(rows.sort("rank")["score"], scores[statistic][:2], rtol=2e-3, atol=1e-6)
        for row in rows.to_dicts():
            of_sequence = here.filter(pl.col("sequence") == row["sequence"])
            np.testing.assert_allclose(row["values"], of_sequence[statistic], rtol=2e-3, atol=1e-6)
            assert row["tokens"] == [f"w{token}" for token in of_sequence["token_id"]]


def test_tokens_that_moved_most_come_first_if_they_occur_often_enough() -> None:
    token_N = [5] * 3 + [6] * 3 + [7] * 2 + [8] * 4
    size_N = torch.tensor([1.0, 2, 3, 9, 9, 9, 50, 50, 0, 0, 0, 0])
    base_ND = torch.ones(12, 2)
    tuned_ND = base_ND + size_N[:, None]
    table = folded(base_ND, tuned_ND, token_N, min_contexts=3)["norm_diff_tokens"]
    assert table["token"].to_list() == ["w6", "w5", "w8"]
    assert table["n_contexts"].to_list() == [3, 3, 4]
    np.testing.assert_allclose(table["mean_relative_norm"], [9, 2, 0])
    assert folded(base_ND, tuned_ND, token_N, min_contexts=1, top_tokens=2)["norm_diff_tokens"]["token"].to_list() == [
        "w7",
        "w6",
    ]


def test_a_corpus_in_which_no_token_is_frequent_has_an_empty_table(pair: ModelPair) -> None:
    tables = run(pair, corpus(), min_contexts=1000)
    assert len(tables["norm_diff_tokens"]) == 0
    assert len(tables["norm_diff_layers"]) == LAYERS


def test_findings_are_the_last_layers_tokens_and_then_all_layers(pair: ModelPair) -> None:
    settings = NormDiffSettings(shown=3)
    [result] = paired_pass([pair], corpus(), [(NORM_DIFF, settings)])
    shown = NORM_DIFF.findings(result.tables, settings)
    assert [(finding.kind, finding.layer) for finding in shown[:3]] == [("token", LAYERS - 1)] * 3
    assert [finding.kind for finding in shown[3:]] == ["layer"] * LAYERS
    sizes = [finding.score for finding in shown[3:]]
    assert sizes == sorted(sizes, reverse=True)
    assert NORM_DIFF.headline(result.tables) == {"max_mean_relative_norm": sizes[0], "at_layer": shown[3].layer}
