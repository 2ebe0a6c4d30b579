"""Interrupts wait for the end of a step, and then do what they always do."""

import os
import signal
import threading

import pytest

from diffing_core.interrupts import held_interrupts


def test_an_interrupt_acts_between_steps_only() -> None:
    before, done = signal.getsignal(signal.SIGINT), []
    with pytest.raises(KeyboardInterrupt), held_interrupts() as act:
        for step in range(3):
            act()
            if step == 1:
                os.kill(os.getpid(), signal.SIGINT)
            done.append(step)
    assert done == [0, 1]
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_of_the_last_step_is_not_lost() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), held_interrupts() as act:
        act()
        os.kill(os.getpid(), signal.SIGINT)
        done.append("step")
    assert done == ["step"]


def test_a_plain_kill_ends_the_process_between_steps_where_nobody_handles_it() -> None:
    """As `kill` or a container's stop does to a training in a terminal."""
    before, done = signal.signal(signal.SIGTERM, signal.SIG_DFL), []
    try:
        with pytest.raises(SystemExit) as ended, held_interrupts() as act:
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("step")
            act()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (done, ended.value.code) == (["step"], 128 + signal.SIGTERM)


def test_another_thread_holds_nothing_back() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with held_interrupts() as act:
            act()
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
