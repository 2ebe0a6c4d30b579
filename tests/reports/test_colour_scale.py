"""Colours of the report's heatmaps: one-sided from zero, or around zero where there is anything below it."""

import json
import shutil
import subprocess

import pytest

from tests.reports.conftest import PROJECT

SCALE = PROJECT / "evidence" / "components" / "scale.js"
pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="no node on this machine; it comes with Node.js")


def scale_of(*values: float | None) -> dict:
    rows = json.dumps([{"cosine": value} for value in values])
    code = SCALE.read_text().replace("export ", "") + f"\nconsole.log(JSON.stringify(scaleOf({rows}, 'cosine')))"
    return json.loads(subprocess.run(["node", "-e", code], capture_output=True, text=True, check=True).stdout)


def test_signed_values_spread_to_both_sides_of_zero() -> None:
    signed = scale_of(-0.2, 0.7, None)
    assert (signed["min"], signed["max"], len(signed["colorScale"])) == (-0.7, 0.7, 3)
    assert scale_of(-0.9, 0.1)["max"] == 0.9


def test_others_begin_at_zero() -> None:
    shown = scale_of(0.2, 0.7)
    assert (shown["min"], shown["max"], len(shown["colorScale"])) == (0, 0.7, 2)
    assert scale_of()["max"] == 0
