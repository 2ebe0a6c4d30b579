"""Evaluation as assets: null calibration, then a hypothesis and a grade per pair and evidence arm."""

from collections.abc import Iterator

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

ONE_RUN = dg.BackfillPolicy.single_run()


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

    @dg.multi_asset(
        name="hypotheses",
        specs=[_hypothesis_spec(arm) for arm in evidence_arms()],
        can_subset=True,
        backfill_policy=ONE_RUN,
    )
    def hypothesise(context: dg.AssetExecutionContext, workspace: Workspace) -> Iterator[dg.MaterializeResult]:
        evaluator = Evaluator(workspace.registry(), workspace.lake())
        pairs = requested_pairs(context, evaluator.registry)
        reports = [PairReport(context, hypothesis_key(arm)) for arm in _selected(context, hypothesis_key)]
        for report in reports:
            for pair in pairs:
                with report.of(pair) as shown:
                    shown |= _hypothesis_metadata(evaluator.hypothesise(pair, report.key.path[-1]))
        yield from results_of(reports)

    return hypothesise


def grades_assets() -> dg.AssetsDefinition:
    """`grades/<arm>` for every hypothesis."""

    @dg.multi_asset(
        name="grades",
        specs=[_grade_spec(arm) for arm in evidence_arms()],
        can_subset=True,
        backfill_policy=ONE_RUN,
    )
    def grade(context: dg.AssetExecutionContext, workspace: Workspace) -> Iterator[dg.MaterializeResult]:
        evaluator = Evaluator(workspace.registry(), workspace.lake())
        pairs = requested_pairs(context, evaluator.registry)
        reports = [PairReport(context, grade_key(arm)) for arm in _selected(context, grade_key)]
        for report in reports:
            for pair in pairs:
                with report.of(pair) as shown:
                    shown["grades"] = rows_table(evaluator.grade(pair, report.key.path[-1]))
        yield from results_of(reports)

    return grade


def _hypothesis_spec(arm: str) -> dg.AssetSpec:
    said = "all methods together" if arm == ALL else f"`{arm}` alone"
    return dg.AssetSpec(
        key=hypothesis_key(arm),
        deps=[CALIBRATED, *(diff_key(get_method(name)) for name in methods_of(arm))],
        group_name="hypotheses",
        description=f"What an investigator concludes from {said}: a claim, or silence below the null threshold.",
        code_version=VERSION,
        skippable=True,
        owners=OWNERS,
        kinds={"parquet"},
        partitions_def=PAIRS,
        metadata={"dagster/column_schema": column_schema([HYPOTHESES, HYPOTHESIS_SCORES])},
    )


def _grade_spec(arm: str) -> dg.AssetSpec:
    return dg.AssetSpec(
        key=grade_key(arm),
        deps=[hypothesis_key(arm), FINETUNE, EXPRESSED],
        group_name="grades",
        description=f"How right the hypothesis from `{arm}` is, against the written ground truth.",
        code_version=VERSION,
        skippable=True,
        owners=OWNERS,
        kinds={"parquet"},
        partitions_def=PAIRS,
        metadata={"dagster/column_schema": column_schema([GRADES])},
    )


def _selected(context: dg.AssetExecutionContext, key_of) -> list[str]:
    return [arm for arm in evidence_arms() if key_of(arm) in context.selected_asset_keys]


def _hypothesis_metadata(row: dict[str, object]) -> dict[str, object]:
    shown = ("verdict", "description", "candidate", "score", "threshold", "confidence", "n_findings", "n_nulls")
    return {name: row[name] for name in shown if row[name] is not None}
