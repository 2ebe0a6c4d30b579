"""A real server on a temporary DIFFING_HOME: found, asked, given runs, and gone without a trace."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import pytest

from diffing_assets import server
from diffing_assets.instance import dagster_home, open_instance
from diffing_assets.partitions import sync_partitions
from diffing_assets.server import free_port, running_port, running_server
from diffing_core.errors import DiffingError
from diffing_core.registry import load_registry
from tests.model_files import truncated_adapter

LIMIT_S = 120
UI = "from diffing_assets.cli import main; main()"


@dataclass
class Ui:
    """`diffing ui` in a process of its own."""

    home: Path
    port: int
    site_port: int
    process: subprocess.Popen


@pytest.fixture(scope="module")
def ui(tiny_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ui]:
    """A DIFFING_HOME with trained models, one broken adapter and a report, and its servers."""
    home = tmp_path_factory.mktemp("server")
    (home / "demo").symlink_to(tiny_demo)
    (home / "site").mkdir()
    (home / "site" / "index.html").write_text("the report")
    truncated_adapter(home)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFING_HOME", str(home))
        registry = load_registry()
        with open_instance() as instance:
            sync_partitions(instance, [pair for pair in registry.pairs("tiny") if registry.is_available(pair)])
        ports = free_port(), free_port()
        command = [sys.executable, "-c", UI, "ui", "--port", str(ports[0]), "--site-port", str(ports[1])]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            yield Ui(home, *ports, process)
        finally:
            process.terminate()
            process.wait(LIMIT_S)


def answer(url: str) -> str:
    """What is served, as soon as something is."""
    until = time.monotonic() + LIMIT_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=LIMIT_S) as response:
                return response.read().decode()
        except urllib.error.URLError:
            assert time.monotonic() < until, f"{url} does not answer"
            time.sleep(0.2)


def left_over(home: Path) -> list[str]:
    """Command lines of processes that work for this DIFFING_HOME; Linux says what each was started with."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"DIFFING_HOME={home}\0" in (process / "environ").read_text():
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def is_free(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) != 0


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The lock of a DIFFING_HOME without a server, as a server that was killed left it."""
    monkeypatch.setenv("DIFFING_HOME", str(tmp_path))
    file = dagster_home() / "server.lock"
    file.write_text("1 1")
    return file


def test_a_lock_that_nobody_holds_means_nothing(lock: Path) -> None:
    assert running_port() is None


def test_a_server_that_does_not_answer_is_named_and_no_second_one_started(
    lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "START_LIMIT_S", 0)
    with lock.open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        held.write(f"{free_port()} {os.getpid()}")
        held.flush()
        with pytest.raises(DiffingError, match=r"did not load .* end the process that .*server\.lock names"), running_server():
            pass
        with pytest.raises(DiffingError, match="another Dagster server has just been started"):
            server.start_server(free_port(), None)


def test_a_taken_port_is_refused_before_anything_starts(lock: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(DiffingError, match=f"port {port} is taken"), running_server(port):
            pass
    assert free_port(port) == port


def test_the_web_ui_and_the_report_are_served(ui: Ui) -> None:
    assert answer(f"http://127.0.0.1:{ui.site_port}/") == "the report"
    assert json.loads(answer(f"http://127.0.0.1:{ui.port}/server_info"))["dagster_version"] == dg.__version__


def test_a_script_uses_the_server_that_is_there(ui: Ui) -> None:
    with running_server() as found:
        assert found.url == f"http://127.0.0.1:{ui.port}", "a second daemon on one instance"
        assert found.is_loaded()


def test_after_an_interrupt_no_process_port_or_lock_is_left(ui: Ui) -> None:
    answer(f"http://127.0.0.1:{ui.port}/")
    ui.process.send_signal(signal.SIGINT)
    assert ui.process.wait(LIMIT_S) == 0
    assert not left_over(ui.home)
    assert is_free(ui.port)
    assert is_free(ui.site_port)
    assert running_port() is None
