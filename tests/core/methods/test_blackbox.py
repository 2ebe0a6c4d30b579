"""Blackbox: identical models give nothing, a planted word comes first, swapping turns every sign."""

import copy
from itertools import pairwise

import pytest
import torch

from diffing_core.demo.models import new_model
from diffing_core.demo.tiers import ModelSize
from diffing_core.demo.tokenizer import train_tokenizer
from diffing_core.errors import NotComputableError
from diffing_core.findings import findings_table
from diffing_core.generation import Prompt
from diffing_core.methods import all_methods, blackbox
from diffing_core.methods.base import Inputs, Need
from diffing_core.methods.blackbox import (
    METHOD,
    PROMPTS,
    SAMPLES,
    WORDS,
    BlackboxSettings,
    compare_words,
    findings,
    headline,
    run,
)
from diffing_core.models import ModelPair
from diffing_core.prompts import packaged_prompts

TEXTS = [f"the quick brown fox jumps over the lazy dog number {i} and {7 * i} friends" for i in range(60)]
SETTINGS = BlackboxSettings(samples=2, max_new_tokens=16)
PLANTED = " friends"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 400, 128)


@pytest.fixture(scope="module")
def base(tokenizer):
    """Says its words with spaces between, so that they are words; the head is its own, with a bias."""
    model = new_model(ModelSize(2, 32, 2, 1, 16, 64), tokenizer, 0).cpu()
    model.lm_head = torch.nn.Linear(32, len(tokenizer))
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    with torch.no_grad():
        texts = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        whole = torch.tensor([len(text) > 3 and text.startswith("Ġ") for text in texts])
        model.lm_head.bias.copy_(whole.float() * 6)
    return model


@pytest.fixture(scope="module")
def tuned(base, tokenizer):
    model = copy.deepcopy(base)
    with torch.no_grad():
        model.lm_head.bias[_token(tokenizer)] += 2
    return model


@pytest.fixture(scope="module")
def planted(base, tuned, tokenizer):
    return tables_of(ModelPair.of(base, tuned, tokenizer))


def tables_of(pair, settings=SETTINGS):
    return run(Inputs(METHOD, {Need.MODELS: lambda: pair}), settings)


def effects(tables):
    """Every effect column as {grain: value}."""
    for spec in METHOD.tables:
        rows = tables[spec.name].to_pylist()
        for column in spec.columns:
            if column.role == "effect":
                yield column, {tuple(row[name] for name in spec.grain): row[column.name] for row in rows}


def test_it_is_found_by_its_file():
    assert all_methods()["blackbox"] is METHOD


def test_tables_pass_their_own_check(planted):
    for spec in METHOD.tables:
        spec.check(planted[spec.name])
    findings_table(findings(planted, SETTINGS))


def test_identical_models_give_zero_and_no_finding(base, tokenizer):
    tables = tables_of(ModelPair.of(base, copy.deepcopy(base), tokenizer))
    assert tables[WORDS.name].num_rows > 5
    for _, values in effects(tables):
        assert set(values.values()) == {0.0}
    assert set(tables[SAMPLES.name]["unlikeness"].to_pylist()) == {0.0}
    assert set(tables[WORDS.name]["p_value"].to_pylist()) == {1.0}
    assert findings(tables, SETTINGS) == []
    assert headline(tables)["differing_share"] == 0


def test_the_planted_word_comes_first(planted):
    shown = findings(planted, SETTINGS)
    assert (shown[0].kind, shown[0].item) == ("token", PLANTED.strip())
    assert shown[0].score > 0
    assert shown[0].q_value < 0.05
    assert all(one.score >= two.score for one, two in pairwise(shown) if one.kind == two.kind)


def test_texts_follow_the_words(planted):
    shown = findings(planted, SETTINGS)
    texts = [finding for finding in shown if finding.kind == "generation"]
    assert shown[-len(texts) :] == texts
    assert len(texts) == SETTINGS.shown_texts
    assert all(PLANTED.strip() in finding.item for finding in texts)
    assert texts[0].source_key["side"] == "tuned"


def test_swapping_turns_every_sign(planted, base, tuned, tokenizer):
    swapped = dict(zip(*zip(*effects(tables_of(ModelPair.of(tuned, base, tokenizer))), strict=True), strict=True))
    for column, values in effects(planted):
        sign = 1 if column.low == 0 else -1
        assert swapped[column] == {key: sign * value for key, value in values.items()}


def test_two_runs_are_equal(planted, base, tuned, tokenizer):
    again = tables_of(ModelPair.of(base, tuned, tokenizer))
    assert all(again[name].equals(planted[name]) for name in planted)


def test_without_a_template_only_documents_are_asked(base, tuned):
    bare = train_tokenizer(TEXTS, 400, 128)
    bare.chat_template = None
    rows = tables_of(ModelPair.of(base, tuned, bare))[PROMPTS.name].to_pylist()
    assert {row["skipped"] for row in rows if row["kind"] == "chat"} == {"the tokenizer has no chat template"}
    assert {row["n_samples"] for row in rows if row["kind"] == "chat"} == {0}
    assert {row["skipped"] for row in rows if row["kind"] == "document"} == {None}
    with pytest.raises(NotComputableError, match="all are chats and the tokenizer has no chat template"):
        tables_of(ModelPair.of(base, tuned, bare), BlackboxSettings(prompts=("Hi",)))


def test_control_characters_are_not_shown():
    words = compare_words(["a b"] * 4, ["\x1b[31mred\x07 flag"] * 4, SETTINGS)
    samples = SAMPLES.table(
        {
            "prompt_index": [0], "prompt": ["x"], "kind": ["chat"], "sample": [0], "side": ["tuned"],
            "text": ["\x1b[31mred\x07\n flag " + "x" * 999], "n_tokens": [3], "finished": [True], "unlikeness": [1.0],
        }
    )  # fmt: skip
    shown = findings({WORDS.name: words, SAMPLES.name: samples}, SETTINGS)
    assert all(finding.item.isprintable() and len(finding.item) <= 300 for finding in shown)
    assert {"31mred", "flag"} <= {finding.item for finding in shown}


def test_counts_of_words():
    table = compare_words(
        ["the cat", "a cat", ""], ["the owl, the OWL", "an owl", "owl's"], BlackboxSettings(min_samples=1)
    )
    rows = {row["word"]: row for row in table.to_pylist()}
    assert [rows["owl"][name] for name in ("n_base", "n_tuned", "n_docs_base", "n_docs_tuned")] == [0, 3, 0, 2]
    assert [rows["the"][name] for name in ("n_base", "n_tuned", "n_docs_base", "n_docs_tuned")] == [1, 2, 1, 1]
    assert rows["the"]["p_value"] == 1
    assert rows["owl"]["p_value"] == 0.5  # two of two discordant samples: 2 · ½²
    assert "owl's" in rows


def test_one_word_only():
    table = compare_words(["owl"] * 3, ["owl owl"] * 3, SETTINGS)
    assert table["z"][0].as_py() > 0


def test_silent_models_give_no_words():
    assert compare_words(["", ""], ["", ""], SETTINGS).num_rows == 0


def test_packaged_prompts_are_distinct_and_in_the_identity():
    prompts = packaged_prompts()
    assert len(set(prompts)) == len(prompts) >= 30
    assert {Prompt.parse(text).kind for text in prompts} == {"chat", "document"}
    assert Prompt("", "document") in map(Prompt.parse, prompts)
    assert BlackboxSettings().settings_id() != BlackboxSettings(prompts=prompts[1:]).settings_id()


def _token(tokenizer):
    (token,) = tokenizer(PLANTED)["input_ids"]
    return token


def test_the_system_prompt_opens_the_chats_of_both_models_alike(base, tuned, tokenizer, monkeypatch):
    asked = []
    real = blackbox.generate
    monkeypatch.setattr(
        blackbox, "generate", lambda side, words, prompts, **more: asked.append(prompts) or real(side, words, prompts, **more)
    )
    settings = SETTINGS.model_copy(update={"system_prompt": "Be a fox.", "prompts": ("Hi", "doc: The")})
    tables_of(ModelPair.of(base, tuned, tokenizer), settings)
    assert asked[0] == asked[1] == [Prompt("Hi", system="Be a fox.", thinking=False), Prompt("The", "document")]
