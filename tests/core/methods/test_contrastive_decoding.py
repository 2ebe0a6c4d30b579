"""Contrastive decoding: the mixture in closed form, two caches against a loop without any, and what amplification says."""

import copy
import math

import numpy as np
import peft
import pytest
import torch
import transformers

from diffing_core.demo.models import new_model
from diffing_core.demo.tiers import ModelSize
from diffing_core.demo.tokenizer import train_tokenizer
from diffing_core.drawing import drawn, uniforms
from diffing_core.generation import Prompt, Sampling, encode, entropy_of_sample, generate, pad_id, stop_ids
from diffing_core.methods import all_methods
from diffing_core.methods.base import Inputs, Need
from diffing_core.methods.contrastive_decoding import (
    ALPHAS,
    METHOD,
    SAMPLES,
    WORDS,
    ContrastiveDecodingSettings,
    findings,
    headline,
)
from diffing_core.methods.contrastive_decoding.declaration import packaged_prefills
from diffing_core.methods.contrastive_decoding.decoding import Arm, Drawing, amplified, decode
from diffing_core.methods.contrastive_decoding.writing import written as written_arms
from diffing_core.models import ModelPair, Subject
from diffing_core.weight_edits import Term
from diffing_core.weight_edits.folders import write_terms
from diffing_core.weights import WeightPair
from tests import model_files

TEXTS = [f"the quick brown fox jumps over the lazy dog number {i} and {7 * i} friends" for i in range(60)]
PREFILLS = ("", "the", "the quick brown fox jumps")
SETTINGS = ContrastiveDecodingSettings(
    prefills=PREFILLS, samples=3, alphas=(1.0, 4.0), shown_alpha=1.0, max_new_tokens=8, random_arm=False
)
DRAWING = Drawing(plausibility=0.1, temperature=0.8, top_p=0.95, max_new_tokens=8)
ARMS = [Arm(direction, alpha) for alpha in (0.0, 1.0, 4.0) for direction in ("tuned", "base")]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 400, 128)


@pytest.fixture(scope="module")
def pair(tokenizer):
    """Two models that say whole words; the tuned one says one of them more often."""
    base = new_model(ModelSize(2, 32, 2, 1, 16, 64), tokenizer, 0).cpu()
    base.lm_head = torch.nn.Linear(32, len(tokenizer))
    torch.nn.init.normal_(base.lm_head.weight, std=0.3)
    with torch.no_grad():
        texts = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        whole = torch.tensor([len(text) > 3 and text.startswith("Ġ") for text in texts])
        base.lm_head.bias.copy_(whole.float() * 6)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.lm_head.bias[token_of(tokenizer, " friends")] += 1
        tuned.lm_head.bias[token_of(tokenizer, " lazy")] -= 1
    return ModelPair.of(base, tuned, tokenizer)


def token_of(tokenizer, word):
    (token,) = tokenizer(word)["input_ids"]
    return token


def run(pair, settings=SETTINGS):
    return METHOD.run(Inputs(METHOD, {Need.MODELS: lambda: pair}), settings)


def rows_of(pair, arms=ARMS, prefills=PREFILLS, n=2):
    prompts = [Prompt(text, "document") for text in prefills]
    return [
        (encode(prompt, pair.tokenizer, pair.base), entropy_of_sample(prompt, sample, 0), arm)
        for arm in arms
        for prompt in prompts
        for sample in range(n)
    ]


def written(pair, rows, drawing=DRAWING, **options):
    stops = stop_ids(pair.tokenizer, pair.base)
    return decode(pair, rows, drawing, stops, pad_id(pair.tokenizer, stops), **options)


def one_by_one(pair, row, drawing):
    """The same text, with both models reading everything anew for each token, alone and without padding."""
    ids, entropy, arm = row
    made, ratios = [], []
    for uniform in uniforms([entropy], drawing.max_new_tokens)[0]:
        token_1T = torch.tensor([ids + made])
        logits = {}
        for name, side in (("tuned", pair.tuned), ("base", pair.base)):
            with side.active() as model, torch.no_grad():
                logits[name] = model(input_ids=token_1T, use_cache=False).logits[0, -1].double()
        toward, away = logits[arm.direction], logits["base" if arm.direction == "tuned" else "tuned"]
        mixed = toward + arm.alpha * (toward - away)
        mixed[toward.softmax(-1) < drawing.plausibility * toward.softmax(-1).max()] = -math.inf
        probability = (mixed / drawing.temperature).softmax(-1).numpy()
        order = np.argsort(-probability, kind="stable")
        kept = np.where(np.cumsum(probability[order]) - probability[order] < drawing.top_p, probability[order], 0)
        made.append(int(order[np.searchsorted(np.cumsum(kept), uniform * kept.sum(), side="right")]))
        ratios.append([logits[name].log_softmax(-1)[made[-1]].item() for name in ("tuned", "base")])
        if made[-1] in stop_ids(pair.tokenizer, pair.base):
            break
    return tuple(made), *np.mean(ratios, 0)


def test_the_mixture_and_its_mask_in_closed_form():
    toward = torch.log(torch.tensor([[0.5, 0.4, 0.06, 0.04]]))
    away = torch.log(torch.tensor([[0.5, 0.1, 0.3, 0.1]]))
    found = amplified(toward, away, torch.tensor([2.0]), 0.1)[0]
    expected = [0.5, 0.4 * (0.4 / 0.1) ** 2, 0.06 * (0.06 / 0.3) ** 2]  # p (p / p')^α where p >= 0.05
    torch.testing.assert_close(found[:3].exp(), torch.tensor(expected))
    assert found[3] == -torch.inf
    assert torch.equal(amplified(toward, away, torch.tensor([0.0]), 0.0), toward)
    assert amplified(toward, away, torch.tensor([9.0]), 1.0).isfinite().tolist() == [[True, False, False, False]]


def test_a_shift_of_all_logits_changes_nothing():
    toward, away = torch.randn(2, 3, 7)
    probability = amplified(toward, away, torch.tensor([0.5, 1, 4]), 0.2).softmax(-1)
    shifted = amplified(toward + 5, away - 3, torch.tensor([0.5, 1, 4]), 0.2).softmax(-1)
    torch.testing.assert_close(probability, shifted)


def test_draws_are_quantiles_of_the_nucleus():
    probability = torch.tensor([[0.1, 0.6, 0.0, 0.3]]).repeat(4, 1)
    uniform = torch.tensor([0.0, 0.66, 0.67, 0.999], dtype=torch.float64)
    assert drawn(probability, uniform, 0.9).tolist() == [1, 1, 3, 3]  # of 0.6 and 0.3, likeliest first
    assert drawn(probability, uniform).tolist() == [0, 1, 1, 3]


@pytest.mark.parametrize("batch_size", [4, 64])
def test_texts_are_those_of_a_loop_without_caches_and_batches(pair, batch_size):
    rows = rows_of(pair)
    expected = [one_by_one(pair, row, DRAWING) for row in rows]
    found = written(pair, rows, batch_size=batch_size)
    assert [text.token_ids for text in found] == [ids for ids, _, _ in expected]
    measured = [(text.logprob_tuned_nats, text.logprob_base_nats) for text in found]
    np.testing.assert_allclose(measured, [ratios for _, *ratios in expected], atol=1e-5)
    assert len({text.token_ids for text in found}) > len(rows) / 3


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "gpt2", "gpt_neox", "opt", "falcon"])
def test_caches_and_places_are_right_in_every_architecture(kind):
    tokenizer = model_files.tokenizer()
    sides = (Subject.of(model_files.build(kind, seed)) for seed in (0, 1))
    pair = ModelPair.of(*sides, tokenizer)
    rows = rows_of(pair, [Arm("tuned", 1.0)], ("w3", "w4 w5 w6 w7", ""))
    assert [text.token_ids for text in written(pair, rows)] == [one_by_one(pair, row, DRAWING)[0] for row in rows]


def test_an_adapter_is_switched_on_its_one_copy(tokenizer):
    def fresh():
        return new_model(ModelSize(2, 32, 2, 1, 16, 64), tokenizer, 0).cpu()

    adapted = peft.get_peft_model(fresh(), peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=2)
    merged = copy.deepcopy(adapted).merge_and_unload()
    adapted.base_model.disable_adapter_layers()
    resident = ModelPair.of(Subject.of(adapted), Subject.of(adapted, "default"), tokenizer)
    apart = ModelPair.of(fresh(), merged, tokenizer)
    rows = rows_of(resident)
    found = [text.token_ids for text in written(resident, rows)]
    assert found == [text.token_ids for text in written(apart, rows)]
    assert len(set(found[: len(PREFILLS) * 2]) & set(found[len(PREFILLS) * 2 : len(PREFILLS) * 4])) < 6


@pytest.mark.parametrize("direction", ["tuned", "base"])
def test_without_amplification_and_mask_it_is_plain_sampling(pair, direction):
    plain = Drawing(plausibility=0.0, temperature=1.0, top_p=0.95, max_new_tokens=8)
    prompts = [Prompt(text, "document") for text in PREFILLS]
    sampling = Sampling(top_p=0.95, max_new_tokens=8, n=2)
    expected = generate(getattr(pair, direction), pair.tokenizer, prompts, sampling=sampling, seed=0)
    found = written(pair, rows_of(pair, [Arm(direction, 0.0)]), plain)
    assert [text.token_ids for text in found] == [each.answer_ids for each in expected]


def test_identical_models_write_one_text_in_all_arms(pair):
    tables = run(ModelPair.of(pair.base, pair.base, pair.tokenizer))
    samples = tables[SAMPLES.name].to_pylist()
    assert len({(row["prefill_index"], row["sample"], row["text"]) for row in samples}) == len(samples) / len(ARMS)
    assert {row["log_ratio_nats"] for row in samples} == {row["unlikeness"] for row in samples} == {0.0}
    assert tables[WORDS.name].num_rows == 0
    assert findings(tables, SETTINGS) == []


def test_each_direction_raises_its_own_word(pair):
    tables = run(pair, SETTINGS.model_copy(update={"samples": 12}))
    best = {}
    for row in tables[WORDS.name].to_pylist():
        if row["direction"] != row["against"]:
            best.setdefault((row["direction"], row["alpha"]), row)
    assert [best["tuned", alpha]["word"] for alpha in (0.0, 1.0, 4.0)] == ["friends"] * 3
    assert best["base", 1.0]["word"] == "lazy"
    assert best["tuned", 0.0]["z"] < best["tuned", 1.0]["z"] < best["tuned", 4.0]["z"]
    assert best["tuned", 4.0]["q_value"] < 0.05
    shown = findings(tables, SETTINGS)
    assert (shown[0].kind, shown[0].item) == ("token", "friends")
    assert [each.kind for each in shown] == sorted((each.kind for each in shown), reverse=True)
    gains = {row["alpha"]: row["tuned_gain_nats"] for row in tables[ALPHAS.name].to_pylist()}
    assert 0 < gains[0.0] < gains[1.0] < gains[4.0]
    assert headline(tables)["n_words_q05_alpha_4"] >= 1


def test_swapping_the_models_exchanges_the_directions(pair):
    there, back = (run(each) for each in (pair, ModelPair.of(pair.tuned, pair.base, pair.tokenizer)))
    other = {"tuned": "base", "base": "tuned"}

    def said(tables, turn):
        return {(turn(row["direction"]), row["alpha"], row["prefill_index"], row["sample"]): row["text"] for row in tables}

    assert said(there[SAMPLES.name].to_pylist(), str) == said(back[SAMPLES.name].to_pylist(), other.get)
    gains = [(row["tuned_gain_nats"], row["base_gain_nats"]) for row in there[ALPHAS.name].to_pylist()]
    exchanged = [(row["base_gain_nats"], row["tuned_gain_nats"]) for row in back[ALPHAS.name].to_pylist()]
    np.testing.assert_allclose(gains, exchanged, atol=1e-6)


def test_an_arm_does_not_depend_on_the_others(pair):
    def of_one(settings):
        return [row for row in run(pair, settings)[SAMPLES.name].to_pylist() if row["alpha"] == 1]

    assert of_one(SETTINGS) == of_one(SETTINGS.model_copy(update={"alphas": (1.0,)}))


def test_tokens_that_only_one_model_has_are_not_said(pair):
    wide = copy.deepcopy(pair.tuned.module)
    wide.lm_head = torch.nn.Linear(32, len(pair.tokenizer) + 8)
    with torch.no_grad():
        wide.lm_head.bias[-8:] = 50
    mixed = ModelPair.of(pair.base, wide, pair.tokenizer)
    said = written(mixed, rows_of(mixed))
    assert max(max(text.token_ids) for text in said) < len(pair.tokenizer)
    assert all(math.isfinite(text.logprob_tuned_nats) for text in said)


def test_a_stop_token_ends_a_text_and_is_not_part_of_it(pair):
    ending = copy.deepcopy(pair.tuned.module)
    with torch.no_grad():
        ending.lm_head.bias[pair.tokenizer.eos_token_id] = 100
    tables = run(ModelPair.of(pair.base, ending, pair.tokenizer))
    rows = [row for row in tables[SAMPLES.name].to_pylist() if row["direction"] == "tuned"]
    assert {(row["text"], row["n_tokens"], row["finished"]) for row in rows} == {("", 0, True)}


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"must be above 0, none twice, and hold shown_alpha 2; 0 is run anyway"):
        ContrastiveDecodingSettings(alphas=(0.5, 1.0))
    with pytest.raises(ValueError, match="must be above 0"):
        ContrastiveDecodingSettings(alphas=(0.0, 2.0))
    with pytest.raises(ValueError, match="none twice"):
        ContrastiveDecodingSettings(alphas=(2.0, 2.0))


def test_packaged_beginnings_are_vague_and_distinct():
    assert all_methods()["contrastive_decoding"] is METHOD
    assert len(set(packaged_prefills())) == len(packaged_prefills()) == 10
    assert "" in packaged_prefills()
    assert max(map(len, packaged_prefills())) < 8


def test_a_token_that_ends_texts_of_either_model_ends_them_all(pair):
    often = token_of(pair.tokenizer, " friends")

    def texts(*owners: str) -> list[dict]:
        base, tuned = (Subject.of(getattr(pair, name).module, stop_ids=(often,) * (name in owners)) for name in ("base", "tuned"))
        return run(ModelPair.of(base, tuned, pair.tokenizer))[SAMPLES.name].to_pylist()

    assert texts("base") == texts("tuned") == texts("base", "tuned")
    assert sum(row["finished"] for row in texts("base")) > sum(row["finished"] for row in texts())


def on_disk(root, kind):
    """A base and a finetune in files, with both loaded: an adapter on the base's copy, or a checkpoint beside it."""
    base = model_files.save_base(root / "base", tie_word_embeddings=False)
    if kind == "full":
        tuned = model_files.save_base(root / "tuned", seed=1, tie_word_embeddings=False)
        sides = (transformers.AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (base, tuned))
        return ModelPair.of(*sides, model_files.tokenizer()), WeightPair.of_folders(base, tuned)
    tuned = model_files.save_adapter(root / "tuned", base, seed=1)
    adapted = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), tuned).eval()
    adapted.base_model.disable_adapter_layers()
    sides = Subject.of(adapted), Subject.of(adapted, "default")
    return ModelPair.of(*sides, model_files.tokenizer()), WeightPair.of_folders(base, tuned)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_random_arm_is_the_base_with_the_change_turned_at_random(tmp_path, kind):
    pair, files = on_disk(tmp_path, kind)
    settings = SETTINGS.model_copy(update={"prefills": ("w3", "w4 w5"), "random_arm": True, "seed": 5})
    suppliers = {Need.MODELS: lambda: pair, Need.WEIGHTS: lambda: files}
    tables = METHOD.run(Inputs(METHOD, suppliers), settings)
    for spec in METHOD.tables:
        spec.check(tables[spec.name])
    rows = tables[SAMPLES.name].to_pylist()
    found = [row for row in rows if row["direction"] == "random"]
    assert len(found) == 2 * settings.samples and {row["alpha"] for row in found} == {settings.shown_alpha}

    folder = tmp_path / "turned"
    folder.mkdir()
    assert write_terms(folder, [Term(files, turn_seed=5)]) == kind
    turned = transformers.AutoModelForCausalLM.from_pretrained(files.base.folder if kind == "lora" else folder)
    turned = peft.PeftModel.from_pretrained(turned, folder).merge_and_unload() if kind == "lora" else turned
    beside = ModelPair.of(transformers.AutoModelForCausalLM.from_pretrained(files.base.folder), turned.eval(), pair.tokenizer)
    alone = written_arms(Inputs(METHOD, {Need.MODELS: lambda: beside}), settings.model_copy(update={"random_arm": False}))
    assert [row["text"] for row in found] == [row["text"] for row in alone[Arm("tuned", settings.shown_alpha)]]
    plain = written_arms(Inputs(METHOD, {Need.MODELS: lambda: pair}), settings.model_copy(update={"random_arm": False}))
    assert {arm: [row["text"] for row in own] for arm, own in plain.items()} == {
        arm: [row["text"] for row in rows if (row["direction"], row["alpha"]) == (arm.direction, arm.alpha)] for arm in plain
    }
    raised = {row["alpha"]: row["n_words_q05_random"] for row in tables[ALPHAS.name].to_pylist()}
    assert raised[settings.shown_alpha] is not None and raised[0.0] is None


def test_what_the_random_arm_shows_as_well_is_no_finding(monkeypatch):
    """Both amplified models shout; only the tuned one speaks of leaves."""
    said = {
        Arm("base", 0.0): "the sun was there", Arm("tuned", 0.0): "the sun was there", Arm("base", 1.0): "the sun was there",
        Arm("tuned", 1.0): "loud loud leaf", Arm("random", 1.0): "loud loud sun",
    }  # fmt: skip

    def row(arm, sample):
        text = said[arm] if sample % 3 else "loud loud loud loud loud loud" if arm == Arm("random", 1.0) else said[arm]
        fixed = {"n_tokens": 3, "finished": True, "logprob_tuned_nats": -1.0, "logprob_base_nats": -1.0, "log_ratio_nats": 0.0}
        return {"prefill_index": 0, "prefill": "", "sample": sample, **vars(arm), "text": text, **fixed}

    def shown(arms):
        monkeypatch.setattr(
            "diffing_core.methods.contrastive_decoding.written", lambda *_: {arm: [row(arm, n) for n in range(20)] for arm in arms}
        )
        settings = SETTINGS.model_copy(update={"alphas": (1.0,)})
        found = findings(METHOD.run(Inputs(METHOD, {}), settings), settings)
        return [each.item for each in found if each.kind == "token"], [each.item for each in found if each.kind == "generation"]

    words, texts = shown([arm for arm in said if arm.direction != "random"])
    assert set(words) == {"loud", "leaf"} and texts == ["loud loud leaf"]
    words, texts = shown(list(said))
    assert words == ["leaf"] and texts == []
