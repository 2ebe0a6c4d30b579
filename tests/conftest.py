"""Shared by all tests: the tiny tier of the embedded organisms, trained once per session."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffing_core import demo


@pytest.fixture(scope="session", autouse=True)
def interrupts_are_heard() -> Iterator[None]:
    """A shell starts what it puts in the background with SIGINT ignored, and Python leaves that so."""
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def tiny_demo(pytestconfig: pytest.Config) -> Path:
    """A folder with the finished artifacts of the tier `tiny`: tens of seconds the first time.

    Kept in pytest's cache: artifacts are content-addressed, so an old one is never taken for a new one.
    """
    root = pytestconfig.cache.mkdir("demo")
    demo.build("tiny", root)
    return root


@pytest.fixture
def tiny_home(tiny_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fresh DIFFING_HOME in which the tier `tiny` is already trained."""
    (tmp_path / "demo").symlink_to(tiny_demo)
    monkeypatch.setenv("DIFFING_HOME", str(tmp_path))
    yield tmp_path
