"""The Dagster instance under DIFFING_HOME, and a server of it that a script can start, ask and stop."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg

from diffing_core.errors import DiffingError, StorageError
from diffing_core.settings import diffing_home

ROOT = Path(__file__).parent.parent
START_LIMIT_S = 180
STOP_LIMIT_S = 30


def dagster_home() -> Path:
    """The instance's folder, made with the packaged configuration if it is new."""
    home = diffing_home() / "dagster"
    home.mkdir(parents=True, exist_ok=True)
    if not (home / "dagster.yaml").exists():
        shutil.copyfile(ROOT / "deploy" / "dagster.yaml", home / "dagster.yaml")
    return home


def environment() -> dict[str, str]:
    """Variables of every Dagster process: one instance, one state folder, one thread per process."""
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    fixed = {"DAGSTER_HOME": str(dagster_home()), "DIFFING_HOME": str(diffing_home())}
    return threads | os.environ | fixed


@contextmanager
def open_instance() -> Iterator[dg.DagsterInstance]:
    """The instance, for use in this process."""
    os.environ.update(environment())
    with dg.DagsterInstance.get() as instance:
        yield instance


def gpu_slots() -> int:
    """Runs that may compute at a time: one where there is a GPU (runs are not bound to devices), else one per core."""
    return 1 if shutil.which("nvidia-smi") else os.cpu_count() or 1


def start_server(port: int, output: Any = None) -> subprocess.Popen:
    """Webserver, daemon and code server of this project on the loopback address, in a session of their own.

    Default signal handlers are restored: started from a script, the processes would otherwise inherit
    ignored signals and could not be stopped.
    """
    dagster = Path(sys.executable).with_name("dagster")
    command = [str(dagster), "dev", "-w", str(ROOT / "workspace.yaml"), "-h", "127.0.0.1", "-p", str(port)]
    return subprocess.Popen(
        command, env=environment(), stdout=output, stderr=output and subprocess.STDOUT, cwd=ROOT,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def interrupt_server(process: subprocess.Popen) -> None:
    """Asks the server and its children to end; safe in a signal handler, since it does not wait."""
    os.killpg(process.pid, signal.SIGINT)


def stop_server(process: subprocess.Popen) -> None:
    """Ends the server and its children, and waits for them."""
    interrupt_server(process)
    try:
        process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Server:
    """A running `dagster dev`, spoken to as the web UI does: by GraphQL."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def ask(self, query: str, variables: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Data of one query; raises StorageError with the server's own message."""
        body = json.dumps({"query": query, "variables": dict(variables or {})}).encode()
        request = urllib.request.Request(f"{self.url}/graphql", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            raise StorageError(f"the Dagster server refused a query: {error.read().decode()[:2000]}") from error
        except OSError as error:
            raise StorageError(f"the Dagster server at {self.url} does not answer: {error}") from error
        if answer.get("errors"):
            raise StorageError(f"the Dagster server refused a query: {answer['errors'][0]['message']}")
        return answer["data"]

    def is_loaded(self) -> bool:
        """Whether the definitions are loaded; raises DiffingError with the traceback if they cannot be."""
        query = "{ workspaceOrError { ... on Workspace { locationEntries { locationOrLoadError { __typename "
        query += "... on PythonError { message } } } } } }"
        try:
            entries = self.ask(query)["workspaceOrError"]["locationEntries"]
        except StorageError:
            return False
        found = [entry["locationOrLoadError"] for entry in entries]
        broken = [each["message"] for each in found if each and each["__typename"] == "PythonError"]
        if broken:
            raise DiffingError(f"the definitions cannot be loaded: {broken[0]}")
        return bool(found) and all(found)


@contextmanager
def running_server() -> Iterator[Server]:
    """Starts a server on a free port and stops it, children too, at the end."""
    port = free_port()
    log = dagster_home() / "server.log"
    with log.open("w") as output:
        process = start_server(port, output)
        try:
            server = Server(port)
            _wait_until_loaded(server, process, log)
            yield server
        finally:
            stop_server(process)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_until_loaded(server: Server, process: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + START_LIMIT_S
    while time.monotonic() < until:
        if process.poll() is not None:
            raise DiffingError(f"the Dagster server ended at once; see {log}:\n{log.read_text()[-2000:]}")
        if server.is_loaded():
            return
        time.sleep(0.5)
    raise DiffingError(f"the Dagster server did not load the definitions in {START_LIMIT_S} s; see {log}")
