"""Rollouts scored by both models, against plain forwards and against the estimators' own promises."""

import numpy as np
import polars as pl
import pytest
import torch

from diffing_core.comparison import timed_run
from diffing_core.errors import NotComputableError
from diffing_core.generation import Generation, Prompt, Sampling, generate
from diffing_core.methods import get_method
from diffing_core.methods.base import Inputs, Need
from diffing_core.methods.kl_rollout import KlRolloutSettings, run, scored
from diffing_core.models import ModelPair, Subject
from diffing_core.pairs import Pair
from tests import model_files
from tests.model_files import VOCAB

ROLLOUT = get_method("kl_rollout")
PROMPTS = ("doc: w3 w4", "doc: w9", "doc: w5 w6 w7")


def pair_of(base: torch.nn.Module, tuned: torch.nn.Module) -> ModelPair:
    return ModelPair(Subject.of(base), Subject.of(tuned), model_files.tokenizer(), Pair("m", "o"), VOCAB)


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return pair_of(model_files.build(seed=0), model_files.build(seed=1))


def tables(pair: ModelPair, **options) -> dict[str, pl.DataFrame]:
    settings = KlRolloutSettings(**{"prompts": PROMPTS, "samples": 3, "max_new_tokens": 6, "min_texts": 1} | options)
    result = timed_run(pair, ROLLOUT, settings, Inputs(ROLLOUT, {Need.MODELS: lambda: pair}))
    assert result.error is None, result.error
    return {name: pl.from_arrow(table) for name, table in result.tables.items()}


def test_every_token_said_is_scored_where_it_was_predicted(pair: ModelPair) -> None:
    written = generate(
        pair.tuned, pair.tokenizer, [Prompt.parse(text) for text in PROMPTS],
        sampling=Sampling(max_new_tokens=6, n=2), seed=0,
    )  # fmt: skip
    said = scored(pair, written)
    for sequence, each in enumerate(written):
        ids_BT = torch.tensor([each.prompt_ids + each.answer_ids])
        base_NV, tuned_NV = (
            side.module(ids_BT).logits[0].detach().double().log_softmax(-1) for side in (pair.base, pair.tuned)
        )
        rows = said.filter(pl.col("sequence") == sequence).sort("answer_position")
        assert rows["token_id"].to_list() == list(each.answer_ids)
        assert rows["answer_position"].to_list() == list(range(len(each.answer_ids)))
        places = range(len(each.prompt_ids) - 1, ids_BT.shape[1] - 1)
        ratio = [float((tuned_NV - base_NV)[place, ids_BT[0, place + 1]]) for place in places]
        full = [float((tuned_NV[place].exp() * (tuned_NV - base_NV)[place]).sum()) for place in places]
        np.testing.assert_allclose(rows["delta_logprob"], ratio, atol=1e-4)
        np.testing.assert_allclose(rows["kl_nats"], full, atol=1e-4)


def test_the_log_ratio_of_what_was_said_estimates_the_kl(pair: ModelPair) -> None:
    """Summed over texts that end by themselves, and early: means per text would be biased."""
    ending = model_files.build(seed=1, tie_word_embeddings=False)
    with torch.no_grad():
        ending.lm_head.weight[model_files.tokenizer().eos_token_id] *= 4
    texts = tables(pair_of(pair.base.module, ending), samples=300, max_new_tokens=4)["kl_rollout_texts"]
    assert texts["n_tokens"].n_unique() > 1
    ratio, full = ((texts[name] * texts["n_tokens"]).to_numpy() for name in ("log_ratio_nats", "kl_nats"))
    assert ratio.std() > 2 * full.std()
    error = (ratio - full).std() / np.sqrt(len(texts))
    assert ratio.mean() == pytest.approx(full.mean(), abs=4 * error)
    assert full.mean() > 5 * error, "the bound would hold for any estimate"


def test_contributions_and_places_add_up_to_the_mean_log_ratio(pair: ModelPair) -> None:
    written = generate(
        pair.tuned, pair.tokenizer, [Prompt.parse(text) for text in PROMPTS],
        sampling=Sampling(max_new_tokens=6, n=3), seed=0,
    )  # fmt: skip
    said, found = scored(pair, written), tables(pair)
    readable = said.filter(pl.col("token_id") != model_files.tokenizer().eos_token_id)
    contributions = found["kl_rollout_tokens"]["contribution_nats"]
    assert contributions.sum() == pytest.approx(readable["delta_logprob"].sum() / len(said), rel=1e-5)
    assert contributions.is_sorted(descending=True)
    by_place = found["kl_rollout_positions"]
    assert (by_place["log_ratio_nats"] * by_place["n_texts"]).sum() == pytest.approx(said["delta_logprob"].sum(), rel=1e-5)
    assert by_place["n_texts"][0] == len(written)
    assert found["kl_rollout_texts"]["n_tokens"].sum() == len(said)


def test_only_tokens_of_several_texts_are_listed(pair: ModelPair) -> None:
    often = tables(pair, min_texts=1)["kl_rollout_tokens"]
    seldom = tables(pair, min_texts=3)["kl_rollout_tokens"]
    assert seldom["n_texts"].min() >= 3
    assert set(seldom["token_id"]) == set(often.filter(pl.col("n_texts") >= 3)["token_id"])


def test_the_sampling_is_seeded(pair: ModelPair) -> None:
    first, again, other = (tables(pair, seed=seed)["kl_rollout_texts"] for seed in (0, 0, 1))
    assert first.equals(again)
    assert first["text"].to_list() != other["text"].to_list()


def test_without_a_template_chats_are_left_out_and_refused_if_there_is_nothing_else(pair: ModelPair) -> None:
    shown = tables(pair, prompts=("Hello?", "doc: w3"))["kl_rollout_texts"]
    assert set(shown["prompt_index"]) == {1}
    with pytest.raises(NotComputableError, match="chat template"):
        run(Inputs(ROLLOUT, {Need.MODELS: lambda: pair}), KlRolloutSettings(prompts=("Hello?",)))


def test_answers_are_cut_before_a_token_that_the_base_does_not_know(pair: ModelPair) -> None:
    wide = model_files.build(seed=1, vocab_size=VOCAB + 8)
    wider = ModelPair(pair.base, Subject.of(wide), model_files.tokenizer(), Pair("m", "o"), VOCAB)
    written = [
        Generation(0, 0, "", 2, False, (3, 4), (5, VOCAB + 1, 6)),
        Generation(0, 1, "", 1, False, (3, 4), (VOCAB + 2,)),
    ]
    said = scored(wider, written)
    assert said.select("sequence", "token_id").rows() == [(0, 5)]
