"""Asset keys and groups, and which asset writes which table: names that people and dbt rely on."""

import dagster as dg

from diffing_core.agents.calibration import CALIBRATION
from diffing_core.agents.hypothesis import HYPOTHESES, HYPOTHESIS_SCORES
from diffing_core.evaluation import evidence_arms
from diffing_core.expression import EXPRESSION
from diffing_core.findings import FINDINGS
from diffing_core.graders import GRADES
from diffing_core.methods import all_methods
from diffing_core.methods.base import Method
from diffing_core.runs import RUNS
from diffing_core.warehouse import ORGANISMS

FINETUNE = dg.AssetKey(["sources", "finetune"])
PROBES = dg.AssetKey(["sources", "probe_corpora"])
EXPRESSED = dg.AssetKey(["sources", "expression"])
BASE_ACTIVATIONS = dg.AssetKey(["activations", "base"])
CALIBRATED = dg.AssetKey(["hypotheses", "calibration"])
SITE = dg.AssetKey(["reports", "site"])
OWNERS = ["team:diffing"]


def diff_key(method: Method) -> dg.AssetKey:
    """Material goes under `activations`, evidence under `diffs`."""
    return dg.AssetKey(["activations", "paired"] if method.findings is None else ["diffs", method.name])


def hypothesis_key(arm: str) -> dg.AssetKey:
    """The hypothesis drawn from one evidence arm."""
    return dg.AssetKey(["hypotheses", arm])


def grade_key(arm: str) -> dg.AssetKey:
    """The grade of that hypothesis."""
    return dg.AssetKey(["grades", arm])


def table_sources() -> dict[str, list[str]]:
    """Asset path by table name, for tables that a single asset writes."""
    paths = {spec.name: diff_key(method).path for method in all_methods().values() for spec in method.tables}
    return paths | {EXPRESSION.name: EXPRESSED.path, CALIBRATION.name: CALIBRATED.path}


def shared_tables() -> dict[str, list[dg.AssetKey]]:
    """Tables into which several assets write, with these assets."""
    diffs = [diff_key(method) for method in all_methods().values()]
    shown = [diff_key(method) for method in all_methods().values() if method.findings is not None]
    hypotheses = [hypothesis_key(arm) for arm in evidence_arms()]
    return {
        RUNS.name: diffs,
        FINDINGS.name: shown,
        HYPOTHESES.name: hypotheses,
        HYPOTHESIS_SCORES.name: hypotheses,
        GRADES.name: [grade_key(arm) for arm in evidence_arms()],
        ORGANISMS.name: [FINETUNE],
    }
