"""Interrupts that wait for the end of a step, so that what is saved on the way out is never half of one."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

WAITING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def held_interrupts() -> Iterator[Callable[[], None]]:
    """Holds back SIGINT and SIGTERM; gives a function that lets one that came meanwhile act, to be called between steps.

    What acts is the handler that was set before: Python's KeyboardInterrupt, or an orchestrator's; where there is none, the
    process ends by SystemExit. Signals come to the main thread only, so elsewhere nothing is held back.
    """
    came: list[tuple[int, object]] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = {number: signal.getsignal(number) for number in WAITING}
    held = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    for number in held:
        signal.signal(number, lambda *signalled: came.append(signalled))

    def act() -> None:
        while came:
            number, frame = came.pop()
            if before[number] is signal.SIG_DFL:
                raise SystemExit(128 + number)
            before[number](number, frame)

    try:
        yield act
    finally:
        for number in held:
            signal.signal(number, before[number])
        act()
