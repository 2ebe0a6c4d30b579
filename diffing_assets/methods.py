"""The methods as assets, all derived from their declarations: one step per cohort, any subset of methods.

A run gets one pair, or in a backfill neighbouring pairs of a base; the base is loaded once, the paired
pass runs once per corpus, and each method's result is stored when it is complete. A pair that cannot be
loaded or a method that fails ends alone: the rest is stored and reported, and then the run says so.
"""

from collections.abc import Iterator

import dagster as dg

from diffing_assets.keys import BASE_ACTIVATIONS, FINETUNE, OWNERS, PROBES, diff_key
from diffing_assets.launch_form import form, settings_of
from diffing_assets.partitions import BASE_MODELS, PAIRS, by_model, cohorts, requested_pairs
from diffing_assets.report import PairReport, results_of
from diffing_assets.resources import Workspace
from diffing_assets.shown import column_schema, outcome_metadata
from diffing_core.comparison import Outcome, compare
from diffing_core.errors import FAILS_ALONE
from diffing_core.methods import all_methods, description_of
from diffing_core.methods.base import Method, Need

UPSTREAM = {
    Need.RESIDUALS: PROBES,
    Need.LOGPROBS: PROBES,
    Need.ACTIVATIONS: dg.AssetKey(["activations", "paired"]),
    Need.MODELS: None,
    Need.WEIGHTS: None,
    Need.FOLDER: None,
    Need.PEERS: None,  # a new finetune adds its own rows; it does not make those of all others stale
    Need.FINETUNES: None,  # known from the settings of a run only
}
KINDS = {"stream": "pytorch", "fit": "parquet", "live": "huggingface", "weights": "safetensors"}


def spec_of(method: Method) -> dg.AssetSpec:
    """The asset of one method."""
    upstream = {UPSTREAM[need] for need in method.needs} - {None}
    return dg.AssetSpec(
        key=diff_key(method),
        deps=[FINETUNE, *sorted(upstream, key=str)],
        group_name=diff_key(method).path[0],
        description=_description(method),
        code_version=method.version,
        skippable=True,
        owners=OWNERS,
        kinds={KINDS[method.kind], "parquet"},
        tags={"diffing/kind": method.kind},
        metadata={
            "dagster/column_schema": column_schema(method.tables),
            "reference": method.reference,
            "tables": ", ".join(f"raw.{spec.name}" for spec in method.tables),
        },
        partitions_def=PAIRS,
    )


def compare_assets() -> dg.AssetsDefinition:
    """All methods as one step that a person may run in part."""
    methods = list(all_methods().values())

    @dg.multi_asset(
        name="compare",
        specs=[spec_of(method) for method in methods],
        can_subset=True,
        config_schema=form(methods),
        backfill_policy=cohorts(),
        pool="gpu",
    )
    def compare_pairs(context: dg.AssetExecutionContext, workspace: Workspace) -> Iterator[dg.MaterializeResult]:
        wanted = [method for method in methods if diff_key(method) in context.selected_asset_keys]
        settings = settings_of([method.name for method in wanted], context.op_execution_context.op_config or {})
        reports = {method: PairReport(context, diff_key(method)) for method in wanted}
        for outcome in _compare_all(context, workspace, settings):
            if outcome.error is not None:
                reports[outcome.method].failed(outcome.pair, outcome.error)
            else:
                reports[outcome.method].done(outcome.pair, outcome_metadata(outcome))
                _report_base_model(context, outcome)
        yield from results_of(list(reports.values()))

    return compare_pairs


def base_activations() -> dg.AssetSpec:
    """Activations of base models: written by the first pair that needs them, shared by all the others."""
    return dg.AssetSpec(
        key=BASE_ACTIVATIONS,
        group_name="activations",
        description="Residual vectors of a base model on the probe corpora, shared by all its organisms.",
        owners=OWNERS,
        kinds={"parquet"},
        partitions_def=BASE_MODELS,
    )


def _compare_all(context: dg.AssetExecutionContext, workspace: Workspace, settings: dict) -> Iterator[Outcome]:
    registry = workspace.registry()
    lake = workspace.lake()
    for model, pairs in by_model(requested_pairs(context, registry)).items():
        context.log.info("%d pair(s) of base model %s, methods: %s", len(pairs), model, ", ".join(settings))
        try:
            yield from compare(pairs, settings, registry=registry, lake=lake, store=workspace.store)
        except FAILS_ALONE as error:
            context.log.exception("base model %s: none of its pairs could be compared", model)
            yield from (Outcome(pair, all_methods()[name], error=error) for pair in pairs for name in settings)


def _report_base_model(context: dg.AssetExecutionContext, outcome: Outcome) -> None:
    """Says that a base model's activations are stored, once material of one of its pairs is."""
    if outcome.method.findings is None:
        context.log_event(dg.AssetMaterialization(asset_key=BASE_ACTIVATIONS, partition=outcome.pair.model))


def _description(method: Method) -> str:
    tables = "\n".join(f"* `raw.{spec.name}`: {spec.doc}" for spec in method.tables)
    return f"{description_of(method)}\n\n{tables}"
