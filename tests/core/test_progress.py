"""Progress: log lines for files and services, a bar for a person at a terminal."""

import io
import logging
import sys
import time

import pytest

from diffing_core import progress
from diffing_core.progress import track


class Terminal(io.StringIO):
    """A terminal that remembers."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="diffing_core.progress")
    return caplog


def test_quick_work_is_told_once_and_at_its_end(said: pytest.LogCaptureFixture) -> None:
    with track(100, "tokens", "reading") as done:
        for _ in range(4):
            done(25)
    [line] = said.messages
    assert line.startswith("reading: 100 of 100 tokens, ")
    assert line.endswith(" tokens/s, 0 s left")


def test_long_work_is_told_with_rate_and_remaining_time(
    said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 4.0, 11.0, 12.0, 20.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with track(100, "tokens", "reading") as done:
        for amount in (20, 35, 5, 40):
            done(amount)
    assert said.messages == [
        "reading: 55 of 100 tokens, 5.0 tokens/s, 9 s left",
        "reading: 100 of 100 tokens, 5.0 tokens/s, 0 s left",
    ]


def test_a_line_shows_the_last_measures_whoever_took_them(
    said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Defect: trainings measure every tenth step, and a line that was due at another step said nothing of the loss."""
    clock = iter([0.0, 4.0, 11.0, 20.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with track(100, "steps", "learning") as done:
        done(10, loss=0.5, l0=8)
        done(45)
        done(45, loss=0.25)
    assert said.messages == [
        "learning: 55 of 100 steps, 5.0 steps/s, 9 s left; loss 0.5, l0 8",
        "learning: 100 of 100 steps, 5.0 steps/s, 0 s left; loss 0.25, l0 8",
    ]


def test_a_terminal_gets_a_bar_and_no_log_line(said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with track(100, "tokens", "reading") as done:
        done(100)
    assert "reading:" in terminal.getvalue()
    assert said.messages == []


def test_what_was_measured_stands_beside_the_progress(said: pytest.LogCaptureFixture) -> None:
    with track(2, "steps", "training") as done:
        done(1, loss=0.5)
        done(1, loss=0.25, l0=31.84)
    [line] = said.messages
    assert line.endswith("0 s left; loss 0.25, l0 31.84")


def test_a_terminal_shows_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with track(2, "steps", "training") as done:
        time.sleep(0.2)  # a bar is drawn ten times a second at most
        done(1, loss=0.25)
    assert "loss 0.25" in terminal.getvalue()


def test_an_error_inside_passes_through() -> None:
    with pytest.raises(KeyError), track(1, "tokens", "reading"):
        raise KeyError("x")


def test_what_an_earlier_run_did_counts_as_done_but_not_into_the_rate(
    said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 10.0, 20.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with track(1000, "steps", "training", 900) as done:
        done(50)
        done(50)
    assert said.messages == [
        "training: 950 of 1000 steps, 5.0 steps/s, 10 s left",
        "training: 1000 of 1000 steps, 5.0 steps/s, 0 s left",
    ]


def test_a_bar_begins_where_an_earlier_run_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with track(1000, "steps", "training", 900):
        pass
    assert "900/1000" in terminal.getvalue()
