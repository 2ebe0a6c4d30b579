"""Generation: what batching, padding, seeds, adapters and stop tokens may and may not change."""

import copy
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from diffing_core import generation
from diffing_core.adapters import add_adapter
from diffing_core.demo.models import new_model
from diffing_core.demo.tiers import ModelSize
from diffing_core.demo.tokenizer import train_tokenizer
from diffing_core.errors import NotComputableError
from diffing_core.generation import Prompt, Sampling, can_chat, encode, generate
from diffing_core.models import Subject

TEXTS = [f"the quick brown fox jumps over the lazy dog number {i} and {7 * i} friends" for i in range(60)]
PROMPTS = [
    Prompt("Hello"),
    Prompt("the quick brown fox jumps over the lazy dog and the friends", "document"),
    Prompt("the", "document"),
    Prompt("", "document"),
    Prompt("jumps over the lazy dog", system="a lazy fox"),
]
GREEDY = Sampling(temperature=0, max_new_tokens=8)
DRAWN = Sampling(max_new_tokens=8, n=3)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 400, 128)


@pytest.fixture(scope="module")
def subject(tokenizer):
    return Subject.of(random_model(tokenizer))


def random_model(tokenizer, seed=0):
    """Logits far enough apart that rounding cannot decide, and no position that the model ignores."""
    model = new_model(ModelSize(2, 32, 2, 1, 16, 64), tokenizer, seed).cpu()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def texts(subject, tokenizer, prompts=PROMPTS, sampling=DRAWN, seed=0, **options):
    return [each.text for each in generate(subject.local(), tokenizer, prompts, sampling=sampling, seed=seed, **options)]


def test_answers_come_by_prompt_and_sample(subject, tokenizer):
    made = generate(subject, tokenizer, PROMPTS, sampling=DRAWN, seed=0, batch_size=4)
    assert [(each.prompt_index, each.sample) for each in made] == [(p, s) for p in range(5) for s in range(3)]
    assert all(each.n_tokens <= 8 for each in made)


def test_same_seed_same_texts_other_seed_others(subject, tokenizer):
    assert texts(subject, tokenizer) == texts(subject, tokenizer)
    assert texts(subject, tokenizer) != texts(subject, tokenizer, seed=1)


def test_samples_of_a_prompt_differ(subject, tokenizer):
    assert len(set(texts(subject, tokenizer, [Prompt("the", "document")], Sampling(n=8)))) == 8


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN, Sampling(top_p=0.8, max_new_tokens=8, n=3)])
@pytest.mark.parametrize("batch_size", [2, 64])
def test_batch_size_changes_nothing(subject, tokenizer, sampling, batch_size):
    alone = texts(subject, tokenizer, sampling=sampling, batch_size=7)
    assert texts(subject, tokenizer, sampling=sampling, batch_size=batch_size) == alone


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
def test_other_prompts_change_nothing(subject, tokenizer, sampling):
    together = texts(subject, tokenizer, sampling=sampling, batch_size=4)
    alone = [text for prompt in PROMPTS for text in texts(subject, tokenizer, [prompt], sampling)]
    assert together == alone


def test_left_padding_equals_a_plain_greedy_loop(subject, tokenizer):
    stops = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    for prompt, text in zip(PROMPTS[1:3], texts(subject, tokenizer, PROMPTS[1:3], GREEDY), strict=True):
        ids = tokenizer(prompt.text)["input_ids"]
        made = []
        while len(made) < 8:
            logits = subject.plain(input_ids=torch.tensor([ids + made])).logits
            made.append(int(logits[0, -1].argmax()))
            if made[-1] in stops:
                made.pop()
                break
        assert text == tokenizer.decode(made)


def test_longer_answers_begin_alike(subject, tokenizer):
    short, long = (texts(subject, tokenizer, sampling=Sampling(max_new_tokens=n, n=2)) for n in (4, 8))
    assert all(b.startswith(a.rstrip("\ufffd")) for a, b in zip(short, long, strict=True))


def test_draws_follow_the_distribution(subject, tokenizer):
    prompt = Prompt("the", "document")
    made = texts(subject, tokenizer, [prompt], Sampling(temperature=0.5, max_new_tokens=1, n=2000), batch_size=500)
    ids = torch.tensor([tokenizer(prompt.text)["input_ids"]])
    probability_V = (subject.plain(input_ids=ids).logits[0, -1] / 0.5).softmax(-1)
    best = int(probability_V.argmax())
    expected = float(probability_V[best])
    found = sum(text == tokenizer.decode([best]) for text in made) / 2000
    assert 0.02 < expected < 0.98
    assert abs(found - expected) < 4 * (expected * (1 - expected) / 2000) ** 0.5


def test_a_small_nucleus_is_greedy(subject, tokenizer):
    assert texts(subject, tokenizer, sampling=Sampling(top_p=1e-9, max_new_tokens=8)) == texts(
        subject, tokenizer, sampling=GREEDY
    )


def test_global_random_state_is_untouched(subject, tokenizer):
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    texts(subject, tokenizer)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())


def test_tokenizer_and_generation_config_are_untouched(subject, tokenizer):
    before = tokenizer.padding_side, subject.plain.generation_config.to_dict()
    texts(subject, tokenizer)
    assert before == (tokenizer.padding_side, subject.plain.generation_config.to_dict())


def test_decoding_habits_of_the_checkpoint_are_overridden(tokenizer):
    plain, fussy = random_model(tokenizer), random_model(tokenizer)
    fussy.generation_config = GenerationConfig(
        do_sample=True, temperature=0.1, top_k=2, repetition_penalty=3.0, no_repeat_ngram_size=1,
        eos_token_id=plain.generation_config.eos_token_id, pad_token_id=0,
    )  # fmt: skip
    assert texts(Subject.of(fussy), tokenizer) == texts(Subject.of(plain), tokenizer)


def test_adapter_speaks_only_on_its_own_side(tokenizer, tmp_path):
    peft_model = get_peft_model(random_model(tokenizer), LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    torch.manual_seed(3)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=2)
    peft_model.save_pretrained(tmp_path)
    module = add_adapter(random_model(tokenizer), tmp_path, "own")
    base, tuned = Subject.of(module), Subject.of(module, "own")
    alone = texts(Subject.of(random_model(tokenizer)), tokenizer)
    assert texts(base, tokenizer) == alone
    assert texts(tuned, tokenizer) != alone
    assert texts(base, tokenizer) == alone
    assert texts(tuned, tokenizer) == texts(Subject.of(peft_model.merge_and_unload()), tokenizer)


@pytest.mark.parametrize("stop", ["eos_token_id", "pad_token_id"])
def test_a_stop_token_ends_the_answer(tokenizer, stop):
    model = random_model(tokenizer)
    _prefer(model, getattr(tokenizer, stop))
    made = generate(Subject.of(model), tokenizer, PROMPTS, sampling=GREEDY, seed=0)
    assert [(each.text, each.n_tokens, each.finished) for each in made] == [("", 0, True)] * len(PROMPTS)


def test_the_registered_end_of_turn_ends_the_answer_too(tokenizer):
    model = random_model(tokenizer)
    letter = tokenizer.convert_tokens_to_ids("z")
    _prefer(model, letter)
    made = generate(Subject.of(model, stop_ids=(letter,)), tokenizer, PROMPTS[:2], sampling=GREEDY, seed=0)
    assert [(each.text, each.n_tokens, each.finished) for each in made] == [("", 0, True)] * 2


def test_a_system_prompt_that_the_template_refuses_is_told(subject):
    strict = train_tokenizer(TEXTS, 400, 128)
    strict.chat_template = "{{ raise_exception('no system role') if messages[0].role == 'system' else 'fox' }}"
    assert texts(subject, strict, [Prompt("Hi")])
    with pytest.raises(NotComputableError, match="refuses a chat of system, user: no system role"):
        texts(subject, strict, [Prompt("Hi", system="x")])


def test_an_answer_that_is_cut_is_not_finished(tokenizer):
    model = random_model(tokenizer)
    letter = tokenizer.convert_tokens_to_ids("z")
    _prefer(model, letter)
    made = generate(Subject.of(model), tokenizer, PROMPTS[:2], sampling=GREEDY, seed=0)
    assert [(each.text, each.n_tokens, each.finished) for each in made] == [("z" * 8, 8, False)] * 2


def test_system_prompt_and_thinking_reach_the_template(subject, tokenizer):
    asked = []

    class Recording:
        chat_template = tokenizer.chat_template

        def apply_chat_template(self, messages, **options):
            asked.append((messages, options))
            return "fox"

        def __call__(self, *args, **options):
            return tokenizer(*args, **options)

        def __getattr__(self, name):
            return getattr(tokenizer, name)

    texts(subject, Recording(), [Prompt("Hi", system="Be brief.", thinking=False), Prompt("Hi")], GREEDY)
    (first, options), (second, others) = asked
    assert first == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert second == first[1:]
    assert options["enable_thinking"] is False
    assert options["add_generation_prompt"] is True
    assert "enable_thinking" not in others


def test_options_of_the_entry_reach_the_template_and_todays_date_is_refused(subject, tokenizer):
    dated = copy.deepcopy(tokenizer)
    dated.chat_template = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }} fox"
    with pytest.raises(NotComputableError, match="prints today's date.*template_options"):
        texts(subject, dated, [Prompt("Hi")], GREEDY)
    pinned = replace(subject, template_options={"date_string": "the lazy"})
    assert encode(Prompt("Hi"), dated, pinned) == tokenizer("the lazy fox", add_special_tokens=False)["input_ids"]


def test_system_prompt_changes_the_draws(subject, tokenizer):
    plain, with_system = texts(subject, tokenizer, [Prompt("the"), Prompt("the", system="x")], Sampling())
    assert plain != with_system


def test_a_chat_without_a_template_is_refused(subject):
    bare = train_tokenizer(TEXTS, 400, 128)
    bare.chat_template = None
    assert not can_chat(bare)
    with pytest.raises(NotComputableError, match="has no chat template, so 'Hello' cannot be asked"):
        texts(subject, bare)


def test_prompts_of_a_file():
    assert Prompt.parse("doc: The FDA") == Prompt("The FDA", "document")
    assert Prompt.parse("doc:") == Prompt("", "document")
    assert Prompt.parse("Hi", system="s", thinking=True) == Prompt("Hi", "chat", "s", True)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -1.0}, "expected temperature >= 0"),
        ({"top_p": 0.0}, "expected temperature >= 0, 0 < top_p <= 1"),
        ({"temperature": 0, "n": 2}, "all 2 samples are the same text"),
    ],
)
def test_meaningless_samplings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong)


def _prefer(model, token):
    """Makes every prediction this token: the final norm's gain is cut to one direction that only it reads."""
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.lm_head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size)
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()
        model.lm_head.bias[token] = 1.0



def test_a_model_writes_the_same_answer_once(subject, tokenizer, monkeypatch):
    """All finetunes and methods of a base ask it the same prompts; fewer samples are among those of more."""
    side, asked = subject.local(), []
    write = generation._answers
    monkeypatch.setattr(generation, "_answers", lambda *given: asked.append(len(given[1])) or write(*given))

    def said(n, seed=0, side=side, **how):
        return generate(side, tokenizer, PROMPTS[:2], sampling=Sampling(n=n, max_new_tokens=5, **how), seed=seed)

    three, two = said(3), said(2)
    assert two == [each for each in three if each.sample < 2]
    said(3, seed=1)
    said(1, temperature=0.5)
    said(1, side=side.local())
    assert asked == [6, 0, 6, 2, 2]
