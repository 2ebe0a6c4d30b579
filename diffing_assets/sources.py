"""Sources: finetunes and probe corpora as observed assets, and how far each finetune shows its behaviour."""

from collections.abc import Iterator

import dagster as dg

from diffing_assets.keys import EXPRESSED, FINETUNE, OWNERS, PROBES
from diffing_assets.partitions import PAIRS, by_model, cohorts, requested_pairs
from diffing_assets.report import PairReport
from diffing_assets.resources import Workspace
from diffing_assets.shown import column_schema
from diffing_core.comparison import EXPRESSION_VERSION, store_expression
from diffing_core.errors import DiffingError
from diffing_core.expression import EXPRESSION, ExpressionSettings
from diffing_core.models import load_cohort, source_revisions
from diffing_core.pairs import Pair
from diffing_core.registry import Registry
from diffing_core.registry.datasets import corpus_version
from diffing_core.settings import short_hash


def data_version(pair: Pair, registry: Registry) -> str:
    """What a pair's results depend on beside code: its entries, both sides' weights, and the probe texts themselves.

    The base's revision is part of it, so a changed base model makes exactly its own pairs stale.
    """
    probes = registry.probes(pair)
    entries = [entry.model_dump(mode="json") for entry in (registry.model(pair.model), registry.variant(pair), *probes)]
    texts = [corpus_version(corpus, registry.place_of(corpus, pair.model)) for corpus in probes]
    asked = registry.organism(pair.organism).system_prompt
    return short_hash([entries, texts, asked, source_revisions(pair, registry)])


@dg.observable_source_asset(
    key=FINETUNE,
    partitions_def=PAIRS,
    group_name="sources",
    description="The registered finetunes; their data version is the content of adapter, base and probe corpora.",
    tags={"dagster/kind/huggingface": ""},
)
def finetune(context: dg.OpExecutionContext, workspace: Workspace) -> dg.DataVersionsByPartition:
    registry = workspace.registry()
    versions: dict[str, str] = {}
    for key in context.instance.get_dynamic_partitions(PAIRS.name):
        try:
            versions[key] = data_version(Pair.parse(key), registry)
        except DiffingError as error:
            context.log.warning("%s cannot be observed: %s", key, error)
    return dg.DataVersionsByPartition(versions)


def probe_corpora() -> dg.AssetSpec:
    """The texts that every pair of a base model is probed with."""
    return dg.AssetSpec(
        key=PROBES,
        group_name="sources",
        description="Probe corpora: texts and chats that have nothing to do with any finetune.",
        owners=OWNERS,
        kinds={"json"},
    )


@dg.asset(
    key=EXPRESSED,
    partitions_def=PAIRS,
    deps=[FINETUNE],
    group_name="sources",
    owners=OWNERS,
    kinds={"pytorch", "parquet"},
    code_version=EXPRESSION_VERSION,
    backfill_policy=cohorts(),
    pool="gpu",
    metadata={"dagster/column_schema": column_schema([EXPRESSION])},
)
def expression(context: dg.AssetExecutionContext, workspace: Workspace) -> Iterator[dg.MaterializeResult]:
    """Does the finetune show its behaviour inside its domain, and only there?

    A pair that shows nothing (silent) or shows it everywhere (broad) is labelled so: a method that finds
    nothing in a silent organism has not failed. Never shown to investigators.
    """
    registry, lake = workspace.registry(), workspace.lake()
    report = PairReport(context, EXPRESSED)
    for pairs in by_model(requested_pairs(context, registry)).values():
        cohort = load_cohort(pairs, registry)
        for pair, error in cohort.failed.items():
            report.failed(pair, error)
        for pair in cohort:
            with report.of(pair.pair) as shown:
                shown |= store_expression(pair, registry, ExpressionSettings(), lake)
    yield from report.results()
