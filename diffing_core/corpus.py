"""Probe corpora: texts or chats, tokenized once, with role, position and template flag of every token."""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from diffing_core import chats
from diffing_core.chats import ROLES, SWITCH
from diffing_core.documents import documents, drawn
from diffing_core.errors import CorpusError, NotComputableError
from diffing_core.registry import Corpus, HubRef

ASSISTANT = ROLES.index("assistant")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProbeSequence:
    """One tokenized document or chat: three arrays of one length, and the first position that methods may see."""

    token_T: np.ndarray
    role_T: np.ndarray
    template_T: np.ndarray
    start: int = 0

    def __len__(self) -> int:
        return len(self.token_T)

    @property
    def is_chat(self) -> bool:
        """Whether anybody speaks in it."""
        return bool(self.role_T.any())

    @property
    def answer_start(self) -> int | None:
        """Position of the first answer's first own token; None where nobody answers.

        Where its reasoning is written out, that is the reasoning's first: the place where a model begins to answer.
        """
        answer_A = np.flatnonzero((self.role_T == ASSISTANT) & ~self.template_T)
        return int(answer_A[0]) if len(answer_A) else None


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
        left_out: why chosen documents are not among the sequences, and how many.
        skip_first_tokens: leading tokens of every sequence that models read but no method sees (attention sinks).
    """

    name: str
    sequences: tuple[ProbeSequence, ...]
    n_documents: int
    left_out: Mapping[str, int] = field(default_factory=dict)
    skip_first_tokens: int = 0

    @cached_property
    def content_hash(self) -> str:
        """Hash of the very tokens, roles and flags, and of what is seen: the data part of a result's identity."""
        seen = f"skip {self.skip_first_tokens}" if self.skip_first_tokens else ""
        if any(sequence.start for sequence in self.sequences):
            seen += f" from {[sequence.start for sequence in self.sequences]}"
        digest = hashlib.sha256(seen.encode())
        for sequence in self.sequences:
            digest.update(len(sequence).to_bytes(8, "little"))
            for array in (sequence.token_T, sequence.role_T, sequence.template_T):
                digest.update(array.tobytes())
        return digest.hexdigest()[:12]

    @cached_property
    def key_S(self) -> np.ndarray:
        """64 bits of each sequence's tokens, uint64 [S]: they name a text wherever it stands in the corpus."""
        digests = [hashlib.blake2b(sequence.token_T.tobytes(), digest_size=8).digest() for sequence in self.sequences]
        return np.frombuffer(b"".join(digests), np.uint64)

    @cached_property
    def largest_id(self) -> int:
        """Largest token id that occurs; −1 where there is no token."""
        return max((int(sequence.token_T.max(initial=-1)) for sequence in self.sequences), default=-1)

    @cached_property
    def first_seen_S(self) -> np.ndarray:
        """The position from which methods see each sequence, int64 [S]; models read what is before it too."""
        starts = [max(sequence.start, self.skip_first_tokens) for sequence in self.sequences]
        return np.asarray(starts, np.int64)

    @cached_property
    def n_tokens(self) -> int:
        """Tokens that methods see; nothing is padded here."""
        return int(self._seen_S.sum())

    def n_shown(self, batch: "TokenBatch") -> int:
        """Tokens of a batch that methods see."""
        return int(self._seen_S[list(batch.sequences)].sum())

    def sequences_within(self, token_limit: int) -> int:
        """How many leading sequences show at most `token_limit` tokens: a cut that batching cannot move."""
        return int(np.searchsorted(np.cumsum(self._seen_S), token_limit, side="right"))

    def __str__(self) -> str:
        """What was read and what was not, in one line."""
        left = "".join(f"; {n} left out: {why}" for why, n in sorted(self.left_out.items()))
        return f"{self.name}: {len(self.sequences)} of {self.n_documents} documents{left}"

    def skipping(self, n_tokens: int) -> "ProbeCorpus":
        """The corpus without the first tokens of every sequence; sequences of which nothing is left are left out, counted.

        Raises:
            CorpusError: nothing is left of any.
        """
        whole = replace(self, skip_first_tokens=n_tokens)
        kept = [sequence for sequence, first in zip(self.sequences, whole.first_seen_S, strict=True) if len(sequence) > first]
        n_lost = len(self.sequences) - len(kept)
        if not kept:
            raise CorpusError(
                f"corpus {self.name!r}: none of its {n_lost} document(s) is longer than the {n_tokens} tokens that "
                "skip_first_tokens of the model leaves out; point it at longer texts"
            )
        why = {f"no token after the first {n_tokens}": n_lost} if n_lost else {}
        return replace(whole, sequences=tuple(kept), left_out={**self.left_out, **why})

    @cached_property
    def _seen_S(self) -> np.ndarray:
        lengths_S = np.asarray([len(sequence) for sequence in self.sequences], np.int64)
        return np.maximum(0, lengths_S - self.first_seen_S)

    def most_tokens(self, token_budget: int) -> int:
        """No batch has more tokens, padded ones apart."""
        lengths = [len(sequence) for sequence in self.sequences]
        return min(sum(lengths), max(token_budget, *lengths))

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
    spec: Corpus,
    place: Path | HubRef | None,
    tokenizer: Any,
    *,
    template_options: Mapping[str, Any] | None = None,
    replacements: Mapping[int, int] | None = None,
) -> ProbeCorpus:
    """Reads a registered corpus from where its files are (None: its entry holds the texts).

    At most `max_sequences` documents are drawn (seeded, uniformly, in one read), kept in source order.
    Those that cannot be used are counted in `left_out`, with the reason.

    Args:
        template_options: for the chat template.
        replacements: {token id: token id that both models read in its place}.

    Raises:
        CorpusError: nothing usable remains.
    """
    chosen, n_documents = drawn(documents(spec, place), spec.max_sequences, spec.seed)
    options = template_options or {}

    def sequence(document: Any) -> ProbeSequence:
        encoded = _encoded(document, tokenizer, spec, options)
        start = 0 if spec.pre_assistant_tokens is None else _before_answer(encoded, spec)
        return _replaced(_cut(encoded, start, spec.min_tokens, spec.max_tokens), replacements or {})

    probe = _probe(spec.name, chosen, n_documents, sequence)
    if SWITCH in options and spec.kind == "chat" and not any(_heeds_thinking(each, tokenizer, spec, options) for each in chosen):
        logger.warning(
            "corpus %s: thinking %s changes nothing: no chat of it holds reasoning or ends with a question, or the chat "
            "template does not ask for %s", spec.name, "on" if options[SWITCH] else "off", SWITCH
        )
    return probe


def corpus_of_texts(texts: Iterable[str], tokenizer: Any, *, name: str = "texts", max_tokens: int = 128) -> ProbeCorpus:
    """A corpus of plain texts, for notebooks and tests; texts of fewer than two tokens are left out and counted."""
    given = list(texts)
    return _probe(name, given, len(given), lambda text: _cut(_text_sequence(text, tokenizer), 0, 2, max_tokens))


def read_texts(spec: Corpus, place: Path | HubRef | None, limit: int) -> list[str]:
    """The first `limit` documents as plain text; chats are their contents, one line each."""
    spec = spec.model_copy(update={"read_at_most": min(limit, spec.read_at_most or limit)})
    return [
        "\n".join(str(message["content"]) for message in each) if isinstance(each, list) else str(each or "")
        for each in documents(spec, place)
    ]


def _probe(name: str, chosen: list[Any], n_documents: int, sequence_of: Callable[[Any], ProbeSequence]) -> ProbeCorpus:
    """The corpus of those documents that can be used, the others counted by reason; CorpusError if none can."""
    sequences: list[ProbeSequence] = []
    left_out: Counter[str] = Counter()
    for document in chosen:
        try:
            sequences.append(sequence_of(document))
        except NotComputableError as reason:
            left_out[str(reason)] += 1
    if not sequences:
        reasons = "; ".join(f"{n} left out: {why}" for why, n in left_out.most_common(3)) or "it is empty"
        raise CorpusError(
            f"corpus {name!r}: none of {n_documents} document(s) can be used ({reasons}); name another column, "
            "point it at longer texts or lower min_tokens"
        )
    return ProbeCorpus(name, tuple(sequences), n_documents, dict(left_out))


def _encoded(document: Any, tokenizer: Any, spec: Corpus, options: Mapping[str, Any]) -> ProbeSequence:
    """Raises NotComputableError for a document that is not what the corpus says, or that the template cannot say."""
    if spec.kind == "chat":
        return ProbeSequence(*chats.encode(_messages(document, spec), tokenizer, **options))
    if not isinstance(document, str):
        raise NotComputableError(f"column {spec.column!r} holds a {type(document).__name__}, not a text")
    return _text_sequence(document, tokenizer)


def _messages(document: Any, spec: Corpus) -> list[chats.Message]:
    messages = chats.check_messages(document)
    return chats.first_exchange(messages) if spec.first_exchange_only else messages


def _heeds_thinking(document: Any, tokenizer: Any, spec: Corpus, options: Mapping[str, Any]) -> bool:
    try:
        return chats.heeds_thinking(_messages(document, spec), tokenizer, **options)
    except NotComputableError:
        return False


def _text_sequence(text: str, tokenizer: Any) -> ProbeSequence:
    token_T = np.asarray(tokenizer(chats.check_whole(text))["input_ids"], dtype=np.int32)
    return ProbeSequence(token_T, np.zeros(len(token_T), np.int8), np.zeros(len(token_T), bool))


def _before_answer(sequence: ProbeSequence, spec: Corpus) -> int:
    """The position `pre_assistant_tokens` before the first answer's first own token."""
    answer = sequence.answer_start
    if answer is None or answer > spec.context_tokens:
        raise NotComputableError(f"no answer begins within {spec.context_tokens} tokens")
    return max(0, answer - spec.pre_assistant_tokens)


def _cut(sequence: ProbeSequence, start: int, min_tokens: int, max_tokens: int) -> ProbeSequence:
    """The sequence as far as it is read, seen from `start`; refused if less than `min_tokens` of it is seen."""
    end = min(len(sequence), start + max_tokens)
    if end - start < min_tokens:
        raise NotComputableError(f"shorter than {min_tokens} tokens")
    return ProbeSequence(sequence.token_T[:end], sequence.role_T[:end], sequence.template_T[:end], start)


def _replaced(sequence: ProbeSequence, replacements: Mapping[int, int]) -> ProbeSequence:
    token_T = sequence.token_T.copy()
    for token, other in replacements.items():
        token_T[sequence.token_T == token] = other
    return replace(sequence, token_T=token_T)
