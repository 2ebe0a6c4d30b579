"""The Dagster server of DIFFING_HOME: at most one, which scripts start or find, ask by GraphQL, and stop.

Two daemons on one instance would each launch what is queued. The server's process therefore holds a lock on
`dagster/server.lock`, which names its port and itself; the system releases it when the process ends, however it ends.
"""

import fcntl
import json
import logging
import os
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

from diffing_assets.instance import ROOT, dagster_home, environment
from diffing_core.errors import DiffingError, StorageError

HOST = "127.0.0.1"
LOCATION = "diffing"
START_LIMIT_S = 180
STOP_LIMIT_S = 30
POLL_S = 0.5
logger = logging.getLogger(__name__)

LOADED = """
{ workspaceOrError { ... on Workspace { locationEntries { locationOrLoadError {
  __typename ... on PythonError { message }
} } } } }"""
RELOAD = """
mutation($name: String!) { reloadRepositoryLocation(repositoryLocationName: $name) { __typename } }"""


class Server:
    """A running `dagster dev`, spoken to as the web UI does; `process` only if this script started it."""

    def __init__(self, port: int, process: subprocess.Popen | None = None) -> None:
        self.url = f"http://{HOST}:{port}"
        self._process = process

    @property
    def has_ended(self) -> bool:
        """Whether a server that this script started is gone."""
        return self._process is not None and self._process.poll() is not None

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
        try:
            entries = self.ask(LOADED)["workspaceOrError"]["locationEntries"]
        except StorageError:
            return False
        found = [entry["locationOrLoadError"] for entry in entries]
        broken = [each["message"] for each in found if each and each["__typename"] == "PythonError"]
        if broken:
            raise DiffingError(f"the definitions cannot be loaded: {broken[0]}")
        return bool(found) and all(found)


@contextmanager
def running_server(port: int = 0) -> Iterator[Server]:
    """The server of this DIFFING_HOME: the one that runs, its definitions read anew, or else one of its own.

    Args:
        port: where a new server listens; 0 takes any free port. It is stopped at the end, children too.

    Raises:
        DiffingError: the port is taken, or the server does not load the definitions.
    """
    if found := running_port():
        server = Server(found)
        logger.info("using the Dagster server that already runs at %s", server.url)
        _wait_until_loaded(server, f"end the process that {_lock_file()} names as its second number")
        server.ask(RELOAD, {"name": LOCATION})
        yield server
        return
    port = free_port(port)
    with _log_file().open("w") as output:
        process = start_server(port, output)
        try:
            server = Server(port, process)
            _wait_until_loaded(server, f"see {_log_file()}")
            yield server
        finally:
            stop_server(process)


def running_port() -> int | None:
    """Port of the server of this DIFFING_HOME, if one runs; a file that nobody holds is left over and means nothing."""
    file = _lock_file()
    while _is_held(file):
        if said := file.read_text().split():
            return int(said[0])
        time.sleep(POLL_S)
    return None


def start_server(port: int, output: Any) -> subprocess.Popen:
    """Webserver, daemon and code server of this project on the loopback address, in a session of their own.

    Default signal handlers are restored: started from a script, the processes would otherwise inherit
    ignored signals and could not be stopped. The lock passes to the server with its open file.
    """
    dagster = Path(sys.executable).with_name("dagster")
    command = [str(dagster), "dev", "-w", str(ROOT / "workspace.yaml"), "-h", HOST, "-p", str(port)]
    with _lock_file().open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DiffingError(f"another Dagster server has just been started: it holds {lock.name}; try again") from error
        lock.truncate(0)
        process = subprocess.Popen(
            command, env=environment(), stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler), pass_fds=[lock.fileno()],
        )  # fmt: skip
        lock.write(f"{port} {process.pid}")
        return process


def stop_server(process: subprocess.Popen) -> None:
    """Ends the server and all that it started, and waits: the code server ends after the process that started it."""
    _signal(process, signal.SIGINT)
    until = time.monotonic() + STOP_LIMIT_S
    while _signal(process, 0):
        if time.monotonic() > until:
            _signal(process, signal.SIGKILL)
            break
        process.poll()
        time.sleep(0.1)
    process.wait()


def free_port(wanted: int = 0) -> int:
    """A port of the loopback address that nobody listens on: the one wanted, or any."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, wanted))
        except OSError as error:
            raise DiffingError(f"port {wanted} is taken ({error.strerror}); choose another one") from error
        return probe.getsockname()[1]


def _signal(process: subprocess.Popen, number: int) -> bool:
    """Sends a signal to a process and all that it started; whether any of them is left."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True


def _lock_file() -> Path:
    return dagster_home() / "server.lock"


def _log_file() -> Path:
    return dagster_home() / "server.log"


def _is_held(file: Path) -> bool:
    with file.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _wait_until_loaded(server: Server, advice: str) -> None:
    until = time.monotonic() + START_LIMIT_S
    while not server.is_loaded():
        if server.has_ended:
            raise DiffingError(f"the Dagster server ended at once; {advice}:\n{_log_file().read_text()[-2000:]}")
        if time.monotonic() > until:
            raise DiffingError(f"the Dagster server at {server.url} did not load the definitions in {START_LIMIT_S} s; {advice}")
        time.sleep(POLL_S)
