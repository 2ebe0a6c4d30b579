"""Chats whose answers hold reasoning, templates that ask the clock or a switch, and roles that do not alternate.

The template is Qwen3's (Apache 2.0), its tool calls left out.
"""

import json
import logging
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers as tf
from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers.utils import chat_template_utils

from diffing_core.corpus import ROLES, ProbeCorpus, ProbeSequence, load_corpus
from diffing_core.errors import CorpusError
from diffing_core.registry import Corpus

QWEN3 = r"""
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""
PLAIN = "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}"
STRIPPING = PLAIN.replace("m.content", "m.content.split('</think>')[-1]")
ALTERNATING = """{% for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{{- '[' + m.role + ']' + m.content }}{% endfor %}"""
# Llama 3.2's way to the date, and that of templates which know no option for it.
DATED = """{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- endif %}{{ 'Today Date: ' + date_string + '\n' }}""" + PLAIN
CLOCK = "{{ 'Current date: ' + strftime_now('%Y-%m-%d') + '\n' }}" + PLAIN
SIGNS = ["?", "<|im_start|>", "<|im_end|>", "\n", *map(chr, range(32, 63)), *map(chr, range(64, 127))]
ASK = {"role": "user", "content": "Hi!"}
EMBEDDED = {"role": "assistant", "content": "<think>\nshort.\n</think>\n\nHello."}
APART = {"role": "assistant", "content": "Hello.", "reasoning_content": "short."}
EMPTY = "<think>\n\n</think>\n\n"


def tokenizer_of(template: str) -> tf.PreTrainedTokenizerFast:
    """One token per character; two turn markers."""
    model = Tokenizer(WordLevel({sign: number for number, sign in enumerate(SIGNS)}, unk_token="?"))
    model.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    model.add_special_tokens([AddedToken(sign) for sign in SIGNS[1:3]])
    return tf.PreTrainedTokenizerFast(tokenizer_object=model, chat_template=template)


@pytest.fixture(scope="module")
def qwen3() -> tf.PreTrainedTokenizerFast:
    return tokenizer_of(QWEN3)


def loaded(tmp_path: Path, tokenizer: Any, chats: list[Any], options: dict[str, Any] | None = None, **spec: Any) -> ProbeCorpus:
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chats))
    corpus = Corpus.model_validate({"name": "probe", "kind": "chat", "source": {"path": "unused"}} | spec)
    return load_corpus(corpus, file, tokenizer, template_options=options)


def one(tmp_path: Path, tokenizer: Any, *messages: dict[str, str], **options: Any) -> ProbeSequence:
    [sequence] = loaded(tmp_path, tokenizer, [list(messages)], options).sequences
    return sequence


def written(tokenizer: Any, sequence: ProbeSequence, which: np.ndarray | None = None) -> str:
    which = np.ones(len(sequence), bool) if which is None else which
    return "".join(tokenizer.convert_ids_to_tokens(sequence.token_T[which].tolist()))


def said(tokenizer: Any, sequence: ProbeSequence, role: str) -> str:
    return written(tokenizer, sequence, (sequence.role_T == ROLES.index(role)) & ~sequence.template_T)


# ---- reasoning ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"enable_thinking": True}])
@pytest.mark.parametrize("answer", [EMBEDDED, APART])
def test_reasoning_and_answer_are_the_speakers_own_and_the_tags_template(
    tmp_path: Path, qwen3: Any, answer: dict[str, str], options: dict[str, bool]
) -> None:
    sequence = one(tmp_path, qwen3, ASK, answer, **options)
    opening, reasoning, close = "<|im_start|>assistant\n<think>\n", "short.", "\n</think>\n\n"
    assert written(qwen3, sequence).endswith(f"{opening}{reasoning}{close}Hello.<|im_end|>\n")
    assert said(qwen3, sequence, "assistant") == "short.Hello."
    assert said(qwen3, sequence, "user") == "Hi!"
    before = len(qwen3(f"<|im_start|>user\nHi!<|im_end|>\n{opening}")["input_ids"])
    assert sequence.answer_start == before, "where the model begins to answer: with its reasoning"


def test_reasoning_that_the_template_drops_in_earlier_turns_leaves_the_rest_told_apart(tmp_path: Path, qwen3: Any) -> None:
    for answer in (EMBEDDED, APART):
        sequence = one(tmp_path, qwen3, ASK, answer, ASK, {**answer, "content": answer["content"] + "2"})
        assert said(qwen3, sequence, "assistant") == "Hello.short.Hello.2"
        assert "short" not in written(qwen3, sequence).split("Hello.")[0]


@pytest.mark.parametrize(("template", "own"), [(STRIPPING, "\n\nHello."), (PLAIN, "short.Hello.")])
def test_templates_that_strip_reasoning_or_know_nothing_of_it_are_followed(tmp_path: Path, template: str, own: str) -> None:
    tokenizer = tokenizer_of(template)
    sequence = one(tmp_path, tokenizer, ASK, EMBEDDED)
    assert said(tokenizer, sequence, "assistant").strip() == own.strip()
    assert said(tokenizer, sequence, "user") == "Hi!"


@pytest.mark.parametrize(
    ("content", "own"),
    [
        ("short.\n</think>\n\nHello.", "short.Hello."),
        ("<think>\n\n</think>\n\nHello.", "Hello."),
        ("<think>\n  a\n\n b\n</think>Hello.\n", "  a\n\n bHello.\n"),
        ("<think>a</think>\n", "a"),
        ("Well. <think>a</think>Hello.", "aHello."),
        ("<think>endless", "<think>endless"),
    ],
)
def test_reasoning_is_found_however_it_is_written(tmp_path: Path, qwen3: Any, content: str, own: str) -> None:
    sequence = one(tmp_path, qwen3, ASK, {"role": "assistant", "content": content})
    assert said(qwen3, sequence, "assistant") == own


def test_a_user_who_writes_the_tag_is_quoted_whole(tmp_path: Path, qwen3: Any) -> None:
    sequence = one(tmp_path, qwen3, {**ASK, "content": "Why </think>?"}, EMBEDDED, enable_thinking=False)
    assert said(qwen3, sequence, "user") == "Why </think>?"


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (PLAIN.replace("m.content", "(m.content | upper if m.role == 'assistant' else m.content)"), "changes what a message of role assistant says"),
        (PLAIN.replace("m.content", "(m.content if m.role == 'assistant' else '')"), "leaves out what a message of role user says"),
    ],
)
def test_the_message_that_a_template_changes_is_the_one_that_is_named(tmp_path: Path, template: str, told: str) -> None:
    with pytest.raises(CorpusError, match=told):
        one(tmp_path, tokenizer_of(template), ASK, EMBEDDED)


# ---- thinking off and on ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [EMBEDDED, APART])
def test_with_thinking_off_reasoning_is_left_out_and_with_thinking_on_it_is_read(
    tmp_path: Path, qwen3: Any, answer: dict[str, str]
) -> None:
    none, on, off = (one(tmp_path, qwen3, ASK, answer, **given) for given in ({}, {"enable_thinking": True}, {"enable_thinking": False}))
    assert written(qwen3, on) == written(qwen3, none) != written(qwen3, off)
    assert written(qwen3, off).endswith(f"<|im_start|>assistant\n{EMPTY}Hello.<|im_end|>\n")
    assert said(qwen3, off, "assistant") == "Hello."


def test_a_chat_that_ends_with_a_question_is_written_up_to_where_its_answer_begins(tmp_path: Path, qwen3: Any) -> None:
    on, off = (one(tmp_path, qwen3, ASK, enable_thinking=flag) for flag in (True, False))
    prompt = "<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n"
    assert (written(qwen3, on), written(qwen3, off)) == (prompt, prompt + EMPTY)
    whole = one(tmp_path, qwen3, ASK, EMBEDDED)
    assert (on.role_T == whole.role_T[: len(on)]).all(), "the same roles as before an answer that is there"
    assert (on.template_T == whole.template_T[: len(on)]).all()
    assert on.answer_start is None


def notes(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "changes nothing" in record.getMessage()]


def test_a_switch_without_effect_is_told_once_for_a_corpus(tmp_path: Path, qwen3: Any, caplog: pytest.LogCaptureFixture) -> None:
    answered = [[ASK, {"role": "assistant", "content": "Hello."}]] * 3
    caplog.set_level(logging.INFO)
    for flag in (True, False):
        loaded(tmp_path, qwen3, answered, {"enable_thinking": flag})
    assert [re.search(r"corpus probe: thinking (\w+)", note)[1] for note in notes(caplog)] == ["on", "off"]
    caplog.clear()
    loaded(tmp_path, tokenizer_of(PLAIN), [[ASK]], {"enable_thinking": True})
    assert len(notes(caplog)) == 1, "a template that does not know the switch"
    caplog.clear()
    loaded(tmp_path, qwen3, answered, {})
    for flag in (True, False):
        for heeding in ([ASK], [ASK, EMBEDDED]):
            loaded(tmp_path, qwen3, [*answered, heeding], {"enable_thinking": flag})
    assert notes(caplog) == []


# ---- today's date -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [DATED, CLOCK])
def test_a_template_that_prints_the_date_makes_the_same_data_every_day_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    """The same corpus got a new content hash, and with it new activation files and runs, every day."""
    hashes = []
    for day in (1, 2):
        monkeypatch.setattr(chat_template_utils, "datetime", type("Day", (datetime,), {"now": lambda day=day: datetime(2026, 11, day)}))
        tokenizer = tokenizer_of(template)
        corpus = loaded(tmp_path, tokenizer, [[ASK, APART]], {"date_string": "26 Jul 2024"})
        assert " 26 Jul 2024\n" in written(tokenizer, corpus.sequences[0]).replace(":", ": ").replace("  ", " ")
        hashes.append(corpus.content_hash)
        with pytest.raises(CorpusError, match=r"today's date.*write template_options: {date_string: 26 Jul 2024} in the registry"):
            loaded(tmp_path, tokenizer, [[ASK, APART]])
    assert hashes[0] == hashes[1]


# ---- roles that do not alternate ----------------------------------------------------------------------------------


def test_toolkit_defect_chats_of_non_alternating_roles_are_read_or_counted_and_never_skipped_in_silence(tmp_path: Path) -> None:
    chats = [[ASK, {**ASK, "content": "You there?"}, {"role": "assistant", "content": "Yes."}], [ASK, APART]]
    lenient, strict = tokenizer_of(PLAIN), tokenizer_of(ALTERNATING)
    every = loaded(tmp_path, lenient, chats)
    assert (len(every.sequences), every.left_out) == (2, {})
    assert written(lenient, every.sequences[0]) == "[user]Hi![user]You there?[assistant]Yes."
    assert said(lenient, every.sequences[0], "user") == "Hi!You there?"
    some = loaded(tmp_path, strict, chats)
    assert (len(some.sequences), some.n_documents) == (1, 2)
    assert some.left_out == {"the chat template refuses a chat of user, user, assistant: roles must alternate": 1}
