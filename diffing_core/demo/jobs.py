"""Makes the missing artifacts of a tier: probe corpora here, models in one-thread worker processes.

Training needs torch; this module does not load it. Workers are started afresh (spawn), so that a caller's threads and
settings stay untouched: two one-thread workers do more than one process with two threads, which is slower than one.
"""

import logging
import multiprocessing
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from functools import partial
from pathlib import Path
from queue import Queue

from diffing_core.demo.artifacts import BASE, CHAT_PROBES, TEXT_PROBES, tier_artifacts
from diffing_core.demo.probes import write_chats, write_texts
from diffing_core.demo.progress import Progress
from diffing_core.demo.tiers import Finetune, Tier

logger = logging.getLogger(__name__)

Watcher = Callable[[Progress], None]

POLL_S = 0.5


def build_tier(
    tier: Tier, root: Path, *, progress: Watcher | None = None, workers: int = 2
) -> None:
    """Make every artifact of `tier` that is missing below `root`; when none is, return at once."""
    artifacts = tier_artifacts(tier)
    missing = {name for name, artifact in artifacts.items() if not artifact.is_done(root)}
    root.mkdir(parents=True, exist_ok=True)
    for name, write in ((TEXT_PROBES, write_texts), (CHAT_PROBES, write_chats)):
        if name in missing:
            with artifacts[name].writing(root) as folder:
                write(tier.corpus, folder)
    finetunes = [finetune for finetune in tier.finetunes if finetune.artifact in missing]
    if BASE not in missing and not finetunes:
        return
    spawn = multiprocessing.get_context("spawn")
    with spawn.Manager() as manager, ProcessPoolExecutor(workers, spawn) as pool:
        reports = manager.Queue()
        train = partial(pool.submit, _train, tier, root, reports)
        watcher = progress or _log
        if BASE in missing:
            _finish([train(BASE)], reports, watcher)
        _finish(
            [train(finetune.artifact) for finetune in _longest_first(finetunes)], reports, watcher
        )


def _longest_first(finetunes: list[Finetune]) -> list[Finetune]:
    """Return `finetunes` so ordered that no worker starts a long one while the others have finished."""
    return sorted(finetunes, key=lambda finetune: finetune.schedule.steps, reverse=True)


def _finish(trainings: list[Future[None]], reports: "Queue[Progress]", watcher: Watcher) -> None:
    """Wait for `trainings` and hand over what they report; a failure cancels those that have not begun."""
    pending = set(trainings)
    try:
        while pending:
            done, pending = wait(pending, POLL_S, FIRST_EXCEPTION)
            while not reports.empty():
                watcher(reports.get())
            for training in done:
                training.result()
    finally:
        for training in pending:
            training.cancel()


def _log(progress: Progress) -> None:
    logger.info("%s", progress)


def _train(tier: Tier, root: Path, reports: "Queue[Progress]", name: str) -> None:
    """Train one model of `tier`; runs in a worker process."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from diffing_core.demo.models import write_base, write_finetune

    torch.set_num_threads(1)
    disable_progress_bar()
    artifacts = tier_artifacts(tier)

    def report(progress: Progress) -> None:
        reports.put(progress.of(name))

    with artifacts[name].writing(root) as folder:
        if name == BASE:
            write_base(tier, folder, report)
            return
        (finetune,) = (finetune for finetune in tier.finetunes if finetune.artifact == name)
        write_finetune(tier, finetune, artifacts[BASE].folder(root), folder, report)
