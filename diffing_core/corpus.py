"""Probe corpora: texts or chats, tokenized once, with role, position and template flag of every token."""

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from diffing_core.errors import CorpusError

ROLES = ("text", "system", "user", "assistant", "tool")
PARQUET_ROWS = 1024
_MARK = "\ue000{}\ue001"  # of the private use area: no template has them
_MARKED = re.compile(_MARK.format(r"(\d+)"))


@dataclass(frozen=True)
class ProbeSequence:
    """One tokenized document or chat; three arrays of one length."""

    token_T: np.ndarray
    role_T: np.ndarray
    template_T: np.ndarray

    def __len__(self) -> int:
        return len(self.token_T)


@dataclass(frozen=True)
class TokenBatch:
    """Right-padded sequences of similar length: ids and mask [B, T], and which sequences they are."""

    token_BT: np.ndarray
    mask_BT: np.ndarray
    sequences: tuple[int, ...]


@dataclass(frozen=True)
class ProbeCorpus:
    """The tokens that a pair is probed with.

    Attributes:
        name: registered name.
        sequences: in the order of the source.
        n_documents: documents seen in the source.
        n_too_short: chosen documents left out because they have fewer than `min_tokens` tokens.
        skip_first_tokens: leading tokens of every sequence that models read but no method sees (attention sinks).
    """

    name: str
    sequences: tuple[ProbeSequence, ...]
    n_documents: int
    n_too_short: int = 0
    skip_first_tokens: int = 0

    @cached_property
    def content_hash(self) -> str:
        """Hash of the very tokens, roles and flags, and of what is skipped: the data part of a result's identity."""
        digest = hashlib.sha256(f"skip {self.skip_first_tokens}".encode() if self.skip_first_tokens else b"")
        for sequence in self.sequences:
            digest.update(len(sequence).to_bytes(8, "little"))
            for array in (sequence.token_T, sequence.role_T, sequence.template_T):
                digest.update(array.tobytes())
        return digest.hexdigest()[:12]

    @cached_property
    def n_tokens(self) -> int:
        """Tokens that methods see; nothing is padded here."""
        return int(self._seen_S.sum())

    def sequences_within(self, token_limit: int) -> int:
        """How many leading sequences show at most `token_limit` tokens: a cut that batching cannot move."""
        return int(np.searchsorted(np.cumsum(self._seen_S), token_limit, side="right"))

    @property
    def _seen_S(self) -> np.ndarray:
        return np.asarray([max(0, len(each) - self.skip_first_tokens) for each in self.sequences], np.int64)

    def batches(self, token_budget: int) -> Iterator[TokenBatch]:
        """Batches of at most `token_budget` padded tokens, longest sequences first.

        Sorting by length keeps padding small. The order of sequences is the same whatever the budget,
        so that stored activations of two runs pair up row by row.
        """
        order = sorted(range(len(self.sequences)), key=lambda index: (-len(self.sequences[index]), index))
        start = 0
        while start < len(order):
            width = len(self.sequences[order[start]])
            size = max(1, token_budget // width)
            yield self._batch(tuple(order[start : start + size]), width)
            start += size

    def _batch(self, chosen: tuple[int, ...], width: int) -> TokenBatch:
        token_BT = np.zeros((len(chosen), width), dtype=np.int64)
        mask_BT = np.zeros((len(chosen), width), dtype=bool)
        for row, index in enumerate(chosen):
            tokens = self.sequences[index].token_T
            token_BT[row, : len(tokens)] = tokens
            mask_BT[row, : len(tokens)] = True
        return TokenBatch(token_BT, mask_BT, chosen)


def load_corpus(
    spec: Any, path: Path, tokenizer: Any, *, template_options: Mapping[str, Any] | None = None
) -> ProbeCorpus:
    """Reads a registered corpus (`diffing_core.registry.Corpus`) from local JSONL or Parquet files.

    At most `max_sequences` documents are drawn (seeded, uniformly, in one read), kept in source order.
    Raises CorpusError if nothing usable remains.
    """
    drawn, n_documents = _draw(_records(path, spec.column), spec.max_sequences, spec.seed)
    encode = _encode_chat if spec.kind == "chat" else _encode_text
    options = dict(template_options or {})
    encoded = [_cut(encode(record, tokenizer, spec, options), spec.max_tokens) for record in drawn]
    long_enough = tuple(sequence for sequence in encoded if len(sequence) >= spec.min_tokens)
    if not long_enough:
        raise CorpusError(
            f"corpus {spec.name!r}: none of {n_documents} document(s) in {path.name} has {spec.min_tokens} "
            f"tokens in column {spec.column!r}; point it at longer texts or lower min_tokens"
        )
    return ProbeCorpus(spec.name, long_enough, n_documents, len(encoded) - len(long_enough))


def corpus_of_texts(texts: Iterable[str], tokenizer: Any, *, name: str = "texts", max_tokens: int = 128) -> ProbeCorpus:
    """A corpus of plain texts, for notebooks and tests; texts of fewer than two tokens are left out."""
    encoded = [_cut(_text_sequence(text, tokenizer), max_tokens) for text in texts]
    kept = tuple(sequence for sequence in encoded if len(sequence) > 1)
    if not kept:
        raise CorpusError(f"corpus {name!r}: {len(encoded)} text(s) given, none has two tokens")
    return ProbeCorpus(name, kept, len(encoded), len(encoded) - len(kept))


def read_texts(spec: Any, path: Path, limit: int) -> list[str]:
    """The first `limit` documents as plain text; chats are their contents, one line each."""
    texts = []
    for record in _records(path, spec.column):
        if len(texts) == limit:
            break
        texts.append(record if isinstance(record, str) else "\n".join(turn["content"] for turn in record))
    return texts


def _records(path: Path, column: str) -> Iterator[Any]:
    files = [path] if path.is_file() else sorted(path.glob("**/*.jsonl")) + sorted(path.glob("**/*.parquet"))
    if not files:
        raise CorpusError(f"no .jsonl or .parquet file at {path}; give a file or a folder that holds some")
    for file in files:
        readers: dict[str, Callable[[Path, str], Iterator[Any]]] = {".jsonl": _jsonl, ".parquet": _parquet}
        if file.suffix not in readers:
            raise CorpusError(f"{file.name}: corpora are read from .jsonl or .parquet, not {file.suffix!r}")
        yield from readers[file.suffix](file, column)


def _jsonl(file: Path, column: str) -> Iterator[Any]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise CorpusError(f"{file.name}, line {number}: not JSON: {error}") from error
            if not isinstance(record, dict) or column not in record:
                found = sorted(record) if isinstance(record, dict) else f"a {type(record).__name__}"
                raise CorpusError(f"{file.name}, line {number}: no field {column!r}; found {found}")
            yield record[column]


def _parquet(file: Path, column: str) -> Iterator[Any]:
    import pyarrow.parquet as pq

    parquet = pq.ParquetFile(file)
    if column not in parquet.schema_arrow.names:
        raise CorpusError(f"{file.name}: no column {column!r}; found {parquet.schema_arrow.names}")
    for batch in parquet.iter_batches(batch_size=PARQUET_ROWS, columns=[column]):
        yield from batch.column(0).to_pylist()


def _draw(records: Iterator[Any], wanted: int, seed: int) -> tuple[list[Any], int]:
    """Uniform sample by reservoir: one read, memory of the sample only, source order kept."""
    draw = random.Random(seed)
    reservoir: list[tuple[int, Any]] = []
    count = 0
    for count, record in enumerate(records, start=1):
        if len(reservoir) < wanted:
            reservoir.append((count, record))
        elif (place := draw.randrange(count)) < wanted:
            reservoir[place] = (count, record)
    return [record for _, record in sorted(reservoir, key=lambda item: item[0])], count


def _encode_text(record: Any, tokenizer: Any, spec: Any, _: Mapping[str, Any]) -> ProbeSequence:
    if not isinstance(record, str):
        raise CorpusError(f"corpus {spec.name!r}: column {spec.column!r} holds {type(record).__name__}, not text")
    return _text_sequence(record, tokenizer)


def _text_sequence(text: str, tokenizer: Any) -> ProbeSequence:
    ids = np.asarray(tokenizer(text)["input_ids"], dtype=np.int32)
    return ProbeSequence(ids, np.zeros(len(ids), np.int8), np.zeros(len(ids), bool))


def _encode_chat(record: Any, tokenizer: Any, spec: Any, options: Mapping[str, Any]) -> ProbeSequence:
    """Renders the chat, and once more with marks for contents: what is not content is template.

    A template token takes the role of the message that follows it; those at the end, of the last one.
    """
    messages = _messages(record, spec)
    rendered = _rendered(messages, tokenizer, spec, options)
    marked = [
        {**message, "content": _MARK.format(number)} if message["content"].strip() else message
        for number, message in enumerate(messages)
    ]
    spans = _content_spans(rendered, _rendered(marked, tokenizer, spec, options), messages, spec)
    encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
    ids = np.asarray(encoded["input_ids"], dtype=np.int32)
    starts = np.asarray([start for start, _ in encoded["offset_mapping"]])
    role_T = np.zeros(len(ids), np.int8)
    template_T = np.ones(len(ids), bool)
    cursor = 0
    for message, (begin, end) in zip(messages, spans, strict=True):
        role_T[starts >= cursor] = ROLES.index(message["role"])
        template_T[(starts >= begin) & (starts < end)] = False
        cursor = end
    return ProbeSequence(ids, role_T, template_T)


def _messages(record: Any, spec: Any) -> list[Mapping[str, str]]:
    """The messages to read, each with a known role and a text."""
    where = f"corpus {spec.name!r}: column {spec.column!r} holds"
    if not isinstance(record, list) or not record:
        raise CorpusError(f"{where} {str(record)[:60]!r}, not a list of messages")
    for message in record:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise CorpusError(f"{where} the message {str(message)[:60]}; a message needs role and content as text")
        if message["role"] not in ROLES:
            raise CorpusError(f"{where} a message of unknown role {message['role']!r}; known are {ROLES[1:]}")
    roles = [message["role"] for message in record]
    first_answer = roles.index("assistant") + 1 if "assistant" in roles else len(roles)
    return record[:first_answer] if spec.first_exchange_only else record


def _rendered(messages: list[Mapping[str, str]], tokenizer: Any, spec: Any, options: Mapping[str, Any]) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except TemplateError as error:
        roles = [message["role"] for message in messages]
        raise CorpusError(f"corpus {spec.name!r}: the chat template refuses a chat of {roles}: {error}") from error


def _content_spans(
    rendered: str, marked: str, messages: list[Mapping[str, str]], spec: Any
) -> list[tuple[int, int]]:
    """Begin and end of each content in the rendered chat; a blank one is empty, at the end of the one before."""
    opening, *rest = _MARKED.split(marked)
    after = dict(zip(map(int, rest[::2]), rest[1::2], strict=True))
    cursor = len(opening) if rendered.startswith(opening) else -1
    spans: list[tuple[int, int]] = []
    for number, message in enumerate(messages):
        said = message["content"]
        if not said.strip():
            end = spans[-1][1] if spans else 0
            spans.append((end, end))
            continue
        forms = (said, said.strip(), said.lstrip(), said.rstrip())
        following = after.get(number, _MARK)
        form = next((form for form in forms if cursor >= 0 and rendered.startswith(form + following, cursor)), None)
        if form is None:
            raise CorpusError(
                f"corpus {spec.name!r}: the chat template changes the text of a {message['role']} message, so its "
                "tokens cannot be told from the template's; give a template that keeps contents as they are"
            )
        spans.append((cursor, cursor + len(form)))
        cursor += len(form) + len(following)
    return spans


def _cut(sequence: ProbeSequence, max_tokens: int) -> ProbeSequence:
    return ProbeSequence(
        sequence.token_T[:max_tokens], sequence.role_T[:max_tokens], sequence.template_T[:max_tokens]
    )
