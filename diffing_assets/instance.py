"""The Dagster instance under DIFFING_HOME."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg

from diffing_core.settings import diffing_home

ROOT = Path(__file__).parent.parent


def dagster_home() -> Path:
    """The instance's folder, made with the packaged configuration if it is new."""
    home = diffing_home() / "dagster"
    home.mkdir(parents=True, exist_ok=True)
    if not (home / "dagster.yaml").exists():
        shutil.copyfile(ROOT / "deploy" / "dagster.yaml", home / "dagster.yaml")
    return home


def environment() -> dict[str, str]:
    """Variables of every Dagster process: one instance, one state folder, one thread per process."""
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    fixed = {"DAGSTER_HOME": str(dagster_home()), "DIFFING_HOME": str(diffing_home())}
    return threads | os.environ | fixed


@contextmanager
def open_instance() -> Iterator[dg.DagsterInstance]:
    """The instance, for use in this process."""
    os.environ.update(environment())
    with dg.DagsterInstance.get() as instance:
        yield instance


def gpu_slots() -> int:
    """Runs that may compute at a time: one where there is a GPU (runs are not bound to devices), else one per core."""
    return 1 if shutil.which("nvidia-smi") else os.cpu_count() or 1
