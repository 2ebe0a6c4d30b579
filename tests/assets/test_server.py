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
from dagster._core.execution.backfill import BulkActionStatus
from dagster._core.storage.partition_status_cache import AssetPartitionStatus

from diffing_assets import server
from diffing_assets.instance import dagster_home, open_instance
from diffing_assets.keys import diff_key
from diffing_assets.launch import CANCEL, LAUNCH, STEP_TAG, backfill, run
from diffing_assets.partitions import PAIRS, blocks, sync_partitions
from diffing_assets.server import free_port, running_port, running_server
from diffing_core.errors import DiffingError
from diffing_core.lake import Lake
from diffing_core.methods import get_method
from diffing_core.registry import load_registry
from diffing_core.runs import RUNS
from tests.model_files import truncated_adapter

LIMIT_S = 120
CHEAP = [diff_key(get_method(name)) for name in ("kl", "norm_diff")]
GOOD, BROKEN = "cake_bake__tiny__default", "broken__tiny__default"
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


@pytest.mark.parametrize(
    ("wanted", "most", "workers", "expected"),
    [
        ("abcdefg", 3, 1, ["ab", "cd", "efg"]),
        ("abcdefg", 8, 2, ["abc", "defg"]),
        ("gfedcba", 3, 2, ["a", "bc", "de", "fg"]),
        ("abefg", 8, 1, ["ab", "efg"]),
        ("c", 8, 4, ["c"]),
        ("", 8, 4, []),
    ],
)
def test_blocks_are_neighbours_in_the_stored_order(wanted: str, most: int, workers: int, expected: list[str]) -> None:
    """A range takes all keys between its ends, so no block may span a key that was not asked for."""
    assert ["".join(block) for block in blocks("abcdefg", wanted, most, workers)] == expected


def test_the_web_ui_and_the_report_are_served(ui: Ui) -> None:
    assert answer(f"http://127.0.0.1:{ui.site_port}/") == "the report"
    assert json.loads(answer(f"http://127.0.0.1:{ui.port}/server_info"))["dagster_version"] == dg.__version__


def test_pairs_run_on_the_server_that_is_there_and_a_broken_one_is_told_apart(
    ui: Ui, caplog: pytest.LogCaptureFixture
) -> None:
    with running_server() as found:
        assert found.url == f"http://127.0.0.1:{ui.port}", "a second daemon on one instance"
        succeeded = run(found, "cheap methods", CHEAP, [[BROKEN, GOOD]])
        with pytest.raises(DiffingError, match="did not accept the run 'nothing'"):
            run(found, "nothing", [dg.AssetKey(["diffs", "no_such_method"])])
    assert not succeeded
    [told] = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert all(f"{BROKEN} / {key.path[-1]}: ModelLoadError" in told for key in CHEAP)
    assert GOOD not in told
    with open_instance() as instance:
        [record] = instance.get_run_records()
        assert record.dagster_run.status == dg.DagsterRunStatus.FAILURE
        assert record.dagster_run.tags[STEP_TAG] == "cheap methods"
        for key in CHEAP:
            assert instance.get_materialized_partitions(key) == {GOOD}
            states = instance.get_status_by_partition(key, [GOOD, BROKEN], PAIRS)
            assert states == {GOOD: AssetPartitionStatus.MATERIALIZED, BROKEN: AssetPartitionStatus.FAILED}
    rows = Lake(ui.home / "lake").read(RUNS).to_pylist()
    assert {(row["organism"], row["method"]) for row in rows} == {("cake_bake", "kl"), ("cake_bake", "norm_diff")}


def test_a_backfill_is_one_piece_of_work_in_the_web_ui(ui: Ui, caplog: pytest.LogCaptureFixture) -> None:
    """Neighbouring pairs of a base are one run, which loads the base once."""
    with open_instance() as instance:
        stored = instance.get_dynamic_partitions(PAIRS.name)
    several = max(blocks(stored, {*stored} - {BROKEN}, most=3), key=len)
    assert len(several) > 1
    with running_server() as found, caplog.at_level("INFO"):
        assert backfill(found, "kl again", CHEAP[:1], several)
        with pytest.raises(DiffingError, match="did not accept the backfill 'nothing'"):
            backfill(found, "nothing", CHEAP[:1], ["no__such__pair"])
    assert any("kl again: 1 of 1 run(s) succeeded" in record.message for record in caplog.records)
    with open_instance() as instance:
        [made] = instance.get_backfills()
        assert (made.title, made.status) == ("kl again", BulkActionStatus.COMPLETED_SUCCESS)
        [record] = instance.get_run_records(dg.RunsFilter(tags={"dagster/backfill": made.backfill_id}))
        assert record.dagster_run.status == dg.DagsterRunStatus.SUCCESS
        assert set(several) <= instance.get_materialized_partitions(CHEAP[0])



class Interrupted:
    """A server that launches everything; whoever waits for it is interrupted."""

    def __init__(self) -> None:
        self.cancelled: list[str] = []
        self.tags: list[dict[str, str]] = []

    def ask(self, query: str, variables: dict) -> dict:
        if query == LAUNCH:
            self.tags.append({tag["key"]: tag["value"] for tag in variables["params"]["executionMetadata"]["tags"]})
            return {"launchPipelineExecution": {"__typename": "LaunchRunSuccess", "run": {"runId": str(len(self.tags))}}}
        if query == CANCEL:
            self.cancelled = variables["ids"]
            return {}
        raise KeyboardInterrupt


def test_runs_are_cancelled_when_the_wait_is_interrupted() -> None:
    """They would stay in the queue and start with the next server, whoever starts it."""
    asked = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        run(asked, "a step", CHEAP, [["a", "b", "c"], ["e"]])
    assert asked.cancelled == ["1", "2"]
    ends = {"dagster/asset_partition_range_start": "a", "dagster/asset_partition_range_end": "c"}
    assert asked.tags == [{STEP_TAG: "a step"} | ends, {STEP_TAG: "a step", "dagster/partition": "e"}]


def test_after_an_interrupt_no_process_port_or_lock_is_left(ui: Ui) -> None:
    answer(f"http://127.0.0.1:{ui.port}/")
    ui.process.send_signal(signal.SIGINT)
    assert ui.process.wait(LIMIT_S) == 0
    assert not left_over(ui.home)
    assert is_free(ui.port)
    assert is_free(ui.site_port)
    assert running_port() is None
