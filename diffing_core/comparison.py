"""Comparing pairs: from registry entries to finished results in the lake, with everything shared that can be.

`compare` is what a Dagster run calls for the pairs of one base model; `run_methods` is the same work for
a notebook, without registry, lake or disk.
"""

import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffing_core.activations import name_of
from diffing_core.corpus import ProbeCorpus, load_corpus
from diffing_core.errors import NotComputableError
from diffing_core.expression import EXPRESSION, ExpressionSettings, measure_expression
from diffing_core.findings import FINDINGS, findings_table
from diffing_core.identity import RunKey
from diffing_core.lake import Lake
from diffing_core.methods import get_method
from diffing_core.methods.base import Inputs, Method, Need, Tables
from diffing_core.models import Cohort, ModelPair, load_cohort
from diffing_core.paired_pass import METHOD_FAILURES, MethodResult, paired_pass, timed_run
from diffing_core.pairs import Pair
from diffing_core.registry import Corpus, Organism, Registry
from diffing_core.runs import Cost
from diffing_core.settings import Settings

if TYPE_CHECKING:
    import polars as pl

EXPRESSION_VERSION = "1"
logger = logging.getLogger(__name__)


@dataclass
class Outcome:
    """What became of one method on one pair, over all its corpora."""

    pair: Pair
    method: Method
    results: list[tuple[RunKey, MethodResult]] = field(default_factory=list)
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
                yield _ran(model_pair, method, settings, registry, lake)


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
    pair: ModelPair, organism: Organism, settings: ExpressionSettings, lake: Lake
) -> dict[str, Any]:
    """Measures, stores and returns how far a finetune shows its behaviour inside and outside its domain."""
    began = time.perf_counter()
    table = measure_expression(pair, organism, settings)
    key = RunKey(
        pair=pair.pair,
        method="expression",
        version=EXPRESSION_VERSION,
        settings_id=settings.settings_id(),
        step="expression",
        **_sides(pair),
    )
    lake.write_result(key, {EXPRESSION: table}, settings, Cost(compute_s=time.perf_counter() - began))
    return table.to_pylist()[0]


def load_corpora(pair: Pair, tokenizer: Any, registry: Registry) -> list[ProbeCorpus]:
    """The probe corpora registered for a pair: its variant's, or its model's."""
    return [_load(spec, pair.model, tokenizer, registry) for spec in _corpora_of(pair, tokenizer, registry)]


def _corpora_of(pair: Pair, tokenizer: Any, registry: Registry) -> list[Corpus]:
    names = registry.variant(pair).corpora or registry.model(pair.model).corpora
    specs = [registry.corpus(name) for name in names]
    usable = [spec for spec in specs if spec.kind == "text" or tokenizer.chat_template]
    if not usable:
        raise NotComputableError(
            f"{pair}: no probe corpus to read: the model names {list(names)}"
            + (", all of them chats, and its tokenizer has no chat template" if specs else "")
            + "; name a text corpus in the model's `corpora`"
        )
    return usable


def _load(spec: Corpus, model_name: str, tokenizer: Any, registry: Registry) -> ProbeCorpus:
    model = registry.model(model_name)
    options = {} if model.thinking is None else {"enable_thinking": model.thinking}
    path = registry.local_path(spec.source, model_name)
    corpus = load_corpus(spec, path, tokenizer, template_options=options)
    return replace(corpus, skip_first_tokens=model.skip_first_tokens)


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
    for spec, sharing in readers.items():
        by_pair = {each.pair: each for each in sharing}
        with _failing(outcomes.values(), sharing):
            corpus = _load(spec, sharing[0].pair.model, sharing[0].tokenizer, registry)
            for result in paired_pass(sharing, corpus, streams, store=store):
                key = run_key(by_pair[result.pair], result.method, result.settings)
                key = key.with_corpus(corpus.name, corpus.content_hash)
                _store(outcomes[result.pair, result.method.name], key, result, lake)
    yield from outcomes.values()


@contextmanager
def _failing(outcomes: Collection[Outcome], pairs: Sequence[ModelPair]) -> Iterator[None]:
    """A probe that cannot be read or run fails these pairs' outcomes alone."""
    try:
        yield
    except METHOD_FAILURES as error:
        affected = {each.pair for each in pairs}
        logger.exception("no probing of %s", ", ".join(sorted(map(str, affected))))
        for outcome in outcomes:
            if outcome.pair in affected:
                outcome.error = outcome.error or error


def _ran(pair: ModelPair, method: Method, settings: Settings, registry: Registry, lake: Lake) -> Outcome:
    """A live or weights method on one pair."""
    outcome = Outcome(pair.pair, method)
    result = timed_run(pair, method, settings, Inputs(method, _suppliers(pair, registry)))
    _store(outcome, run_key(pair, method, settings), result, lake)
    return outcome


def _suppliers(pair: ModelPair, registry: Registry) -> dict[Need, Any]:
    from diffing_core.weights import WeightPair

    return {Need.MODELS: lambda: pair, Need.WEIGHTS: lambda: WeightPair.of(pair.pair, registry)}


def run_key(pair: ModelPair, method: Method, settings: Settings) -> RunKey:
    """Identity of a method's result on a loaded pair, before a corpus is named."""
    return RunKey(
        pair=pair.pair,
        method=method.name,
        version=method.version,
        settings_id=settings.settings_id(),
        **_sides(pair),
    )


def _sides(pair: ModelPair) -> dict[str, str]:
    """What was compared: the weights of each side, and the number format that they ran in."""
    return {
        "model_revision": f"{pair.base_revision}@{name_of(pair.base.dtype)}",
        "adapter_hash": f"{pair.adapter_hash}@{name_of(pair.tuned.dtype)}",
    }


def _store(outcome: Outcome, key: RunKey, result: MethodResult, lake: Lake) -> None:
    """Writes one result; a result that fails its own table's check counts as the method's failure."""
    error = result.error
    if error is None:
        try:
            write_result(lake, key, result)
            outcome.results.append((key, result))
            return
        except METHOD_FAILURES as refused:
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

