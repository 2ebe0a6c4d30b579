"""Evaluation as assets: null calibration, then a hypothesis and a grade per pair and evidence arm."""

from collections.abc import Callable, Iterator
from typing import Any

import dagster as dg

from diffing_assets.keys import CALIBRATED, EXPRESSED, FINETUNE, OWNERS, diff_key, grade_key, hypothesis_key
from diffing_assets.partitions import PAIRS, requested_pairs
from diffing_assets.report import PairReport, results_of
from diffing_assets.resources import Workspace
from diffing_assets.shown import column_schema, rows_table
from diffing_core.agents.calibration import CALIBRATION
from diffing_core.agents.hypothesis import HYPOTHESES, HYPOTHESIS_SCORES
from diffing_core.evaluation import ALL, VERSION, Evaluator, evidence_arms, methods_of
from diffing_core.graders import GRADES
from diffing_core.methods import get_method
from diffing_core.pairs import Pair
from diffing_core.tables import TableSpec

Evaluation = Callable[[Evaluator, Pair, str], dict[str, Any]]


@dg.asset(
    key=CALIBRATED,
    deps=[diff_key(get_method(name)) for name in methods_of(ALL)],
    group_name="hypotheses",
    owners=OWNERS,
    kinds={"parquet"},
    code_version=VERSION,
    metadata={"dagster/column_schema": column_schema([CALIBRATION])},
)
def calibration(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
    """Evidence scores of the null arms: how strong the same evidence looks where nothing narrow changed."""
    pairs = [Pair.parse(key) for key in context.instance.get_dynamic_partitions(PAIRS.name)]
    evaluator = Evaluator(workspace.registry(), workspace.lake())
    n_nulls = evaluator.calibrate(pairs, evidence_arms())
    return dg.MaterializeResult(metadata={"null_pairs": n_nulls, "evidence_arms": len(evidence_arms())})


def hypotheses_assets() -> dg.AssetsDefinition:
    """`hypotheses/<arm>` for every method and for all of them together."""
    return _per_arm("hypotheses", [_hypothesis_spec(arm) for arm in evidence_arms()], _hypothesise)


def grades_assets() -> dg.AssetsDefinition:
    """`grades/<arm>` for every hypothesis."""
    return _per_arm("grades", [_grade_spec(arm) for arm in evidence_arms()], _grade)


def _per_arm(name: str, specs: list[dg.AssetSpec], evaluate: Evaluation) -> dg.AssetsDefinition:
    """One asset per evidence arm, all in one step of which any part can be run; a pair that fails, fails alone."""

    @dg.multi_asset(name=name, specs=specs, can_subset=True, backfill_policy=dg.BackfillPolicy.single_run())
    def evaluated(context: dg.AssetExecutionContext, workspace: Workspace) -> Iterator[dg.MaterializeResult]:
        evaluator = Evaluator(workspace.registry(), workspace.lake())
        pairs = requested_pairs(context, evaluator.registry)
        reports = [PairReport(context, spec.key) for spec in specs if spec.key in context.selected_asset_keys]
        for report in reports:
            for pair in pairs:
                with report.of(pair) as shown:
                    shown |= evaluate(evaluator, pair, report.key.path[-1])
        yield from results_of(reports)

    return evaluated


def _hypothesise(evaluator: Evaluator, pair: Pair, arm: str) -> dict[str, Any]:
    row = evaluator.hypothesise(pair, arm)
    shown = ("verdict", "description", "candidate", "score", "threshold", "confidence", "n_findings", "n_nulls")
    return {name: row[name] for name in shown}


def _grade(evaluator: Evaluator, pair: Pair, arm: str) -> dict[str, Any]:
    return {"grades": rows_table(evaluator.grade(pair, arm))}


def _hypothesis_spec(arm: str) -> dg.AssetSpec:
    said = "all methods together" if arm == ALL else f"`{arm}` alone"
    return _spec(
        hypothesis_key(arm),
        [CALIBRATED, *(diff_key(get_method(name)) for name in methods_of(arm))],
        f"What an investigator concludes from {said}: a claim, or silence below the null threshold.",
        [HYPOTHESES, HYPOTHESIS_SCORES],
    )


def _grade_spec(arm: str) -> dg.AssetSpec:
    return _spec(
        grade_key(arm),
        [hypothesis_key(arm), FINETUNE, EXPRESSED],
        f"How right the hypothesis from `{arm}` is, against the written ground truth.",
        [GRADES],
    )


def _spec(key: dg.AssetKey, deps: list[dg.AssetKey], description: str, tables: list[TableSpec]) -> dg.AssetSpec:
    return dg.AssetSpec(
        key=key,
        deps=deps,
        group_name=key.path[0],
        description=description,
        code_version=VERSION,
        skippable=True,
        owners=OWNERS,
        kinds={"parquet"},
        partitions_def=PAIRS,
        metadata={"dagster/column_schema": column_schema(tables)},
    )
