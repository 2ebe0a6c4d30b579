"""diff_mining's sources and differences against plain recomputation, and the positions that are counted."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from diffing_core.blocks import StreamContext
from diffing_core.corpus import ROLES, ProbeCorpus, ProbeSequence
from diffing_core.errors import NotComputableError, UndeclaredNeedError
from diffing_core.methods.base import Tables
from diffing_core.methods.diff_mining import METHOD
from diffing_core.methods.diff_mining.fold import DiffMiningFold
from diffing_core.methods.diff_mining.patchscope import PatchedPrompt
from diffing_core.methods.diff_mining.positions import AnswerWindow
from diffing_core.models import ModelPair
from diffing_core.paired_pass import paired_pass
from diffing_core.sampling import sampled
from tests import model_files
from tests.mining_toys import (
    PLAIN,
    POSITIONS,
    VOCABULARY,
    corpus_of,
    counts_by_sorting,
    listed,
    mine,
    random_differences,
)

LENGTHS = (12, 9, 5, 12, 7, 3)
PROMPT = "w3 w3 w9 w9 w4"
ALL = PLAIN | {"whole_vocabulary": True, "top_k": 5, "topics": 0, "patchscope_prompt": PROMPT}
SOURCES = ("logits", "logit_lens", "patchscope_lens")
BOTH_WAYS = list(itertools.product(SOURCES, ("log_prob", "centred", "raw")))
USER, ASSISTANT = ROLES.index("user"), ROLES.index("assistant")


class Words:
    """Splits at spaces, which the shared tiny tokenizer does not."""

    all_special_ids: tuple[int, ...] = ()

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [int(word[1:]) for word in text.split()]}

    def batch_decode(self, ids: list[list[int]]) -> list[str]:
        return [f"w{token}" for [token] in ids]


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return ModelPair.of(model_files.build(seed=0), model_files.build(seed=1), Words())


def mined(pair: ModelPair, corpus: ProbeCorpus, tokens_per_batch: int = 4096, **settings: object) -> Tables:
    chosen = METHOD.settings(**ALL | settings)
    [result] = paired_pass([pair], corpus, [(METHOD, chosen)], tokens_per_batch=tokens_per_batch)
    assert result.error is None, result.error
    return result.tables


def probe() -> ProbeCorpus:
    return corpus_of(LENGTHS, model_files.VOCAB)


def hidden_after(model: Any, token_T: np.ndarray, layer: int) -> torch.Tensor:
    """Output of a block, by the model's own list of hidden states where that is not normed yet, [T, D]."""
    caught = []
    hook = model.model.layers[layer].register_forward_hook(lambda _m, _i, out: caught.append(out))
    model(input_ids=torch.from_numpy(token_T.astype(np.int64))[None])
    hook.remove()
    return (caught[0][0] if isinstance(caught[0], tuple) else caught[0])[0]


def patched_one_by_one(model: Any, state_TD: torch.Tensor, layer: int) -> torch.Tensor:
    """Logits at the prompt's end with one state after another put in, [T, V]."""
    token_T = torch.tensor(Words()(PROMPT)["input_ids"])
    found = []
    for state_D in state_TD:

        def put(_module: Any, _inputs: Any, output: Any, state_D: torch.Tensor = state_D) -> Any:
            changed = output.clone()
            changed[0, -1] = state_D
            return changed

        hook = model.model.layers[layer].register_forward_hook(put)
        found.append(model(input_ids=token_T[None]).logits[0, -1])
        hook.remove()
    return torch.stack(found)


def logits_by_hand(model: Any, source: str, layer: int) -> np.ndarray:
    """Float64 logits of every token of the probe corpus, [M, V]."""
    found = []
    with torch.no_grad():
        for sequence in probe().sequences:
            if source == "logits":
                token_T = torch.from_numpy(sequence.token_T.astype(np.int64))
                logits_TV = model(input_ids=token_T[None]).logits[0]
            else:
                state_TD = hidden_after(model, sequence.token_T, layer)
                if source == "logit_lens":
                    logits_TV = model.lm_head(model.model.norm(state_TD))
                else:
                    logits_TV = patched_one_by_one(model, state_TD, layer)
            found.append(logits_TV.double().numpy())
    return np.concatenate(found)


def difference_by_hand(pair: ModelPair, source: str, difference: str, layer: int) -> np.ndarray:
    base_MV, tuned_MV = (logits_by_hand(side.plain, source, layer) for side in (pair.base, pair.tuned))
    raw_MV = tuned_MV - base_MV
    if difference == "raw":
        return raw_MV
    if difference == "centred":
        return raw_MV - raw_MV.mean(1, keepdims=True)
    normaliser_M1 = [np.log(np.exp(each).sum(1, keepdims=True)) for each in (base_MV, tuned_MV)]
    return raw_MV - normaliser_M1[1] + normaliser_M1[0]


@pytest.mark.parametrize(("source", "difference"), BOTH_WAYS)
def test_every_source_and_difference_equals_a_plain_recomputation(pair: ModelPair, source: str, difference: str):
    tables = mined(pair, probe(), source=source, difference=difference, lens_layer=1)
    difference_MV = difference_by_hand(pair, source, difference, 1)
    found = tables[VOCABULARY].to_pydict()
    np.testing.assert_allclose(found["mean_difference"], difference_MV.mean(0), atol=1e-5)
    np.testing.assert_allclose(found["fraction_positive"], (difference_MV > 0).mean(0), atol=1e-12)
    top_V, bottom_V = counts_by_sorting(difference_MV, 5)
    assert (found["count_top"], found["count_bottom"]) == (top_V.tolist(), bottom_V.tolist())


@pytest.mark.parametrize("source", ["logit_lens", "patchscope_lens"])
def test_lenses_at_the_last_block_read_the_models_own_predictions(pair: ModelPair, source: str):
    tables = (mined(pair, probe(), source=each, lens_layer=1.0) for each in ("logits", source))
    own, lens = (each[VOCABULARY].to_pydict() for each in tables)
    assert own["count_top"] == lens["count_top"]
    np.testing.assert_allclose(own["mean_difference"], lens["mean_difference"], atol=1e-5)
    np.testing.assert_allclose(own["mean_tuned_probability"], lens["mean_tuned_probability"], atol=1e-6)


def test_the_lens_layer_is_a_block_or_a_fraction_of_the_depth(pair: ModelPair):
    by_name = [mined(pair, probe(), source="logit_lens", lens_layer=layer) for layer in (0.75, 1)]
    assert by_name[0][VOCABULARY].equals(by_name[1][VOCABULARY])  # floor(0.75 · 2)
    with pytest.raises(UndeclaredNeedError, match="3 blocks"):
        METHOD.start(context_of(pair), METHOD.settings(source="logit_lens", lens_layer=3))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "opt"])
def test_a_prompts_own_state_put_into_it_changes_nothing(kind: str):
    side = ModelPair.of(model_files.build(kind), model_files.build(kind, 1), Words()).base
    token_BT = torch.tensor([Words()(PROMPT)["input_ids"]])
    caught = []
    hook = side.blocks[1].register_forward_hook(
        lambda _m, _i, out: caught.append((out[0] if isinstance(out, tuple) else out)[:, -1].clone())
    )
    with torch.no_grad():
        own_V = side.plain(input_ids=token_BT, use_cache=False).logits[0, -1]
        hook.remove()
        patched_RV = PatchedPrompt(Words(), PROMPT, 1).logits(side, caught[0].repeat(3, 1))
        again_V = side.plain(input_ids=token_BT, use_cache=False).logits[0, -1]
    torch.testing.assert_close(patched_RV, own_V.expand(3, -1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(own_V, again_V)  # no hook stays behind


def test_a_hook_does_not_outlive_a_forward_that_fails(pair: ModelPair):
    with pytest.raises(RuntimeError):
        PatchedPrompt(Words(), PROMPT, 1).logits(pair.base, torch.zeros(2, model_files.WIDTH + 1))
    assert not pair.base.blocks[1]._forward_hooks


def context_of(pair: ModelPair, corpus: ProbeCorpus | None = None) -> StreamContext:
    sides = (pair.base, pair.tuned, pair.tokenizer)
    return StreamContext(*sides, corpus or probe(), pair.base.n_layers, pair.base.d_model, pair.common_vocab)


def test_lenses_cost_nothing_unless_they_are_asked_for(pair: ModelPair, monkeypatch: pytest.MonkeyPatch):
    fold = DiffMiningFold(context_of(pair), METHOD.settings())
    assert fold.layers == ()
    monkeypatch.setattr(PatchedPrompt, "logits", lambda *_: pytest.fail("a patched forward was run"))
    heads = []
    normed = type(pair.base).normed
    monkeypatch.setattr(type(pair.base), "normed", lambda side, state_ND: heads.append(side) or normed(side, state_ND))
    mined(pair, probe())
    assert heads == [pair.base, pair.tuned]  # one block: the pass's own heads, and no other


def test_the_patchscope_reads_the_hashed_sample_whatever_the_batches(pair: ModelPair):
    options = {"source": "patchscope_lens", "patchscope_tokens": 20}
    alone, together = (mined(pair, probe(), size, **options)[VOCABULARY].to_pydict() for size in (1, 4096))
    key_M, position_M = np.repeat(probe().key_S, LENGTHS), np.concatenate([np.arange(n) for n in LENGTHS])
    n_read = sampled(key_M, position_M, 20 / sum(LENGTHS)).sum()
    assert 0 < n_read < sum(LENGTHS)
    assert sum(alone["count_top"]) == 5 * n_read
    assert alone["count_top"] == together["count_top"]
    np.testing.assert_allclose(alone["mean_difference"], together["mean_difference"], atol=1e-5)


def test_a_sample_that_misses_the_corpus_gives_empty_tables(pair: ModelPair):
    corpora = (
        ProbeCorpus("missed", corpus_of([n + 1], model_files.VOCAB).sequences, 1, skip_first_tokens=1) for n in range(2, 999)
    )
    corpus = next(
        each for each in corpora
        if not sampled(each.key_S.repeat(each.n_tokens), np.arange(1, each.n_tokens + 1), 1 / each.n_tokens).any()
    )  # fmt: skip
    options = {"source": "patchscope_lens", "patchscope_tokens": 1, "lens_layer": 1, "topics": 2, "windows": 0}
    tables = mined(pair, corpus, **options | {"whole_vocabulary": False})
    assert all(table.num_rows == 0 for table in tables.values())
    assert METHOD.headline(tables) == {"n_raised_tokens": 0, "n_topics": 0}


def test_a_prompt_without_tokens_is_refused_before_the_pass(pair: ModelPair):
    with pytest.raises(NotComputableError, match="patchscope_prompt"):
        METHOD.start(context_of(pair), METHOD.settings(source="patchscope_lens", patchscope_prompt=" "))


@pytest.mark.parametrize(("source", "difference"), BOTH_WAYS)
def test_identical_models_find_nothing_by_any_source(pair: ModelPair, source: str, difference: str):
    same = ModelPair.of(pair.base, pair.base, Words())
    tables = mined(same, probe(), source=source, difference=difference)
    assert METHOD.findings(tables, METHOD.settings()) == []
    for spec in METHOD.tables:
        for column in spec.columns:
            if column.role == "effect":
                assert not any(tables[spec.name][column.name].to_pylist()), column.name


@pytest.mark.parametrize("source", SOURCES)
def test_swapping_the_models_flips_every_source(pair: ModelPair, source: str):
    back = ModelPair.of(pair.tuned, pair.base, Words())
    there, again = (mined(each, probe(), source=source)[VOCABULARY].to_pydict() for each in (pair, back))
    assert there["count_top"] == again["count_bottom"]
    for name in ("mean_difference", "log_odds", "log_odds_z"):
        np.testing.assert_allclose(there[name], np.negative(again[name]), atol=1e-5)


@pytest.mark.parametrize("source", SOURCES)
def test_toolkit_defect_the_agent_reads_another_extraction_than_was_run(pair: ModelPair, source: str):
    """Findings come from the tables of the run itself, whatever its source, so no default can miss them."""
    settings = METHOD.settings(**ALL | {"source": source, "topics": 2})
    tables = mined(pair, probe(), source=source, topics=2)
    found = METHOD.findings(tables, settings)
    shown = [finding for finding in found if finding.kind == "token"]
    rows = {row["token_id"]: row for row in listed(tables, "top_k_occurring")}
    for finding in shown:
        assert finding.score == rows[finding.source_key["token_id"]]["ordering_value"]
    assert len(shown) == min(settings.shown, len(rows))
    assert {finding.kind for finding in found} == {"token", "topic"}


def test_toolkit_defect_raw_differences_follow_an_offset_that_means_nothing(pair: ModelPair):
    """A constant added to all logits changes no prediction; only the raw difference takes it for an effect."""
    shifted = model_files.build(seed=1)
    shifted.lm_head.bias = torch.nn.Parameter(torch.full((model_files.VOCAB,), 9.0), requires_grad=False)
    moved = ModelPair.of(pair.base, shifted, Words())
    for difference in ("log_prob", "centred", "raw"):
        one, two = (mined(each, probe(), difference=difference)[VOCABULARY].to_pydict() for each in (pair, moved))
        assert one["count_top"] == two["count_top"]
        assert (one["fraction_positive"] == two["fraction_positive"]) == (difference != "raw")


# Positions of chats


def chat(*turns: tuple[int, int, int]) -> ProbeSequence:
    """Turns of (role, template tokens, content tokens)."""
    role_T = np.concatenate([np.full(template + content, role, np.int8) for role, template, content in turns])
    template_T = np.concatenate([np.arange(template + content) < template for _, template, content in turns])
    return ProbeSequence(np.ones(len(role_T), np.int32), role_T, template_T)


def chats() -> ProbeCorpus:
    """Answers begin at 6 and 4; the third is cut before its answer; the last is no chat."""
    return ProbeCorpus(
        "chats",
        (
            chat((USER, 1, 3), (ASSISTANT, 2, 5), (USER, 1, 2), (ASSISTANT, 2, 4)),
            chat((USER, 1, 1), (ASSISTANT, 2, 9)),
            chat((USER, 1, 7)),
            chat((0, 0, 6)),
        ),
        4,
    )


def counted_rows(before: int, end: int) -> np.ndarray:
    """By two loops, as slow as it is plain: which rows of `chats` lie in the window around the first answer."""
    rows = []
    for sequence, start in zip(chats().sequences, (6, 4, None, None), strict=True):
        is_text = not sequence.role_T.any()
        for position in range(len(sequence)):
            rows.append(is_text or (start is not None and start - before <= position < start + end))
    return np.asarray(rows)


@pytest.mark.parametrize(("before", "end"), [(3, 4), (0, 1), (2, 64), (100, 2)])
def test_only_positions_around_the_first_answer_are_counted(before: int, end: int):
    n = sum(map(len, chats().sequences))
    difference_MV = random_differences(0, n, 40)
    options = {"top_k": 4, "topics": 0, "whole_vocabulary": True, "before_answer": before, "answer_positions": end}
    found = mine(difference_MV, chats(), **options)[VOCABULARY].to_pydict()
    assert AnswerWindow(chats(), METHOD.settings(**options)).n_counted == counted_rows(before, end).sum()
    kept_MV = difference_MV[counted_rows(before, end)]
    top_V, bottom_V = counts_by_sorting(kept_MV, 4)
    assert (found["count_top"], found["count_bottom"]) == (top_V.tolist(), bottom_V.tolist())
    np.testing.assert_allclose(found["mean_difference"], kept_MV.astype(float).mean(0), atol=1e-6)
    np.testing.assert_allclose(found["fraction_positive"], (kept_MV > 0).mean(0), atol=1e-12)


def test_a_patchscope_sample_is_a_share_of_the_counted_positions():
    """Only of those: a share of all tokens of long chats would leave next to none of a short window."""
    window = AnswerWindow(replace(chats(), skip_first_tokens=5), METHOD.settings(before_answer=2, answer_positions=1))
    assert window.n_counted == 2 + 0 + 0 + 1  # 5 and 6 of the first chat, none of the other two, the text's last


def test_all_positions_are_counted_unless_an_answer_window_is_set():
    n = sum(map(len, chats().sequences))
    found = mine(random_differences(0, n, 40), chats(), top_k=4, topics=0, whole_vocabulary=True)
    assert sum(found[VOCABULARY]["count_top"].to_pylist()) == 4 * n


def test_a_chat_without_a_counted_position_is_no_document():
    """Three documents are counted, so a token raised in all three has none that speaks against it."""
    n = sum(map(len, chats().sequences))
    difference_MV = random_differences(0, n, 40)
    difference_MV[:, 7] = 9
    options = {"top_k": 4, "topics": 0, "answer_positions": 4, "min_documents": 1}
    rows = listed(mine(difference_MV, chats(), **options), "top_k_occurring")
    [row] = [row for row in rows if row["token_id"] == 7]
    assert row["documents_raised"] == 3
    assert row["log_odds"] == pytest.approx(np.log((3 + 1.5) / (6 - 4.5)) - np.log(1.5 / (6 - 1.5)))


def test_toolkit_defect_chat_slicing_loops_over_samples_and_positions():
    """Blocks that cut a chat anywhere, even between its answer's start and the positions before, change nothing."""
    n = sum(map(len, chats().sequences))
    difference_MV = random_differences(1, n, 40)
    options = {"top_k": 4, "topics": 0, "answer_positions": 3, "whole_vocabulary": True}
    one_by_one, at_once = (
        mine(difference_MV, chats(), cuts=cuts, **options) for cuts in (np.arange(n)[:, None], [np.arange(n)])
    )
    for name in (VOCABULARY, POSITIONS):
        for left, right in zip(one_by_one[name].to_pydict().values(), at_once[name].to_pydict().values(), strict=True):
            if isinstance(left[0], float):
                np.testing.assert_allclose(left, right, atol=1e-6)
            else:
                assert left == right
