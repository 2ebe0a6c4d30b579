"""Probe corpora: which documents are drawn, what every token is, and how batches are made."""

import json
from collections import Counter
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers as tf
from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing

from diffing_core.corpus import ROLES, ProbeCorpus, ProbeSequence, corpus_of_texts, load_corpus, read_texts
from diffing_core.demo.tokenizer import train_tokenizer
from diffing_core.errors import CorpusError
from diffing_core.registry import Corpus

CHATML = """
{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are A. Helper 1.<|im_end|>\\n' }}{% endif %}
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}"""
TRIMMING = CHATML.replace("message.content", "message.content | trim")
SHOUTING = CHATML.replace("message.content", "message.content | upper")
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}" + CHATML
SIGNS = ["?", "<|im_start|>", "<|im_end|>", "\n", *map(chr, range(32, 63)), *map(chr, range(64, 127)), "é"]


@pytest.fixture(scope="module")
def tokenizer() -> tf.PreTrainedTokenizerFast:
    """One token per character, so that token positions are string positions; two turn markers."""
    model = Tokenizer(WordLevel({sign: number for number, sign in enumerate(SIGNS)}, unk_token="?"))
    model.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    model.add_special_tokens([AddedToken(sign) for sign in SIGNS[1:3]])
    return tf.PreTrainedTokenizerFast(tokenizer_object=model, chat_template=CHATML)


def text_spec(**changes: Any) -> Corpus:
    return Corpus.model_validate({"name": "probe", "kind": "text", "source": {"path": "unused"}} | changes)


def chat_spec(**changes: Any) -> Corpus:
    return text_spec(kind="chat", **changes)


def turns(*contents: str, roles: tuple[str, ...] = ("user", "assistant")) -> list[dict[str, str]]:
    """A chat of alternating roles."""
    return [{"role": roles[number % len(roles)], "content": content} for number, content in enumerate(contents)]


def jsonl(path: Path, records: list[Any], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({column: record}) + "\n" for record in records))
    return path


def chat(tmp_path: Path, tokenizer: Any, messages: list[dict[str, str]], **changes: Any) -> ProbeSequence:
    """The one sequence of a corpus of one chat."""
    file = jsonl(tmp_path / "chats.jsonl", [messages], "messages")
    [sequence] = load_corpus(chat_spec(**changes), file, tokenizer).sequences
    return sequence


def written(tokenizer: Any, sequence: ProbeSequence, which: np.ndarray) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(sequence.token_T[which].tolist()))


def contents(tokenizer: Any, sequence: ProbeSequence, role: str) -> str:
    """What a role says, template left out."""
    return written(tokenizer, sequence, (sequence.role_T == ROLES.index(role)) & ~sequence.template_T)


def random_corpus(lengths: list[int], seed: int = 0) -> ProbeCorpus:
    draw = np.random.default_rng(seed)
    return ProbeCorpus(
        "probe",
        tuple(
            ProbeSequence(draw.integers(1, 99, n).astype(np.int32), np.zeros(n, np.int8), np.zeros(n, bool))
            for n in lengths
        ),
        len(lengths),
    )


# ---- roles and template flags -------------------------------------------------------------------------------------


def test_every_character_of_a_chat_is_content_of_its_speaker_or_template(tmp_path: Path, tokenizer: Any) -> None:
    sequence = chat(
        tmp_path,
        tokenizer,
        turns("Be kind.", "Hi!", "Hello.", "Bye?", "Bye.", roles=("system", "user", "assistant", "user", "assistant")),
    )
    assert contents(tokenizer, sequence, "system") == "Be kind."
    assert contents(tokenizer, sequence, "user") == "Hi!Bye?"
    assert contents(tokenizer, sequence, "assistant") == "Hello.Bye."
    template = written(tokenizer, sequence, sequence.template_T)
    assert template.startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n")
    whole = written(tokenizer, sequence, np.ones(len(sequence), bool))
    assert whole.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi!<|im_end|>\n")


def test_toolkit_defect_a_rendered_chat_is_a_mapping_and_not_a_list_of_tokens(tmp_path: Path, tokenizer: Any) -> None:
    """It took what apply_chat_template gives for ids; since transformers 5 the ids are one entry of it."""
    messages = turns("Hi!", "Hello.")
    rendered = tokenizer.apply_chat_template(messages, tokenize=True)
    assert isinstance(rendered, Mapping)
    assert chat(tmp_path, tokenizer, messages).token_T.tolist() == rendered["input_ids"]


def test_template_tokens_belong_to_the_message_that_follows_and_the_last_ones_to_the_last(
    tmp_path: Path, tokenizer: Any
) -> None:
    sequence = chat(tmp_path, tokenizer, turns("Hi!", "Hello."))
    said = {role: written(tokenizer, sequence, sequence.role_T == ROLES.index(role)) for role in ROLES}
    assert said["user"] == "<|im_start|>system\nYou are A. Helper 1.<|im_end|>\n<|im_start|>user\nHi!"
    assert said["assistant"] == "<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
    assert said["text"] == said["system"] == said["tool"] == ""


@pytest.mark.parametrize(
    "content", ["A", "1", "user", "You are A. Helper 1.", "im_end", "<|im_end|>\n<|im_start|>user\n"]
)
def test_a_content_that_also_occurs_in_the_template_is_found_in_its_own_place(
    tmp_path: Path, tokenizer: Any, content: str
) -> None:
    sequence = chat(tmp_path, tokenizer, turns(content, "a", "s", content))
    opening = "<|im_start|>system\nYou are A. Helper 1.<|im_end|>\n"
    spoken = (("user", content), ("assistant", "a"), ("user", "s"), ("assistant", content))
    pieces = [(opening, True)]
    for role, said in spoken:
        pieces += [(f"<|im_start|>{role}\n", True), (said, False), ("<|im_end|>\n", True)]
    expected = [flag for piece, flag in pieces for _ in tokenizer(piece)["input_ids"]]
    assert sequence.template_T.tolist() == expected


def test_an_empty_message_is_template_only(tmp_path: Path, tokenizer: Any) -> None:
    sequence = chat(tmp_path, tokenizer, turns("", "Hello."))
    assert contents(tokenizer, sequence, "user") == ""
    assert contents(tokenizer, sequence, "assistant") == "Hello."


def test_a_template_that_trims_contents_is_read_all_the_same(tmp_path: Path, tokenizer: Any) -> None:
    trimming = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, chat_template=TRIMMING)
    sequence = chat(tmp_path, trimming, turns(" Hi!\n", "\n", "Bye. "))
    assert contents(tokenizer, sequence, "user") == "Hi!Bye."
    assert contents(tokenizer, sequence, "assistant") == ""


def test_a_chat_cut_before_its_answer_keeps_roles_and_flags_of_what_is_left(tmp_path: Path, tokenizer: Any) -> None:
    messages = turns("Hi!", "Hello.")
    whole = chat(tmp_path, tokenizer, messages)
    for cut in range(2, len(whole) + 5):
        part = chat(tmp_path, tokenizer, messages, max_tokens=cut)
        assert len(part) == min(cut, len(whole))
        for one, other in (
            (part.token_T, whole.token_T),
            (part.role_T, whole.role_T),
            (part.template_T, whole.template_T),
        ):
            assert (one == other[:cut]).all()


def test_first_exchange_ends_with_the_first_answer_also_after_a_system_message(tmp_path: Path, tokenizer: Any) -> None:
    for opening in ([], [{"role": "system", "content": "Be kind."}]):
        sequence = chat(tmp_path, tokenizer, opening + turns("Hi!", "Hello.", "Bye?", "Bye."), first_exchange_only=True)
        assert contents(tokenizer, sequence, "user") == "Hi!"
        assert contents(tokenizer, sequence, "assistant") == "Hello."


def test_texts_have_no_role_and_no_template(tmp_path: Path, tokenizer: Any) -> None:
    [sequence] = load_corpus(text_spec(), jsonl(tmp_path / "t.jsonl", ["abc"]), tokenizer).sequences
    assert written(tokenizer, sequence, (sequence.role_T == ROLES.index("text")) & ~sequence.template_T) == "abc"


def test_template_options_reach_the_template(tmp_path: Path, tokenizer: Any) -> None:
    thinking = "{{ '[on]' if enable_thinking else '[off]' }}" + CHATML
    switched = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, chat_template=thinking)
    file = jsonl(tmp_path / "chats.jsonl", [turns("Hi!")], "messages")
    for flag, said in ((True, "[on]"), (False, "[off]")):
        [sequence] = load_corpus(chat_spec(), file, switched, template_options={"enable_thinking": flag}).sequences
        assert written(tokenizer, sequence, sequence.template_T).startswith(said)


# ---- chats seen from their first answer ---------------------------------------------------------------------------


def test_chats_are_seen_from_some_tokens_before_the_first_answer_to_some_after(tmp_path: Path, tokenizer: Any) -> None:
    messages = turns("Hello there!", "abcdefghij", "More?", "No.")
    whole = chat(tmp_path, tokenizer, messages)
    answer = int(np.flatnonzero((whole.role_T == ROLES.index("assistant")) & ~whole.template_T)[0])
    for before, length in ((3, 8), (0, 4), (10_000, 30)):
        part = chat(tmp_path, tokenizer, messages, pre_assistant_tokens=before, max_tokens=length)
        assert part.start == max(0, answer - before)
        assert len(part) == part.start + length
        assert (part.token_T == whole.token_T[: len(part)]).all(), "all that is before is read as context"
    part = chat(tmp_path, tokenizer, messages, pre_assistant_tokens=2, max_tokens=6)
    assert written(tokenizer, part, np.arange(len(part)) >= part.start) == "t\nabcd"


def test_chats_without_an_answer_soon_enough_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    said = [turns("Hi!"), turns("x" * 600, "Yes."), turns("Hi!", "Ja"), turns("Hi!", "Well, yes.")]
    path = jsonl(tmp_path / "chats.jsonl", said, "messages")
    found = load_corpus(chat_spec(pre_assistant_tokens=0, min_tokens=9), path, tokenizer)
    assert len(found.sequences) == 1
    assert found.left_out == {"no answer begins within 512 tokens": 2, "shorter than 9 tokens": 1}


def test_what_is_before_the_first_seen_token_is_not_counted_as_seen() -> None:
    probe = random_corpus([5, 6, 4])
    one, two, three = probe.sequences
    started = replace(probe, sequences=(one, replace(two, start=4), replace(three, start=1)))
    assert started.first_seen_S.tolist() == [0, 4, 1]
    assert (started.n_tokens, started.sequences_within(7)) == (5 + 2 + 3, 2)
    assert replace(started, skip_first_tokens=2).first_seen_S.tolist() == [2, 4, 2]
    assert replace(started, skip_first_tokens=2).n_tokens == 3 + 2 + 2


# ---- tokens that models read in place of others -------------------------------------------------------------------


def test_replaced_tokens_are_read_and_hashed_in_place_of_the_old_ones(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path / "chats.jsonl", [turns("abba", "ab")], "messages")
    plain = load_corpus(chat_spec(), path, tokenizer)
    a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
    swapped = load_corpus(chat_spec(), path, tokenizer, replacements={a: b, b: a})
    [before], [after] = plain.sequences, swapped.sequences
    assert contents(tokenizer, after, "user") == "baab"
    assert contents(tokenizer, after, "assistant") == "ba"
    assert (after.role_T == before.role_T).all()
    assert (after.template_T == before.template_T).all()
    assert swapped.content_hash != plain.content_hash


# ---- which documents ----------------------------------------------------------------------------------------------


def drawn(path: Path, tokenizer: Any, seed: int, wanted: int) -> list[str]:
    found = load_corpus(text_spec(max_sequences=wanted, seed=seed), path, tokenizer)
    return [written(tokenizer, sequence, np.ones(len(sequence), bool)) for sequence in found.sequences]


def test_sample_is_seeded_distinct_and_in_source_order(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path / "t.jsonl", [f"{number:03d}" for number in range(200)])
    first = drawn(path, tokenizer, 0, 40)
    assert first == sorted(set(first))
    assert len(first) == 40
    assert first == drawn(path, tokenizer, 0, 40)
    assert first != drawn(path, tokenizer, 1, 40)


def test_every_document_is_drawn_equally_often(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path / "t.jsonl", [f"{number:02d}" for number in range(20)])
    counts = Counter(text for seed in range(400) for text in drawn(path, tokenizer, seed, 5))
    assert len(counts) == 20
    assert max(abs(count - 100) for count in counts.values()) < 5 * np.sqrt(400 * 0.25 * 0.75)


def test_a_small_source_is_taken_whole(tmp_path: Path, tokenizer: Any) -> None:
    texts = ["one", "two", "three"]
    assert drawn(jsonl(tmp_path / "t.jsonl", texts), tokenizer, 0, 3) == texts
    assert drawn(tmp_path / "t.jsonl", tokenizer, 0, 1000) == texts


def test_documents_that_are_too_short_are_counted_and_not_silently_dropped(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path / "t.jsonl", ["", "a", "ab", "abc", "abcd"])
    found = load_corpus(text_spec(min_tokens=3), path, tokenizer)
    assert (len(found.sequences), found.n_documents, found.left_out) == (2, 5, {"shorter than 3 tokens": 3})
    assert str(found) == "probe: 2 of 5 documents; 3 left out: shorter than 3 tokens"
    texts = corpus_of_texts(["", "a", "ab"], tokenizer)
    assert (len(texts.sequences), texts.n_documents, texts.left_out) == (1, 3, {"shorter than 2 tokens": 2})


def test_a_document_that_cannot_be_read_leaves_the_others(tmp_path: Path, tokenizer: Any) -> None:
    """One odd row of a large dataset must neither end the run nor vanish."""
    rows = ["abc", None, ["abc"], "abcd"]
    found = load_corpus(text_spec(), jsonl(tmp_path / "t.jsonl", rows), tokenizer)
    assert found.left_out == {"column 'text' holds a NoneType, not a text": 1, "column 'text' holds a list, not a text": 1}
    strict = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, chat_template=STRICT)
    chats = [turns("be kind", "hi", roles=("system", "user")), turns("hi", "ho"), [{"role": "user", "content": None}]]
    found = load_corpus(chat_spec(), jsonl(tmp_path / "c.jsonl", chats, "messages"), strict)
    assert len(found.sequences) == 1
    assert found.left_out == {
        "the chat template refuses a chat of system, user: no system role here": 1,
        "a message needs role and content as text": 1,
    }


def test_half_a_character_leaves_out_its_own_document_alone(tmp_path: Path, tokenizer: Any) -> None:
    """JSON may hold it, where somebody cut a text at a number of characters; no tokenizer takes it."""
    texts = load_corpus(text_spec(min_tokens=2), jsonl(tmp_path / "t.jsonl", ["one and \ud83d", "two and three"]), tokenizer)
    assert (len(texts.sequences), list(texts.left_out.values())) == (1, [1])
    chats = [turns("hello \udc00", "yes"), turns("hello", "yes")]
    probe = load_corpus(chat_spec(), jsonl(tmp_path / "c.jsonl", chats, "messages"), tokenizer)
    assert (len(probe.sequences), list(probe.left_out.values())) == (1, [1])


def reading_calls(tokenizer: Any, how: str) -> Any:
    """The tokenizer with a template that reads the field `calls` of every message."""
    reading = deepcopy(tokenizer)
    reading.chat_template = CHATML.replace("messages -%}", "messages -%}" + how)
    return reading


def test_fields_that_a_file_of_columns_leaves_null_are_absent_for_the_template(tmp_path: Path, tokenizer: Any) -> None:
    reading, plain = reading_calls(tokenizer, "{% if 'calls' in message and message.calls|length %}x{% endif %}"), turns("hello", "yes")
    pq.write_table(pa.table({"messages": [[{**message, "calls": None} for message in plain]]}), tmp_path / "c.parquet")
    [sequence] = load_corpus(chat_spec(), tmp_path / "c.parquet", reading).sequences
    assert sequence.token_T.tolist() == chat(tmp_path, tokenizer, plain).token_T.tolist()


def test_a_chat_over_which_the_template_stumbles_is_counted(tmp_path: Path, tokenizer: Any) -> None:
    reading = reading_calls(tokenizer, "{{ message.calls + '' }}")
    chats = [[{**message, "calls": calls} for message in turns("hello", "yes")] for calls in ([], "")]
    probe = load_corpus(chat_spec(), jsonl(tmp_path / "c.jsonl", chats, "messages"), reading)
    assert (len(probe.sequences), list(probe.left_out.values())) == (1, [1])


def test_a_cut_document_keeps_the_tokens_of_the_whole(tmp_path: Path) -> None:
    """The toolkit cut, decoded and tokenized again: a piece at the cut became other tokens."""
    words = train_tokenizer(["the quick brown fox jumps over the lazy dog"] * 30, 300, 128)
    path = jsonl(tmp_path / "t.jsonl", ["the quick brown foxes jump äöü over the lazy dogs"])
    whole = words(json.loads(path.read_text())["text"])["input_ids"]
    for length in range(2, len(whole)):
        [sequence] = load_corpus(text_spec(max_tokens=length), path, words).sequences
        assert sequence.token_T.tolist() == whole[:length]


def test_every_text_begins_as_the_tokenizer_begins_texts(tmp_path: Path, tokenizer: Any) -> None:
    """The toolkit looked at the first text alone to decide whether all texts get a BOS."""
    model = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    begin = "<|im_start|>"
    model.post_processor = TemplateProcessing(
        single=f"{begin} $A", pair="$A $B", special_tokens=[(begin, SIGNS.index(begin))]
    )
    with_bos = tf.PreTrainedTokenizerFast(tokenizer_object=model, chat_template=CHATML)
    found = load_corpus(text_spec(), jsonl(tmp_path / "t.jsonl", [f"{begin}abc", "def"]), with_bos)
    assert [sequence.token_T[0] for sequence in found.sequences] == [SIGNS.index(begin)] * 2
    one = chat(tmp_path, with_bos, turns("Hi!", roles=("system",)))
    assert written(with_bos, one, np.arange(len(one)) < 3) == f"{begin}sy", "the template begins chats itself"


def test_long_documents_are_cut(tmp_path: Path, tokenizer: Any) -> None:
    found = load_corpus(text_spec(max_tokens=4), jsonl(tmp_path / "t.jsonl", ["abcdefgh", "abc"]), tokenizer)
    assert [len(sequence) for sequence in found.sequences] == [4, 3]
    assert found.n_tokens == 7


def test_a_folder_of_jsonl_and_parquet_is_one_corpus(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "deep").mkdir()
    jsonl(tmp_path / "b.jsonl", ["bbb"])
    jsonl(tmp_path / "deep" / "c.jsonl", ["ccc"])
    pq.write_table(
        pa.table({"text": [f"{number:04d}" for number in range(1500)], "other": [0] * 1500}), tmp_path / "a.parquet"
    )
    found = drawn(tmp_path, tokenizer, 0, 2000)
    assert found == [*(f"{number:04d}" for number in range(1500)), "bbb", "ccc"]


def test_chats_in_parquet_equal_chats_in_jsonl(tmp_path: Path, tokenizer: Any) -> None:
    chats = [turns("Hi!", "Hello."), turns("Bye?", "Bye.")]
    pq.write_table(pa.table({"messages": chats}), tmp_path / "chats.parquet")
    jsonl(tmp_path / "chats.jsonl", chats, "messages")
    one, two = (load_corpus(chat_spec(), tmp_path / f"chats.{kind}", tokenizer) for kind in ("parquet", "jsonl"))
    assert one.content_hash == two.content_hash


def test_blank_lines_of_a_jsonl_file_are_no_documents(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "t.jsonl").write_text('\n{"text": "abc"}\n\n{"text": "def"}\n \n')
    assert load_corpus(text_spec(), tmp_path / "t.jsonl", tokenizer).n_documents == 2


def test_read_texts_gives_the_first_documents_as_plain_text(tmp_path: Path) -> None:
    texts = jsonl(tmp_path / "t.jsonl", ["one", "two", "three"])
    chats = jsonl(tmp_path / "c.jsonl", [turns("Hi!", "Hello.")], "messages")
    assert read_texts(text_spec(), texts, 2) == ["one", "two"]
    assert read_texts(text_spec(), texts, 9) == ["one", "two", "three"]
    assert read_texts(chat_spec(), chats, 9) == ["Hi!\nHello."]


# ---- identity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["token_T", "role_T", "template_T"])
@pytest.mark.parametrize("place", [(0, 0), (1, 3)])
def test_any_token_role_or_flag_changes_the_content_hash(name: str, place: tuple[int, int]) -> None:
    probe = random_corpus([3, 4])
    which, position = place
    array = getattr(probe.sequences[which], name).copy()
    array[position] = not array[position]
    changed = list(probe.sequences)
    changed[which] = replace(changed[which], **{name: array})
    assert replace(probe, sequences=tuple(changed)).content_hash != probe.content_hash


def test_order_and_borders_of_sequences_change_the_content_hash() -> None:
    probe = random_corpus([3, 3])
    one, two = probe.sequences
    arrays = ("token_T", "role_T", "template_T")
    joined = ProbeSequence(*(np.concatenate([getattr(one, name), getattr(two, name)]) for name in arrays))
    hashes = {
        replace(probe, sequences=sequences).content_hash
        for sequences in ((one, two), (two, one), (joined,), (one,), (one, two, two))
    }
    assert len(hashes) == 5


def test_skipped_first_tokens_change_the_content_hash_and_the_count() -> None:
    probe = random_corpus([5, 3, 1])
    skipping = replace(probe, skip_first_tokens=2)
    assert skipping.content_hash != probe.content_hash
    assert (probe.n_tokens, skipping.n_tokens) == (9, 4)
    assert [skipping.sequences_within(limit) for limit in (0, 2, 3, 4)] == [0, 0, 1, 3]


def test_name_counts_and_batches_do_not_change_the_content_hash() -> None:
    probe = random_corpus([3, 4])
    before = probe.content_hash
    assert [list(probe.batches(budget)) for budget in (1, 100)]
    assert replace(probe, name="other", n_documents=7, left_out={"odd": 5}).content_hash == before


def test_content_hash_is_the_same_in_every_process() -> None:
    sequence = ProbeSequence(np.arange(3, dtype=np.int32), np.ones(3, np.int8), np.zeros(3, bool))
    assert ProbeCorpus("x", (sequence,), 1).content_hash == "a2ebbc9650ee"


def test_from_where_a_sequence_is_seen_changes_the_content_hash() -> None:
    probe = random_corpus([5, 5])
    one, two = probe.sequences
    hashes = {
        replace(probe, sequences=sequences).content_hash
        for sequences in ((one, two), (replace(one, start=2), two), (one, replace(two, start=2)))
    }
    assert len(hashes) == 3


# ---- batches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 7, 20, 64, 1000])
def test_batches_hold_every_token_once_within_the_budget(budget: int) -> None:
    probe = random_corpus([5, 9, 2, 9, 4, 4, 7, 1])
    seen = []
    for batch in probe.batches(budget):
        assert batch.token_BT.size <= budget or len(batch.sequences) == 1
        assert batch.mask_BT.sum(1).max() == batch.token_BT.shape[1]
        for row, index in enumerate(batch.sequences):
            sequence = probe.sequences[index]
            assert batch.token_BT[row][batch.mask_BT[row]].tolist() == sequence.token_T.tolist()
            assert batch.mask_BT[row].tolist() == sorted(batch.mask_BT[row], reverse=True)
            seen.append(index)
    assert seen == [1, 3, 6, 0, 4, 5, 2, 7]


def test_sequences_within_a_limit_are_the_leading_ones() -> None:
    probe = random_corpus([5, 3, 4])
    assert [probe.sequences_within(limit) for limit in (0, 4, 5, 7, 8, 11, 12, 99)] == [0, 0, 1, 1, 2, 2, 3, 3]


# ---- what is told to a person -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "spec", "said"),
    [
        ("t.jsonl", "", text_spec(), r"none of 0 document\(s\) can be used \(it is empty\)"),
        ("t.jsonl", '{"text": "a"}', text_spec(), r"none of 1 document\(s\) .*shorter than 2 tokens.* lower min_tokens"),
        ("t.jsonl", '{"text": "abc"}\n{"body": "a", "id": 1}', text_spec(), r"t.jsonl, line 2: no field 'text'; found \['body', 'id'\]"),
        ("t.jsonl", '{"text": "abc"}\n{"text": ', text_spec(), "t.jsonl, line 2: not JSON"),
        ("t.jsonl", '["abc"]', text_spec(), "t.jsonl, line 1: no field 'text'"),
        ("t.jsonl", '{"text": ["abc"]}', text_spec(), "column 'text' holds a list, not a text"),
        ("t.jsonl", '{"messages": "abc"}', chat_spec(), "found a str where a list of messages is expected"),
        ("t.jsonl", '{"messages": [{"content": "abc"}]}', chat_spec(), "a message needs role and content"),
        ("t.jsonl", '{"messages": []}', chat_spec(), "found no message where a list"),
        ("t.jsonl", json.dumps({"messages": turns("a", "b", roles=("user", "bot"))}), chat_spec(), "a message is of unknown role 'bot'; known are"),
        ("t.csv", "abc", text_spec(), "t.csv: corpora are read from .jsonl, .jsonl.gz, .json, .json.gz, .parquet, .arrow, .txt; save"),
        ("t.arrow", "abc", text_spec(), "t.arrow: not an Arrow stream .* save it with Dataset.save_to_disk"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_told_with_its_place(
    tmp_path: Path, tokenizer: Any, name: str, content: str, spec: Corpus, said: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CorpusError, match=said):
        load_corpus(spec, tmp_path / name, tokenizer)


def test_a_missing_parquet_column_is_told_with_those_that_exist(tmp_path: Path, tokenizer: Any) -> None:
    pq.write_table(pa.table({"body": ["abc"]}), tmp_path / "t.parquet")
    with pytest.raises(CorpusError, match=r"t.parquet: no column 'text'; found \['body'\]"):
        load_corpus(text_spec(), tmp_path / "t.parquet", tokenizer)


def test_a_place_without_files_is_told(tmp_path: Path, tokenizer: Any) -> None:
    for place in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CorpusError, match=r"holds 0 file\(s\) of .*none of split 'train'; found splits: none"):
            load_corpus(text_spec(), place, tokenizer)


@pytest.mark.parametrize(
    ("template", "said"), [(SHOUTING, "changes what a message of role user says"), (STRICT, "no system role here")]
)
def test_a_template_that_cannot_be_followed_is_told(tmp_path: Path, tokenizer: Any, template: str, said: str) -> None:
    other = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, chat_template=template)
    with pytest.raises(CorpusError, match=rf"corpus 'probe': .*{said}"):
        chat(tmp_path, other, turns("be kind", "hi", roles=("system", "user")) if template is STRICT else turns("hi"))


def test_texts_without_two_tokens_are_refused(tokenizer: Any) -> None:
    with pytest.raises(CorpusError, match=r"corpus 'texts': none of 2 document\(s\) .*shorter than 2"):
        corpus_of_texts(["", "a"], tokenizer)


def test_a_document_of_which_nothing_is_seen_is_counted_as_left_out() -> None:
    sequences = tuple(
        ProbeSequence(np.zeros(n, np.int32), np.zeros(n, np.int8), np.zeros(n, bool)) for n in (3, 9, 4)
    )
    part = ProbeCorpus("texts", sequences, 3).skipping(4)
    assert str(part) == "texts: 1 of 3 documents; 2 left out: no token after the first 4"
    assert part.n_tokens == 5
    with pytest.raises(CorpusError, match=r"'texts': none of its 3 document\(s\) is longer than the 9 tokens"):
        ProbeCorpus("texts", sequences, 3).skipping(9)
