"""The main job: from nothing to graded findings about real finetuned models, through Dagster itself.

Trains what is missing of the embedded organisms, then backfills every pair on an instance under
DIFFING_HOME, so that the web UI afterwards shows each run and materialization.
"""

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg

from dbt_reports.site import prefetch
from diffing_assets.instance import gpu_slots, open_instance
from diffing_assets.keys import CALIBRATED, EXPRESSED, SITE, diff_key, grade_key, hypothesis_key
from diffing_assets.launch import backfill, run
from diffing_assets.partitions import PAIRS, blocks, sync_partitions
from diffing_assets.server import Server, running_server
from diffing_core import demo
from diffing_core.demo.progress import Progress
from diffing_core.errors import StorageError
from diffing_core.evaluation import evidence_arms
from diffing_core.lake import Lake
from diffing_core.methods import all_methods
from diffing_core.pairs import Pair
from diffing_core.registry import load_registry
from diffing_core.runs import RUNS
from diffing_core.settings import diffing_home

logger = logging.getLogger(__name__)


def run_demo(tier: str) -> bool:
    """Trains, compares, evaluates and reports one tier; returns whether every step succeeded."""
    home = diffing_home()
    home.mkdir(parents=True, exist_ok=True)
    packages = threading.Thread(target=_prefetch, args=(home,), daemon=True)
    packages.start()
    logger.info("embedded organisms, tier %s: training what is missing", tier)
    with training_bars() as bars:
        demo.build(tier, home / "demo", progress=bars)
    registry = load_registry()
    pairs = [pair for pair in registry.pairs() if registry.is_available(pair)]
    with open_instance() as instance:
        sync_partitions(instance, pairs)
        instance.event_log_storage.set_concurrency_slots("gpu", gpu_slots())
        stored = instance.get_dynamic_partitions(PAIRS.name)
    of_tier = [pair.key for pair in pairs if pair.model == tier]
    with running_server() as server:
        compared = backfill(server, "compare all pairs", _comparisons(), of_tier)
        evaluated = _evaluate(server, blocks(stored, _finished(of_tier, home), len(stored)))
        packages.join()
        reported = run(server, "marts and site", _reports())
    return compared and evaluated and reported


@contextmanager
def training_bars() -> Iterator[Callable[[Progress], None] | None]:
    """A bar per training in a terminal; elsewhere None, and the build logs lines with rate and remaining time."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    bars: dict[str, tqdm] = {}

    def show(progress: Progress) -> None:
        name = progress.artifact
        if name not in bars:
            bars[name] = tqdm(total=progress.n_steps, unit=" steps", desc=name)
        bar = bars[name]
        bar.set_postfix(loss=f"{progress.loss_nats:.2f}", refresh=False)
        bar.update(progress.step - bar.n)

    yield show
    for bar in bars.values():
        bar.close()


def _comparisons() -> list[dg.AssetKey]:
    return [EXPRESSED, *(diff_key(method) for method in all_methods().values())]


def _evaluate(server: Server, measured: list[list[str]]) -> bool:
    """Null calibration first, since every verdict rests on it, then hypotheses and grades."""
    keys = [key_of(arm) for arm in evidence_arms() for key_of in (hypothesis_key, grade_key)]
    calibrated = run(server, "null calibration", [CALIBRATED])
    return calibrated and run(server, "hypotheses and grades", keys, measured)


def _reports() -> list[dg.AssetKey]:
    from diffing_assets.reports import marts

    return [*marts.keys, SITE]


def _finished(keys: list[str], home: Path) -> list[str]:
    """Pairs that some method has a result on: one broken finetune must not silence the others."""
    lake = Lake(home / "lake")
    return [key for key in keys if "diff" in lake.read(RUNS, pair=Pair.parse(key))["step"].to_pylist()]


def _prefetch(home: Path) -> None:
    """Installs the site's packages while models train; a failure is told again when the site is built."""
    try:
        prefetch(home, logger.debug)
    except StorageError as error:
        logger.warning("the report's packages could not be installed yet: %s", error)
