"""Movement of residuals against closed forms and against plain forwards."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal

from diffing_core.blocks import Side, StreamContext, TokenBlock
from diffing_core.corpus import ROLES, ProbeCorpus, ProbeSequence
from diffing_core.methods import get_method
from diffing_core.methods.norm_diff import NormDiffFold, NormDiffSettings, movement
from diffing_core.models import ModelPair, Subject
from diffing_core.paired_pass import paired_pass
from diffing_core.pairs import Pair
from diffing_core.sums import LogHistogram
from tests import model_files
from tests.model_files import LAYERS, VOCAB

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
    base_ND: torch.Tensor, tuned_ND: torch.Tensor, token_N: Sequence[int] | None = None, **settings: Any
) -> dict[str, pl.DataFrame]:
    """The tables of made-up residuals at one layer, in two blocks."""
    n, width = base_ND.shape
    probe = ProbeCorpus("made-up", (ProbeSequence(np.zeros(n, np.int32), np.zeros(n, np.int8), np.zeros(n, bool)),), 1)
    context = StreamContext(None, None, model_files.tokenizer(), probe, n_layers=1, d_model=width, vocab_size=VOCAB)
    fold = NormDiffFold(context, NormDiffSettings(**settings))
    token_N = torch.tensor(token_N or [2] * n)
    for rows in np.array_split(np.arange(n), 2):
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
                             "norm": norm, "relative_norm": norm / base_norm, "base_norm": base_norm, "cosine_distance": 1 - cosine})  # fmt: skip
    return pl.DataFrame(rows).filter(pl.col("position") >= probe.skip_first_tokens)


def means(tokens: pl.DataFrame, *grain: str) -> pl.DataFrame:
    averaged = [pl.col(name).mean().alias(f"mean_{name}") for name in ("norm", "relative_norm")]
    return tokens.group_by(grain).agg(pl.len().alias("n_tokens"), *averaged).sort(grain)


def assert_close(found: pl.DataFrame, expected: pl.DataFrame) -> None:
    assert_frame_equal(
        found.select(expected.columns), expected, check_exact=False, rel_tol=1e-3, abs_tol=1e-6, check_dtypes=False
    )


def test_movement_by_hand() -> None:
    base_ND, tuned_ND = (
        torch.tensor([[3.0, 4.0], [1.0, 0.0], [2.0, 0.0]]),
        torch.tensor([[3.0, 0.0], [-1.0, 0.0], [5.0, 0.0]]),
    )
    measured = movement(base_ND, tuned_ND)
    np.testing.assert_allclose(measured["norm"], [4, 2, 3])
    np.testing.assert_allclose(measured["base_norm"], [5, 1, 2])
    np.testing.assert_allclose(measured["relative_norm"], [0.8, 2, 1.5])
    np.testing.assert_allclose(measured["cosine_distance"], [0.4, 2, 0], atol=1e-7)


def test_equal_residuals_do_not_move_at_all() -> None:
    states_ND = 1e3 * torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    measured = movement(states_ND, states_ND.clone())
    assert not any(measured[name].any() for name in ("norm", "relative_norm", "cosine_distance"))


def test_small_angles_are_not_lost_in_rounding() -> None:
    """1 − cos in float32 ends at 6e-8; an angle of 1e-4 has a distance of 5e-9."""
    base_ND = torch.tensor([[1000.0, 0.0]])
    assert movement(base_ND, torch.tensor([[1000.0, 0.1]]))["cosine_distance"][0] == pytest.approx(5e-9, rel=1e-3)


def test_difference_is_taken_in_float32_for_bf16_models() -> None:
    """Subtracted in bf16 and averaged there, the toolkit's differences were rounded twice."""
    draw = torch.Generator().manual_seed(0)
    base_ND = (100 + torch.randn(64, 16, generator=draw)).bfloat16()
    tuned_ND = (base_ND.float() * 1.01).bfloat16()
    exact_N = (tuned_ND.double() - base_ND.double()).norm(dim=-1)
    layer = folded(base_ND, tuned_ND)["norm_diff_layers"].row(0, named=True)
    assert layer["mean_norm"] == pytest.approx(float(exact_N.mean()), rel=1e-6)
    assert layer["max_norm"] == pytest.approx(float(exact_N.max()), rel=1e-6)


def test_percentiles_are_really_computed() -> None:
    """The toolkit's never were: a list from its configuration failed the test for being a list."""
    norm_N = torch.from_numpy(np.random.default_rng(0).lognormal(0, 1.5, 2000).astype(np.float32))
    base_ND = torch.zeros(2000, 3)
    base_ND[:, 0] = 1
    tuned_ND = base_ND.clone()
    tuned_ND[:, 1] = norm_N
    layer = folded(base_ND, tuned_ND)["norm_diff_layers"].row(0, named=True)
    for share in (50, 90, 99):
        exact = np.quantile(norm_N.numpy(), share / 100, method="inverted_cdf")
        assert layer[f"norm_p{share}"] == pytest.approx(exact, rel=LogHistogram.RESOLUTION / 2 + 1e-4)
    assert layer["mean_norm"] == pytest.approx(float(norm_N.double().mean()), rel=1e-6)
    assert layer["max_norm"] == float(norm_N.max())


@pytest.mark.parametrize("skip", [0, 2])
def test_tables_equal_a_computation_by_hand(pair: ModelPair, skip: int) -> None:
    probe = corpus(skip)
    tables, tokens = run(pair, probe, layers=(0, 1), min_contexts=1), by_hand(pair, probe)
    layers = tables["norm_diff_layers"]
    assert_close(layers, means(tokens, "layer"))
    others = tokens.group_by("layer").agg(
        pl.col("cosine_distance").mean().alias("mean_cosine_distance"), pl.col("base_norm").mean().alias("mean_base_norm"),
        pl.col("norm").max().alias("max_norm"),
    ).sort("layer")  # fmt: skip
    assert_close(layers, others)
    grain = ["layer", "position", "speaker", "is_template"]
    assert_close(tables["norm_diff_positions"].sort(grain), means(tokens, *grain))
    grain = ["layer", "token_id"]
    assert_close(tables["norm_diff_tokens"].sort(grain), means(tokens, *grain).rename({"n_tokens": "n_contexts"}))


def test_skipped_first_tokens_are_not_counted_as_zeros(pair: ModelPair) -> None:
    """The toolkit set them to zero and counted them: minimum 0, mean and median too low."""
    tokens = by_hand(pair, corpus(skip=2)).filter(pl.col("layer") == 1)
    layer = run(pair, corpus(skip=2), layers=(1,))["norm_diff_layers"].row(0, named=True)
    assert layer["n_tokens"] == sum(LENGTHS) - 2 * len(LENGTHS)
    assert layer["mean_norm"] == pytest.approx(tokens["norm"].mean(), rel=1e-4)
    assert layer["norm_p50"] == pytest.approx(np.quantile(tokens["norm"], 0.5, method="inverted_cdf"), rel=0.006)


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
