"""Progress of long work: a bar in a terminal, log lines with rate and remaining time elsewhere.

    with track(n_steps, "steps", "crosscoder") as advance:
        advance(1, loss=0.31, l0=31.8)

`done` is what an earlier run did: work starts there, and rate and remaining time are of this run alone.
"""

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

LOG_EVERY_S = 10.0
logger = logging.getLogger(__name__)


class Advance(Protocol):
    """To be called with each amount of work done, and with what was measured of it."""

    def __call__(self, amount: int, **measures: float) -> None:
        """Adds the amount; the last measures are shown beside it."""


@contextmanager
def track(total: int, unit: str, what: str, done: int = 0) -> Iterator[Advance]:
    """Shows work from `done` until `total` is reached or the block ends."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, unit=f" {unit}", desc=what, leave=False, initial=done) as bar:

            def advance(amount: int, **measures: float) -> None:
                if measures:
                    bar.set_postfix_str(_told(measures), refresh=False)
                bar.update(amount)

            yield advance
        return
    yield _Lines(total, unit, what, done).add


class _Lines:
    """Log lines, at most one per LOG_EVERY_S and always one at the end."""

    def __init__(self, total: int, unit: str, what: str, done: int) -> None:
        self._total, self._unit, self._what = total, unit, what
        self._first = self._done = done
        self._began = self._said = time.monotonic()
        self._measures: dict[str, float] = {}

    def add(self, amount: int, **measures: float) -> None:
        self._done += amount
        self._measures.update(measures)  # who measures now and then only has them shown whenever a line is due
        now = time.monotonic()
        if now - self._said < LOG_EVERY_S and self._done < self._total:
            return
        self._said = now
        rate = (self._done - self._first) / max(now - self._began, 1e-9)
        left = f"{(self._total - self._done) / rate:.0f} s left" if rate else "just begun"
        line = f"{self._what}: {self._done} of {self._total} {self._unit}, {rate:.1f} {self._unit}/s, {left}"
        logger.info("%s", f"{line}; {_told(self._measures)}" if self._measures else line)


def _told(measures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in measures.items())
