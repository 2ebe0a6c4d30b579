"""The paired pass: every stream method of every pair of one base, in one reading of the probe tokens.

For each batch the base runs once and each tuned model once; all folds are fed from these forwards.
K organisms of one base therefore cost K + 1 forwards instead of 2 K, and further methods cost only
their own arithmetic. Blocks above the last layer that any fold asks for are not run.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffing_core.activations import ActivationStore
from diffing_core.blocks import Side, StreamContext, TokenBlock, pieces, rows_of_residuals, rows_per_block, rows_per_tile, tiles
from diffing_core.capture import Room, capture_residuals
from diffing_core.corpus import ProbeCorpus, TokenBatch
from diffing_core.errors import FAILS_ALONE, CorpusError, ModelLoadError
from diffing_core.lazy import torch
from diffing_core.methods.base import Fold, Inputs, Method, Need, ResumableFold, Tables
from diffing_core.models import ModelPair
from diffing_core.progress import track
from diffing_core.runs import Cost
from diffing_core.settings import Settings
from diffing_core.subject import Subject

TOKENS_PER_BATCH = 4096
RESIDUAL_BYTES = 4 * 2**30
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MethodResult:
    """What one method made of one pair: its tables, or the error that ended it alone."""

    pair: Any
    method: Method
    settings: Settings
    tables: Tables
    cost: Cost
    error: Exception | None = None


@dataclass
class _Running:
    """A fold at work for one pair."""

    pair: ModelPair
    method: Method
    settings: Settings
    fold: Fold | None
    seconds: float = 0.0
    error: Exception | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        return () if self.fold is None else self.fold.layers

    @property
    def stored_rows(self) -> int:
        """Rows at the beginning of the corpus that the fold need not be shown."""
        return self.fold.stored_rows if isinstance(self.fold, ResumableFold) else 0

    def skip(self, n_rows: int) -> None:
        """Leaves out the first rows, only as many as `stored_rows`: of a fold that has none, none."""
        if self.error is None and isinstance(self.fold, ResumableFold):
            self.fold.skip(n_rows)

    def start(self, context: StreamContext) -> None:
        try:
            self.fold = self.method.start(context, self.settings)
        except FAILS_ALONE as error:
            self.fail(error)

    def update(self, block: TokenBlock) -> None:
        if self.error is not None:
            return
        began = time.perf_counter()
        try:
            self.fold.update(block)
        except FAILS_ALONE as error:
            self.fail(error)
        self.seconds += time.perf_counter() - began

    def result(self, corpus: ProbeCorpus, shared_s: float) -> MethodResult:
        began = time.perf_counter()
        tables: Tables = {}
        if self.error is None:
            try:
                tables = self.fold.finish()
            except FAILS_ALONE as error:
                self.fail(error)
        seconds = self.seconds + time.perf_counter() - began
        cost = Cost(len(corpus.sequences), corpus.n_tokens, seconds, shared_s)
        return MethodResult(self.pair.pair, self.method, self.settings, tables, cost, self.error)

    def fail(self, error: Exception) -> None:
        """Ends this method on this pair; the others go on."""
        logger.exception("method %s failed on %s; the others go on", self.method.name, self.pair.pair)
        self.error = error


@dataclass
class _Shared:
    """Time spent in forwards and heads, which no single method owns."""

    seconds: float = 0.0
    began: float = field(default=0.0, repr=False)

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self.began


def paired_pass(
    pairs: Sequence[ModelPair],
    corpus: ProbeCorpus,
    methods: Sequence[tuple[Method, Settings]],
    *,
    store: Path | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> Iterator[MethodResult]:
    """Runs stream methods over a corpus for pairs that share one base; yields a result per method.

    Args:
        pairs: loaded pairs; sides that are the same object run once per batch.
        store: folder for activation Parquet, needed only by the method `activations`.
        tokens_per_batch: padded tokens per forward, fewer where many subjects' residuals would not fit
            together; results do not depend on it.

    Raises:
        CorpusError: all tokens of the corpus are skipped.
    """
    if not corpus.n_tokens:
        raise CorpusError(f"corpus {corpus.name!r} shows no token: all are skipped; give longer texts or skip fewer tokens")
    shared = _Shared()
    with ActivationStore(store) if store else nullcontext() as shelf:
        running = [_begin(pair, method, settings, corpus, shelf) for pair in pairs for method, settings in methods]
        _feed(running, pairs, corpus, tokens_per_batch, shared)
        for each in running:
            yield each.result(corpus, shared.seconds)


def _feed(
    running: Sequence[_Running], pairs: Sequence[ModelPair], corpus: ProbeCorpus, tokens_per_batch: int, shared: _Shared
) -> None:
    """Shows every token of the corpus to every fold: a batch at a time, or as few as the vocabulary's size allows."""
    layers = sorted({layer for each in running for layer in each.layers} | _last_layer_if_wanted(running))
    readers = [each for each in running if Need.LOGPROBS in each.method.needs]
    others = [each for each in running if Need.LOGPROBS not in each.method.needs]
    vocab_size, device = max(pair.common_vocab for pair in pairs), pairs[0].base.device
    rows = rows_per_block(vocab_size, device), rows_per_tile(vocab_size, device)
    budget = min(tokens_per_batch, affordable_tokens(pairs, len(layers)))
    room = Room(corpus.most_tokens(budget))
    with torch.inference_mode(), track(sum(map(len, corpus.sequences)), "tokens", f"paired pass, {corpus.name}") as done:
        stored = min((each.stored_rows for each in running if each.error is None), default=0)
        for batch in corpus.batches(budget):
            stored -= corpus.n_shown(batch)
            if stored >= 0:
                _skip(batch, running, corpus)
                done(int(batch.mask_BT.sum()))
                continue
            facts = _token_facts(batch, corpus)
            with shared:
                going, states = _forward_all(running, batch, layers, facts, room)
            whole = _whole_blocks(going, states, facts)
            for piece in pieces(whole, rows_of_residuals(device, budget)) if others else ():
                _show(piece, others)
                del piece
            _show_pieces(whole, readers, rows, shared)
            del states, whole  # else logits would be alive together with the next batch's
            done(int(batch.mask_BT.sum()))


def _skip(batch: TokenBatch, running: Sequence[_Running], corpus: ProbeCorpus) -> None:
    """Passes over a batch whose rows every fold that still runs has from an earlier pass: no forward is needed."""
    for each in running:
        each.skip(corpus.n_shown(batch))


def affordable_tokens(pairs: Sequence[ModelPair], n_layers: int) -> int:
    """Tokens whose residuals of all subjects, which are alive together, take at most RESIDUAL_BYTES.

    Where this cuts batches smaller for a cohort than for a pair alone, their results agree to rounding only.
    """
    subjects = {id(side): side for pair in pairs for side in (pair.base, pair.tuned)}
    value_bytes = sum(side.dtype.itemsize for side in subjects.values())
    return max(1, RESIDUAL_BYTES // (value_bytes * max(n_layers, 1) * pairs[0].base.d_model))


def _show(blocks: Mapping[int, TokenBlock], running: Sequence[_Running]) -> None:
    for each in running:
        if id(each.pair) in blocks:
            each.update(blocks[id(each.pair)])


def _show_pieces(
    whole: Mapping[int, TokenBlock], readers: Sequence[_Running], rows: tuple[int, int], shared: _Shared
) -> None:
    """Shows a batch to those that read log-probabilities, in pieces and tiles of so many rows."""
    block_rows, tile_rows = rows
    going = {id(each.pair) for each in readers if each.error is None}
    for piece in pieces({key: block for key, block in whole.items() if key in going}, block_rows):
        _show_tiles(piece, readers, tile_rows, shared)


def _show_tiles(
    blocks: dict[int, TokenBlock], readers: Sequence[_Running], tile_rows: int, shared: _Shared
) -> None:
    """Reads the logits of a block, then shows it tile by tile; nothing of it is left when this returns."""
    with shared:
        for key, block in list(blocks.items()):
            going = [each for each in readers if id(each.pair) == key and each.error is None]
            try:
                if going:
                    block.base.logits(), block.tuned.logits()
                else:
                    del blocks[key]
            except FAILS_ALONE as error:
                del blocks[key]
                for each in going:
                    each.fail(error)
    for key, tile in tiles(blocks, tile_rows):
        _show({key: tile}, readers)


def _begin(
    pair: ModelPair, method: Method, settings: Settings, corpus: ProbeCorpus, store: ActivationStore | None
) -> _Running:
    context = StreamContext(
        base=pair.base,
        tuned=pair.tuned,
        tokenizer=pair.tokenizer,
        corpus=corpus,
        n_layers=pair.base.n_layers,
        d_model=pair.base.d_model,
        vocab_size=pair.common_vocab,
        store=store,
    )
    running = _Running(pair, method, settings, None)
    for side, subject in (("base", pair.base), ("tuned model", pair.tuned)):
        if corpus.largest_id >= subject.vocab_size:
            running.fail(
                CorpusError(
                    f"corpus {corpus.name!r} has token id {corpus.largest_id}, but the {side} of {pair.pair} has embeddings for "
                    f"{subject.vocab_size} ids only; name in the registry a tokenizer that belongs to both"
                )
            )
            return running
    running.start(context)
    return running


def timed_run(pair: ModelPair, method: Method, settings: Settings, inputs: Inputs) -> MethodResult:
    """Runs a method that is no stream method, under the same rule: its failure ends it alone."""
    began = time.perf_counter()
    tables: Tables = {}
    error: Exception | None = None
    try:
        tables = method.run(inputs, settings)
    except FAILS_ALONE as failure:
        logger.exception("method %s failed on %s; the others go on", method.name, pair.pair)
        error = failure
    return MethodResult(pair.pair, method, settings, tables, Cost(compute_s=time.perf_counter() - began), error)


def _last_layer_if_wanted(running: Sequence[_Running]) -> set[int]:
    return {each.pair.base.n_layers - 1 for each in running if Need.LOGPROBS in each.method.needs}


def _forward_all(
    running: Sequence[_Running], batch: TokenBatch, layers: Sequence[int], facts: Mapping[str, np.ndarray], room: Room
) -> tuple[list[ModelPair], dict[int, dict[int, Any]]]:
    """Pairs that still go on, and residuals of the tokens that folds are shown, {id(subject): {layer: [N, D]}}.

    A subject in several pairs runs once; one whose forward fails ends its pairs alone.
    """
    going = {id(each.pair): each.pair for each in running if each.error is None}
    subjects = {id(side): side for pair in going.values() for side in (pair.base, pair.tuned)}
    states: dict[int, dict[int, Any]] = {}
    for key, subject in subjects.items():
        try:
            states[key] = capture_residuals(subject, batch, layers, facts["place_N"], room)
            _require_finite(states[key], subject, facts)
        except FAILS_ALONE as error:
            for each in running:
                if key in (id(each.pair.base), id(each.pair.tuned)) and each.error is None:
                    each.fail(error)
    able = [pair for pair in going.values() if id(pair.base) in states and id(pair.tuned) in states]
    return able, states


def _require_finite(states: Mapping[int, Any], subject: Subject, facts: Mapping[str, np.ndarray]) -> None:
    """Raises ModelLoadError where the deepest residuals hold NaN or infinite values, which every method would take on."""
    if not states:
        return
    layer = max(states)
    broken = torch.nonzero(~torch.isfinite(states[layer]).all(-1))[:, 0]
    if len(broken):
        where = f"text {facts['sequence_N'][broken[0]]}, position {facts['position_N'][broken[0]]}"
        raise ModelLoadError(
            f"{subject.adapter or 'the model'} gives NaN or infinite values after block {layer} at {len(broken)} token(s), first of "
            f"{where}; load it in float32 or bfloat16, or mend its weights"
        )


def _whole_blocks(
    pairs: Sequence[ModelPair], states: Mapping[int, Mapping[int, Any]], facts: Mapping[str, np.ndarray]
) -> dict[int, TokenBlock]:
    """A batch's tokens that folds are shown, {id(pair): block}, the same in each; sides in common are shared."""
    if not len(facts["token_N"]) or not pairs:
        return {}
    sides: dict[tuple[int, int], Side] = {}
    for pair in pairs:
        for subject in (pair.base, pair.tuned):
            key = (id(subject), pair.common_vocab)
            if key not in sides:
                sides[key] = Side(states[id(subject)], subject.n_layers - 1, subject.readout, pair.common_vocab)
    device = pairs[0].base.device
    shared = {
        **{name: torch.from_numpy(facts[name]).to(device) for name in ("token_N", "next_N")},
        **{name: facts[name] for name in ("sequence_N", "position_N", "role_N", "template_N")},
    }
    return {
        id(pair): TokenBlock(
            **shared, base=sides[id(pair.base), pair.common_vocab], tuned=sides[id(pair.tuned), pair.common_vocab]
        )
        for pair in pairs
    }


def _token_facts(batch: TokenBatch, corpus: ProbeCorpus) -> dict[str, np.ndarray]:
    """Per token that folds are shown, in the order in which a mask flattens a batch: row by row.

    `place_N` is its index in the flattened batch.
    """
    chosen = [corpus.sequences[index] for index in batch.sequences]
    lengths = [len(sequence) for sequence in chosen]
    token_N = np.concatenate([sequence.token_T for sequence in chosen]).astype(np.int64)
    next_N = np.roll(token_N, -1)
    next_N[np.cumsum(lengths) - 1] = -1
    facts = {
        "place_N": np.flatnonzero(batch.mask_BT),
        "token_N": token_N,
        "next_N": next_N,
        "sequence_N": np.repeat(np.asarray(batch.sequences, np.int64), lengths),
        "position_N": np.concatenate([np.arange(length, dtype=np.int64) for length in lengths]),
        "role_N": np.concatenate([sequence.role_T for sequence in chosen]),
        "template_N": np.concatenate([sequence.template_T for sequence in chosen]),
    }
    shown_N = facts["position_N"] >= corpus.first_seen_S[facts["sequence_N"]]
    return {name: values[shown_N] for name, values in facts.items()}
