"""One warehouse for all tests of the reports: the synthetic lake, built and tested by dbt once."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pytest

from diffing_core.catalog import all_tables
from diffing_core.lake import Lake
from diffing_core.warehouse import FILE, build_raw, publish
from tests.reports import synthetic

PROJECT = Path(__file__).parents[2] / "dbt_reports"


@pytest.fixture(scope="session")
def reports_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DIFFING_HOME with the synthetic lake and its published warehouse."""
    home = tmp_path_factory.mktemp("reports")
    lake = Lake(home / "lake")
    synthetic.fill(lake)
    building = home / "build" / FILE
    build_raw(lake, all_tables().values(), synthetic.organisms(), building)
    dbt = [
        str(Path(sys.executable).with_name("dbt")), "build",
        "--project-dir", str(PROJECT), "--profiles-dir", str(PROJECT),
        "--target-path", str(home / "target"), "--log-path", str(home / "logs"),
    ]  # fmt: skip
    done = subprocess.run(
        dbt, env=os.environ | {"DIFFING_WAREHOUSE": str(building)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:]
    publish(building, home / FILE)
    return home


@pytest.fixture
def marts(reports_home: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A read-only session on the published warehouse."""
    with duckdb.connect(reports_home / FILE, read_only=True) as connection:
        connection.execute("set search_path = 'marts,raw'; set TimeZone = 'UTC'")
        yield connection
