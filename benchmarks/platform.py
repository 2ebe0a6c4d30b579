"""What Dagster adds: loading the definitions, and one partition against the same work as a library call."""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.figure import Figure, wall_s

PAIR = "cake_bake__tiny__default"
LOAD = """
import sys, time
began = time.perf_counter()
import diffing_assets.definitions
print(time.perf_counter() - began, "torch" in sys.modules)
"""


def definitions_load() -> list[Figure]:
    """Seconds to import the definitions in a fresh process; torch must not be among what is loaded."""
    seconds = []
    for _ in range(4):
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", LOAD], capture_output=True, text=True, check=True)
        taken, torch_loaded = done.stdout.split()[-2:]
        if torch_loaded != "False":
            raise AssertionError("loading the definitions imported torch")
        seconds.append(float(taken))
    return [Figure("definitions_load_s", statistics.median(seconds[1:]), "s", 5, "lower", {"first": seconds[0]})]


def partition_overhead() -> list[Figure]:
    """One pair of the tiny tier, all methods: through a Dagster run, and as a library call."""
    import dagster as dg

    from diffing_core import demo
    from diffing_core.settings import diffing_home

    trained = diffing_home() / "demo"
    demo.build("tiny", trained)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "demo").symlink_to(trained)
        os.environ["DIFFING_HOME"] = folder
        try:
            with dg.DagsterInstance.local_temp(folder) as instance:
                _library(), _dagster(instance)
                library_s = statistics.median(wall_s(_library) for _ in range(3))
                dagster_s = statistics.median(wall_s(lambda: _dagster(instance)) for _ in range(3))
        finally:
            os.environ["DIFFING_HOME"] = str(trained.parent)
    parts = {"through Dagster (s)": dagster_s, "library call (s)": library_s}
    return [Figure("partition_overhead_s", dagster_s - library_s, "s", 3, "lower", parts)]


def _library() -> None:
    from diffing_assets.resources import Workspace
    from diffing_core.comparison import compare
    from diffing_core.methods import all_methods
    from diffing_core.pairs import Pair

    workspace = Workspace()
    settings = {name: method.settings() for name, method in all_methods().items()}
    pairs = [Pair.parse(PAIR)]
    for outcome in compare(
        pairs, settings, registry=workspace.registry(), lake=workspace.lake(), store=workspace.store
    ):
        if outcome.error is not None:
            raise outcome.error


def _dagster(instance) -> None:
    from diffing_assets.definitions import defs
    from diffing_assets.keys import diff_key
    from diffing_assets.partitions import PAIRS
    from diffing_core.methods import all_methods

    instance.add_dynamic_partitions(PAIRS.name, [PAIR])
    keys = [diff_key(method) for method in all_methods().values()]
    job = defs.resolve_implicit_global_asset_job_def()
    result = job.execute_in_process(instance=instance, asset_selection=keys, partition_key=PAIR)
    if not result.success:
        raise AssertionError("the partition failed")

