"""Progress of long work: a bar in a terminal, log lines with rate and remaining time elsewhere."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOG_EVERY_S = 10.0
logger = logging.getLogger(__name__)


@contextmanager
def track(total: int, unit: str, what: str) -> Iterator[Callable[[int], None]]:
    """Gives a function to be called with each amount of work done."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, unit=f" {unit}", desc=what, leave=False) as bar:
            yield bar.update
        return
    yield _Lines(total, unit, what).add


class _Lines:
    """Log lines, at most one per LOG_EVERY_S and always one at the end."""

    def __init__(self, total: int, unit: str, what: str) -> None:
        self._total, self._unit, self._what = total, unit, what
        self._done = 0
        self._began = self._said = time.monotonic()

    def add(self, amount: int) -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._said < LOG_EVERY_S and self._done < self._total:
            return
        self._said = now
        rate = self._done / max(now - self._began, 1e-9)
        left = f"{(self._total - self._done) / rate:.0f} s left" if rate else "just begun"
        logger.info(
            "%s: %d of %d %s, %.1f %s/s, %s", self._what, self._done, self._total, self._unit, rate, self._unit, left
        )
