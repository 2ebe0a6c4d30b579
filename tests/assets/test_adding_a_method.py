"""One new file makes a method: asset, launch form, tables, evidence arm, lineage. Nothing else is touched."""

import json
import subprocess
import sys
from pathlib import Path

METHOD = '''
"""Mean absolute log-ratio of the two models' predictions.

    gap = mean_t mean_v |log p_tuned - log p_base|
"""

from pydantic import Field

from diffing_core.findings import Finding
from diffing_core.methods.base import Method, Need
from diffing_core.settings import Settings
from diffing_core.tables import Column, TableSpec


class MeanGapSettings(Settings):
    """Knobs of `mean_gap`."""

    scale: float = Field(1.0, gt=0, description="Multiplies the gap.")


GAPS = TableSpec("mean_gap_totals", "The gap over all tokens.", (), (
    Column("gap", "float64", "Mean absolute log-ratio.", "nats", "effect", low=0),
))


class MeanGapFold:
    """A sum and a count."""

    layers = ()

    def __init__(self, context, settings):
        self.scale, self.total, self.count = settings.scale, 0.0, 0

    def update(self, block):
        self.total += float(block.logprob_difference_NV.abs().mean(-1).sum())
        self.count += len(block)

    def finish(self):
        return {GAPS.name: GAPS.table({"gap": [self.scale * self.total / self.count]})}


def findings(tables, settings):
    gap = tables[GAPS.name]["gap"][0].as_py()
    return [Finding("layer", "all", gap, "nats", GAPS.name)] if gap > 0 else []


METHOD = Method(
    name="mean_gap", version="1", kind="stream", needs=frozenset({Need.LOGPROBS}), settings=MeanGapSettings,
    tables=(GAPS,), reference="this test", findings=findings, start=MeanGapFold,
    headline=lambda tables: {"gap": tables[GAPS.name]["gap"][0].as_py()},
)
'''

PROBE = """
import json, sys
import diffing_core.methods
diffing_core.methods.__path__.append(sys.argv[1])
from diffing_assets.evaluation import grades_assets, hypotheses_assets
from diffing_assets.keys import table_sources
from diffing_assets.launch_form import form
from diffing_assets.methods import compare_assets
from diffing_core.catalog import all_tables
from diffing_core.methods import get_method
made = [compare_assets(), hypotheses_assets(), grades_assets()]
keys = {key.to_user_string(): [dep.to_user_string() for dep in each.asset_deps[key]] for each in made for key in each.keys}
json.dump({
    "keys": {key: deps for key, deps in keys.items() if "mean_gap" in key},
    "ddl": all_tables()["mean_gap_totals"].ddl(),
    "source": table_sources()["mean_gap_totals"],
    "form": list(form([get_method("mean_gap")])["mean_gap"].config_type.fields),
}, sys.stdout)
"""


def test_one_file_is_all_it_takes(tmp_path: Path) -> None:
    (tmp_path / "mean_gap.py").write_text(METHOD)
    command = [sys.executable, "-W", "ignore", "-c", PROBE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found["keys"]) == {"diffs/mean_gap", "hypotheses/mean_gap", "grades/mean_gap"}
    assert "sources/probe_corpora" in found["keys"]["diffs/mean_gap"]
    assert '"gap" double not null' in found["ddl"]
    assert found["source"] == ["diffs", "mean_gap"]
    assert found["form"] == ["scale"]
