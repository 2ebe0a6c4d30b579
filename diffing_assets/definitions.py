"""Everything Dagster loads: sources -> activations, diffs -> hypotheses -> grades -> reports."""

import dagster as dg

from diffing_assets import automation, evaluation, methods, reports, sources
from diffing_assets.resources import Workspace

ASSETS = [
    sources.finetune,
    sources.probe_corpora(),
    sources.expression,
    methods.base_activations(),
    methods.compare_assets(),
    evaluation.calibration,
    evaluation.hypotheses_assets(),
    evaluation.grades_assets(),
    *reports.collected_tables(),
    reports.marts,
    reports.site,
]

defs = dg.Definitions(
    assets=automation.with_policy(ASSETS),
    sensors=automation.sensors(),
    resources={"workspace": Workspace(), "dbt": reports.dbt_resource()},
    executor=dg.in_process_executor,
)
