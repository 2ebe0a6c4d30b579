"""Comparing pairs: from registry entries to finished results in the lake, with everything shared that can be.

`compare` is what a Dagster run calls for the pairs of one base model; `run_methods` is the same work for
a notebook, without registry, lake or disk.
"""

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffing_core.activation_pairs import StoredPair
from diffing_core.activation_parts import name_of
from diffing_core.activations import ActivationStore
from diffing_core.chats import SWITCH
from diffing_core.checkpoints import token_id
from diffing_core.corpus import ProbeCorpus, load_corpus
from diffing_core.errors import FAILS_ALONE, NotComputableError
from diffing_core.expression import EXPRESSION, ExpressionSettings, measure_expression
from diffing_core.findings import FINDINGS, findings_table
from diffing_core.identity import RunKey
from diffing_core.lake import Lake
from diffing_core.methods import get_method
from diffing_core.methods.base import Inputs, Method, Need, Tables
from diffing_core.models import Cohort, ModelPair, load_cohort
from diffing_core.paired_pass import MethodResult, paired_pass, timed_run
from diffing_core.pairs import Pair
from diffing_core.registry import Corpus, Registry
from diffing_core.registry.schema import TRAINING
from diffing_core.runs import Cost
from diffing_core.serving import engine_of
from diffing_core.settings import Settings

if TYPE_CHECKING:
    import polars as pl

EXPRESSION_VERSION = "1"
REGISTERED = ("layers", "system_prompt", "thinking")
Streams = Sequence[tuple[Method, Settings]]
logger = logging.getLogger(__name__)


@dataclass
class Outcome:
    """What became of one method on one pair, over all its corpora."""

    pair: Pair
    method: Method
    results: list[tuple[RunKey, MethodResult]] = field(default_factory=list)
    probes: list[str] = field(default_factory=list)
    error: Exception | None = None

    @property
    def n_rows(self) -> int:
        """Rows written, all tables and corpora."""
        return sum(table.num_rows for _, result in self.results for table in result.tables.values())


def compare(
    pairs: Sequence[Pair],
    requested: Mapping[str, Settings],
    *,
    registry: Registry,
    lake: Lake,
    store: Path,
    device: Any = None,
) -> Iterator[Outcome]:
    """Runs the requested methods on pairs of one base model and stores every result as it is finished.

    A pair that cannot be loaded, a corpus that cannot be read and a method that fails end alone: their
    outcome carries the error, all others are stored.

    Args:
        requested: settings by method name.
        store: folder for activation Parquet.
    """
    methods = {get_method(name): settings for name, settings in requested.items()}
    cohort = load_cohort(pairs, registry, device=device)
    for pair, error in cohort.failed.items():
        yield from (Outcome(pair, method, error=error) for method in methods)
    for model_pair in cohort:
        for note in model_pair.notes:
            logger.warning("%s: %s", model_pair.pair, note)
    yield from _streamed(cohort, methods, registry, lake, store)
    for model_pair in cohort:
        for method, settings in methods.items():
            if method.kind != "stream":
                yield _ran(model_pair, method, settings, registry, lake, store)


def run_methods(pair: ModelPair, corpus: ProbeCorpus, names: Sequence[str]) -> "dict[str, pl.DataFrame]":
    """Stream methods with default settings over one corpus in one pass; frames by table name.

    `findings` holds all methods' findings, told apart by its column `method`.
    """
    import polars as pl

    frames: dict[str, pl.DataFrame] = {}
    shown = []
    methods = [get_method(name) for name in names]
    for result in paired_pass([pair], corpus, [(method, method.settings()) for method in methods]):
        if result.error is not None:
            raise result.error
        frames |= {name: pl.from_arrow(table) for name, table in result.tables.items()}
        if result.method.findings is not None:
            found = pl.from_arrow(findings_table(result.method.findings(result.tables, result.settings)))
            shown.append(found.select(pl.lit(result.method.name).alias("method"), pl.all()))
    return frames | ({FINDINGS.name: pl.concat(shown)} if shown else {})


def store_expression(
    pair: ModelPair, registry: Registry, settings: ExpressionSettings, lake: Lake
) -> dict[str, Any]:
    """Measures, stores and returns how far a finetune shows its behaviour inside and outside its domain."""
    began = time.perf_counter()
    settings = settled(settings, pair.pair, registry)
    table = measure_expression(pair, registry.organism(pair.pair.organism), settings)
    key = RunKey(
        pair=pair.pair,
        method="expression",
        version=EXPRESSION_VERSION,
        settings_id=settings.settings_id(),
        step="expression",
        **_sides(pair, live=True),
    )
    lake.write_result(key, {EXPRESSION: table}, settings, Cost(compute_s=time.perf_counter() - began))
    return table.to_pylist()[0]


def settled(settings: Settings, pair: Pair, registry: Registry) -> Settings:
    """The settings, with what the registry says of the pair where they leave it open.

    What is filled in is part of the settings' identity. It is the same for both sides of a pair.
    """
    filled: dict[str, Any] = {}
    for entry in (registry.model(pair.model), registry.organism(pair.organism), registry.variant(pair)):
        for name in REGISTERED:
            if getattr(settings, name, 0) is None and getattr(entry, name, None) is not None:
                filled[name] = getattr(entry, name)
    return type(settings)(**dict(settings) | filled)


def load_corpora(pair: Pair, tokenizer: Any, registry: Registry) -> list[ProbeCorpus]:
    """The probe corpora of a pair: its variant's, or its model's; and `training` where its organism says so."""
    return [_load(spec, pair.model, tokenizer, registry) for spec in _corpora_of(pair, tokenizer, registry)]


def _corpora_of(pair: Pair, tokenizer: Any, registry: Registry) -> list[Corpus]:
    specs = registry.probes(pair)
    usable = [spec for spec in specs if spec.kind == "text" or tokenizer.chat_template]
    if not usable:
        raise NotComputableError(
            f"{pair}: no probe corpus to read: the model names {[spec.name for spec in specs]}"
            + (", all of them chats, and its tokenizer has no chat template" if specs else "")
            + "; name a text corpus in the model's `corpora`"
        )
    return usable


def _load(spec: Corpus, model_name: str, tokenizer: Any, registry: Registry) -> ProbeCorpus:
    model = registry.model(model_name)
    thinking = model.thinking if spec.thinking is None else spec.thinking
    what = f"token_replacements of model {model_name}"
    replacements = {
        token_id(tokenizer, token, what): token_id(tokenizer, other, what)
        for token, other in model.token_replacements.items()
    }
    corpus = load_corpus(
        spec,
        registry.place_of(spec, model_name),
        tokenizer,
        template_options=model.template_options | ({} if thinking is None else {SWITCH: thinking}),
        replacements=replacements,
    )
    corpus = corpus.skipping(model.skip_first_tokens)
    logger.log(logging.WARNING if corpus.left_out else logging.INFO, "%s", corpus)
    return corpus


def _streamed(
    cohort: Cohort, methods: Mapping[Method, Settings], registry: Registry, lake: Lake, store: Path
) -> Iterator[Outcome]:
    streams = [(method, settings) for method, settings in methods.items() if method.kind == "stream"]
    if not streams or not cohort.pairs:
        return
    outcomes = {(each.pair, method.name): Outcome(each.pair, method) for each in cohort for method, _ in streams}
    readers: dict[Corpus, list[ModelPair]] = {}
    for pair in cohort:
        with _failing(outcomes.values(), [pair]):
            for spec in _corpora_of(pair.pair, pair.tokenizer, registry):
                readers.setdefault(spec, []).append(pair)
    for spec, reading in readers.items():
        corpus = None
        with _failing(outcomes.values(), reading):
            corpus = _load(spec, reading[0].pair.model, reading[0].tokenizer, registry)
        for own, sharing in _by_settings(reading, streams, registry) if corpus else ():
            with _failing(outcomes.values(), sharing):
                by_pair = {each.pair: each for each in sharing}
                for result in paired_pass(sharing, corpus, own, store=store):
                    key = run_key(by_pair[result.pair], result.method, result.settings)
                    key = key.with_corpus(corpus.name, corpus.content_hash)
                    outcome = outcomes[result.pair, result.method.name]
                    outcome.probes.append(str(corpus))
                    _store(outcome, key, result, lake)
    yield from outcomes.values()


def _by_settings(
    pairs: Sequence[ModelPair], streams: Streams, registry: Registry
) -> Iterable[tuple[Streams, list[ModelPair]]]:
    """Pairs that share all their settings share a pass; they differ where variants name layers of their own."""
    groups: dict[tuple[str, ...], tuple[Streams, list[ModelPair]]] = {}
    for pair in pairs:
        own = [(method, settled(settings, pair.pair, registry)) for method, settings in streams]
        ids = tuple(settings.settings_id() for _, settings in own)
        groups.setdefault(ids, (own, []))[1].append(pair)
    return groups.values()


@contextmanager
def _failing(outcomes: Collection[Outcome], pairs: Sequence[ModelPair]) -> Iterator[None]:
    """A probe that cannot be read or run fails these pairs' outcomes alone."""
    try:
        yield
    except FAILS_ALONE as error:
        affected = {each.pair for each in pairs}
        logger.exception("no probing of %s", ", ".join(sorted(map(str, affected))))
        for outcome in outcomes:
            if outcome.pair in affected:
                outcome.error = outcome.error or error


def _ran(
    pair: ModelPair, method: Method, settings: Settings, registry: Registry, lake: Lake, store: Path
) -> Outcome:
    """A method that is no stream method, on one pair."""
    outcome = Outcome(pair.pair, method)
    settings = settled(settings, pair.pair, registry)
    suppliers = _suppliers(pair, registry, store)
    key = cache(lambda: _key_with_data(pair, method, settings, suppliers))
    suppliers[Need.FOLDER] = lambda: lake.folder(key())
    result = timed_run(pair, method, settings, Inputs(method, suppliers))
    _store(outcome, key() if result.error is None else run_key(pair, method, settings), result, lake)
    return outcome


def _key_with_data(
    pair: ModelPair, method: Method, settings: Settings, suppliers: Mapping[Need, Callable[[], Any]]
) -> RunKey:
    """The data that a method reads is part of its result's identity."""
    key = run_key(pair, method, settings)
    for need in sorted(method.needs & {Need.ACTIVATIONS, Need.PEERS, Need.FINETUNES}, key=str):
        data = suppliers[need]()
        key = key.with_corpus(data.name, data.content_hash)
    return key


def _suppliers(pair: ModelPair, registry: Registry, store: Path) -> dict[Need, Any]:
    from diffing_core.peers import peers_of
    from diffing_core.weight_edits.finetunes import Finetunes
    from diffing_core.weights import WeightPair

    return {
        Need.MODELS: lambda: pair,
        Need.WEIGHTS: lambda: WeightPair.of(pair.pair, registry),
        Need.ACTIVATIONS: cache(lambda: _stored_pair(pair, registry, store)),
        Need.PEERS: cache(lambda: peers_of(pair.pair, registry)),
        Need.FINETUNES: cache(lambda: Finetunes(pair.pair.model, registry)),
    }


def _stored_pair(pair: ModelPair, registry: Registry, store: Path) -> StoredPair:
    """The stored activations of a pair on its probe corpora, `training` left out: what is fitted is evidence as a whole."""
    sides = ((side.revision, side.dtype) for side in (pair.base, pair.tuned))
    corpora = tuple(each for each in load_corpora(pair.pair, pair.tokenizer, registry) if each.name != TRAINING)
    return StoredPair(ActivationStore(store), *sides, corpora)


def run_key(pair: ModelPair, method: Method, settings: Settings) -> RunKey:
    """Identity of a method's result on a loaded pair, before a corpus is named."""
    return RunKey(
        pair=pair.pair,
        method=method.name,
        version=method.version,
        settings_id=settings.settings_id(),
        **_sides(pair, live=method.kind == "live"),
    )


def _sides(pair: ModelPair, *, live: bool) -> dict[str, str]:
    """What was compared: the weights of each side, the number format they ran in, and the engine that writes texts."""
    base, tuned = (engine_of(side) if live else "" for side in (pair.base, pair.tuned))
    return {
        "model_revision": f"{pair.base_revision}@{name_of(pair.base.dtype)}{base}",
        "adapter_hash": f"{pair.adapter_hash}@{name_of(pair.tuned.dtype)}{tuned}",
    }


def _store(outcome: Outcome, key: RunKey, result: MethodResult, lake: Lake) -> None:
    """Writes one result; a result that fails its own table's check counts as the method's failure."""
    error = result.error
    if error is None:
        try:
            write_result(lake, key, result)
            outcome.results.append((key, result))
            return
        except FAILS_ALONE as refused:
            logger.exception("method %s on %s: its result was refused", key.method, key.pair)
            error = refused
    outcome.error = outcome.error or error


def write_result(lake: Lake, key: RunKey, result: MethodResult) -> None:
    """Typed tables, findings, and last the row that declares them finished."""
    tables: Tables = result.tables
    stored = {spec: tables[spec.name] for spec in result.method.tables}
    if result.method.findings is not None:
        stored[FINDINGS] = findings_table(result.method.findings(tables, result.settings))
    lake.write_result(key, stored, result.settings, result.cost)

