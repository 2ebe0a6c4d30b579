"""Lens readings through each model's own norm and head, against plain readouts in float64."""

from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from peft import LoraConfig, get_peft_model

from diffing_core.corpus import ProbeCorpus, ProbeSequence
from diffing_core.methods import get_method
from diffing_core.methods.logit_lens import LogitLensSettings
from diffing_core.methods.logit_lens.reading import _stays_from
from diffing_core.models import ModelPair, Subject
from diffing_core.paired_pass import paired_pass
from diffing_core.pairs import Pair
from diffing_core.sampling import sampled
from tests import model_files
from tests.model_files import LAYERS, VOCAB

LENGTHS = (12, 9, 5, 12, 7)
LENS = get_method("logit_lens")
LAST = LAYERS - 1


def corpus(skip: int = 0, lengths: tuple[int, ...] = LENGTHS) -> ProbeCorpus:
    draw = np.random.default_rng(0)
    sequences = tuple(
        ProbeSequence(draw.integers(2, VOCAB, n).astype(np.int32), np.zeros(n, np.int8), np.zeros(n, bool))
        for n in lengths
    )
    return ProbeCorpus("probe", sequences, len(sequences), skip_first_tokens=skip)


def pair_of(base: Any, tuned: Any) -> ModelPair:
    return ModelPair(Subject.of(base), Subject.of(tuned), model_files.tokenizer(), Pair("m", "o"), VOCAB)


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return pair_of(model_files.build(seed=0), model_files.build(seed=1))


def run(
    pair: ModelPair, probe: ProbeCorpus | None = None, budget: int = 30, method: str = "logit_lens", **settings: Any
) -> dict[str, pl.DataFrame]:
    declared = get_method(method)
    chosen = declared.settings(**settings)
    [result] = paired_pass([pair], probe or corpus(), [(declared, chosen)], tokens_per_batch=budget)
    assert result.error is None, result.error
    return {name: pl.from_arrow(table) for name, table in result.tables.items()}


def readings(pair: ModelPair, layer: int, probe: ProbeCorpus) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log p of base, tuned, and tuned state through the base's norm and head, [N, V] in float64."""
    found: list[list[torch.Tensor]] = [[], [], []]
    for sequence in probe.sequences:
        tokens_BT = torch.from_numpy(sequence.token_T)[None].long()
        base_ND, tuned_ND = (
            side.module(tokens_BT, output_hidden_states=True).hidden_states[layer + 1][0]
            for side in (pair.base, pair.tuned)
        )
        for place, (side, states_ND) in enumerate(
            ((pair.base, base_ND), (pair.tuned, tuned_ND), (pair.base, tuned_ND))
        ):
            model = side.module
            normed_ND = states_ND if layer == LAST else model.model.norm(states_ND)
            found[place].append(model.lm_head(normed_ND).double().log_softmax(-1)[probe.skip_first_tokens :])
    return tuple(torch.cat(each).detach() for each in found)


def kl(p_NV: torch.Tensor, q_NV: torch.Tensor) -> float:
    return float((p_NV.exp() * (p_NV - q_NV)).sum(-1).mean())


def test_last_layer_reads_what_kl_measures(pair: ModelPair) -> None:
    tokens = run(pair, method="kl")["kl_tokens"]
    last = run(pair)["logit_lens_layers"].filter(pl.col("layer") == LAST).row(0, named=True)
    assert last["n_tokens"] == len(tokens) == sum(LENGTHS)
    assert last["kl_nats"] == pytest.approx(tokens["kl_nats"].mean(), rel=1e-5)
    assert last["argmax_differs"] == pytest.approx(1 - tokens["argmax_agrees"].mean())
    assert last["delta_logprob"] == pytest.approx(tokens["delta_logprob"].mean(), rel=1e-4)


@pytest.mark.parametrize("skip", [0, 2])
def test_every_layer_is_read_through_each_models_own_norm_and_head(pair: ModelPair, skip: int) -> None:
    probe = corpus(skip)
    layers = run(pair, probe)["logit_lens_layers"]
    for layer in range(LAYERS - 1):
        base_NV, tuned_NV, cross_NV = readings(pair, layer, probe)
        row = layers.row(layer, named=True)
        assert row["n_tokens"] == len(base_NV)
        assert row["kl_nats"] == pytest.approx(kl(tuned_NV, base_NV), rel=1e-4)
        assert row["cross_kl_nats"] == pytest.approx(kl(cross_NV, base_NV), rel=1e-4)
        assert row["argmax_differs"] == pytest.approx(
            float((base_NV.argmax(-1) != tuned_NV.argmax(-1)).double().mean())
        )


@pytest.mark.parametrize("changed", ["norm", "head"])
def test_a_change_of_norm_or_head_alone_shows_in_the_own_reading_and_not_in_the_cross_reading(changed: str) -> None:
    base, tuned = (model_files.build(tie_word_embeddings=False) for _ in range(2))
    with torch.no_grad():
        weight = tuned.model.norm.weight if changed == "norm" else tuned.lm_head.weight
        weight.mul_(1 + 0.5 * torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)))
    layers = run(pair_of(base, tuned))["logit_lens_layers"]
    assert layers["kl_nats"].min() > 1e-3
    assert layers["cross_kl_nats"].to_list() == [0.0] * LAYERS


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
def test_size_of_a_state_does_not_change_the_order_under_rms_norm(kind: str) -> None:
    subject = Subject.of(model_files.build(kind))
    states_ND = torch.randn(20, subject.d_model, generator=torch.Generator().manual_seed(0))
    plain_NV, larger_NV = subject.readout(10 * states_ND), subject.readout(300 * states_ND)
    assert torch.equal(plain_NV.topk(5).indices, larger_NV.topk(5).indices)
    torch.testing.assert_close(plain_NV, larger_NV, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_token_lists_are_means_of_tuned_minus_base_best_first(pair: ModelPair, layer: int) -> None:
    base_NV, tuned_NV, _ = readings(pair, layer, corpus())
    changes = {
        "delta_probability": (tuned_NV.exp() - base_NV.exp()).mean(0).numpy(),
        "delta_logprob": (tuned_NV - base_NV).mean(0).numpy(),
    }
    tokens = run(pair, top_tokens=10)["logit_lens_tokens"].filter(pl.col("layer") == layer)
    readable = np.setdiff1d(np.arange(VOCAB), [model_files.tokenizer().eos_token_id])
    for criterion in ("probability", "logprob"):
        change_V = changes[f"delta_{criterion}"]
        for direction, sign in (("gained", 1), ("lost", -1)):
            rows = tokens.filter((pl.col("criterion") == criterion) & (pl.col("direction") == direction))
            expected = readable[np.argsort(-sign * change_V[readable])][:10]
            assert rows["rank"].to_list() == list(range(1, 11))
            assert rows["token_id"].to_list() == expected.tolist()
            assert rows["token"].to_list() == [f"w{token}" for token in expected]
            for name, values_V in changes.items():
                np.testing.assert_allclose(rows[name], values_V[expected], atol=1e-5)


def test_tokens_that_neither_model_expects_are_left_out(pair: ModelPair) -> None:
    base_NV, tuned_NV, _ = readings(pair, 0, corpus())
    likely_V = np.maximum(base_NV.exp().mean(0).numpy(), tuned_NV.exp().mean(0).numpy())
    bound = float(np.median(likely_V))
    listed = run(pair, layers=(0,), top_tokens=VOCAB, min_probability=bound)["logit_lens_tokens"]["token_id"].unique()
    assert set(listed) <= set(np.flatnonzero(likely_V >= bound * (1 - 1e-4)))
    assert set(listed) >= set(np.flatnonzero(likely_V >= bound * (1 + 1e-4))) - {1}


def test_the_sample_is_fixed_by_text_and_position_whatever_the_batches(pair: ModelPair) -> None:
    probe = corpus(lengths=(40, 30, 20, 10))
    tables = [run(pair, probe, budget, max_tokens=30, layers=(0,)) for budget in (1, 64, 4096)]
    key_N = np.repeat(probe.key_S, (40, 30, 20, 10))
    position_N = np.concatenate([np.arange(n) for n in (40, 30, 20, 10)])
    chosen = sampled(key_N, position_N, 0.3)
    base_NV, tuned_NV, _ = readings(pair, 0, probe)
    for each in tables:
        row = each["logit_lens_layers"].row(0, named=True)
        assert row["n_tokens"] == chosen.sum()
        assert row["kl_nats"] == pytest.approx(kl(tuned_NV[chosen], base_NV[chosen]), rel=1e-4)


def test_depth_names_layers_as_everywhere(pair: ModelPair) -> None:
    layers = run(pair, layers=(0.5, 1.0))["logit_lens_layers"]
    assert layers["layer"].to_list() == [1, 2]
    assert layers["n_layers"].to_list() == [LAYERS, LAYERS]


def test_findings_are_gained_tokens_rank_by_rank_deepest_layer_first(pair: ModelPair) -> None:
    settings = LogitLensSettings(shown=5)
    [result] = paired_pass([pair], corpus(), [(LENS, settings)])
    shown = LENS.findings(result.tables, settings)
    assert [(finding.source_key["rank"], finding.layer) for finding in shown] == [
        (1, 2),
        (1, 1),
        (1, 0),
        (2, 2),
        (2, 1),
    ]
    assert all(finding.score > 0 and finding.source_key["direction"] == "gained" for finding in shown)


def test_layers_report_js_of_the_own_readings(pair: ModelPair) -> None:
    layers = run(pair)["logit_lens_layers"]
    base_NV, tuned_NV, _ = readings(pair, 0, corpus())
    middle_NV = ((base_NV.exp() + tuned_NV.exp()) / 2).log()
    js = (kl(base_NV, middle_NV) + kl(tuned_NV, middle_NV)) / 2
    assert layers["js_nats"][0] == pytest.approx(js, rel=1e-4)


def test_both_states_through_the_bases_head_are_listed_where_the_tuned_model_has_its_own(pair: ModelPair) -> None:
    tokens = run(pair, top_tokens=10)["logit_lens_tokens"].filter(pl.col("layer") == 0)
    base_NV, _, cross_NV = readings(pair, 0, corpus())
    change_V = (cross_NV.exp() - base_NV.exp()).mean(0).numpy()
    rows = tokens.filter(pl.col("criterion") == "cross_probability", pl.col("direction") == "gained")
    assert rows["delta_probability"].is_sorted(descending=True)
    np.testing.assert_allclose(rows["delta_probability"], change_V[rows["token_id"].to_numpy()], atol=1e-6)
    assert rows["delta_probability"][0] == pytest.approx(np.delete(change_V, model_files.tokenizer().eos_token_id).max(), abs=1e-6)


def test_ranks_are_places_among_the_mean_probabilities(pair: ModelPair) -> None:
    base_NV, tuned_NV, _ = readings(pair, 0, corpus())
    rows = run(pair)["logit_lens_tokens"].filter(pl.col("layer") == 0)
    for side, values_NV in (("base", base_NV), ("tuned", tuned_NV)):
        mean_V = values_NV.exp().mean(0).numpy()
        expected = [int((mean_V > mean_V[token]).sum()) + 1 for token in rows["token_id"]]
        assert rows[f"{side}_rank"].to_list() == expected


def test_an_adapter_on_the_blocks_alone_leaves_one_readout_for_both_sides() -> None:
    module = get_peft_model(
        model_files.build(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), adapter_name="tuned"
    )
    base, tuned = Subject.of(module), Subject.of(module, "tuned")
    assert base.shares_readout_with(tuned)
    shown = run(ModelPair(base, tuned, model_files.tokenizer(), Pair("m", "o"), VOCAB))
    assert shown["logit_lens_layers"]["cross_kl_nats"].to_list() == shown["logit_lens_layers"]["kl_nats"].to_list()
    assert set(shown["logit_lens_tokens"]["criterion"]) == {"probability", "logprob"}
    headed = get_peft_model(
        model_files.build(tie_word_embeddings=False),
        LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False),
        adapter_name="tuned",
    )
    assert not Subject.of(headed).shares_readout_with(Subject.of(headed, "tuned"))


@pytest.mark.parametrize(
    ("members", "expected"),
    [([{7}, {7}, {7}], 2), ([{7}, set(), {7}], 9), ([set(), {7}, {7}], 5), ([{7}, {7}, set()], None)],
)
def test_a_token_emerges_where_it_enters_for_good(members: list[set[int]], expected: int | None) -> None:
    assert _stays_from(7, members, (2, 5, 9)) == expected


def test_emergence_follows_from_the_lists_of_all_layers(pair: ModelPair) -> None:
    tables = run(pair, top_tokens=10)
    gained = tables["logit_lens_tokens"].filter(pl.col("criterion") == "probability", pl.col("direction") == "gained")
    last = gained.filter(pl.col("layer") == LAST).sort("rank")
    shown = tables["logit_lens_emergence"].sort("rank")
    assert shown["token_id"].to_list() == last["token_id"].to_list()
    assert shown["delta_probability"].to_list() == last["delta_probability"].to_list()
    for row in shown.to_dicts():
        at = set(gained.filter(pl.col("token_id") == row["token_id"])["layer"])
        expected = min(layer for layer in at if set(range(layer, LAYERS)) <= at)
        assert row["gained_layer"] == expected
