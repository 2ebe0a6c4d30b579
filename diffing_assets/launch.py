"""Launching backfills and runs on a server and waiting for them, with progress and reasons of failures to be seen.

A backfill is what the web UI shows as one piece of work over many pairs; its daemon looks only every 30 s, once to
launch the runs and once to end. Short steps are therefore launched directly as runs over ranges of partitions.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dagster as dg

from diffing_assets.server import LOCATION, POLL_S, Server
from diffing_core.errors import DiffingError
from diffing_core.progress import track

FINAL = {"SUCCESS", "FAILURE", "CANCELED"}
BACKFILL_GOES_ON = {"REQUESTED", "CANCELING", "FAILING"}
STEP_TAG = "diffing/step"
logger = logging.getLogger(__name__)

LAUNCH = """
mutation($params: ExecutionParams!) {
  launchPipelineExecution(executionParams: $params) {
    __typename
    ... on LaunchRunSuccess { run { runId } }
    ... on PythonError { message }
    ... on RunConfigValidationInvalid { errors { message } }
  }
}"""
BACKFILL = """
mutation($params: LaunchBackfillParams!) {
  launchPartitionBackfill(backfillParams: $params) {
    __typename
    ... on LaunchBackfillSuccess { backfillId }
    ... on PythonError { message }
    ... on PartitionKeysNotFoundError { message }
  }
}"""
CANCEL_BACKFILL = """
mutation($id: String!) { cancelPartitionBackfill(backfillId: $id) { __typename } }"""
RUNS_OF_BACKFILL = """
query($id: String!) {
  runsOrError(filter: {tags: [{key: "dagster/backfill", value: $id}]}) {
    ... on Runs { results { runId status stats { ... on RunStatsSnapshot { materializations } } } }
    ... on PythonError { message }
  }
  partitionBackfillOrError(backfillId: $id) { ... on PartitionBackfill { status } }
}"""
STATES = """
query($ids: [String!]) {
  runsOrError(filter: {runIds: $ids}) {
    ... on Runs { results { runId status stats { ... on RunStatsSnapshot { materializations } } } }
    ... on PythonError { message }
  }
}"""
REASONS = """
query($id: ID!) {
  runOrError(runId: $id) { ... on Run { eventConnection { events {
    ... on ExecutionStepFailureEvent {
      error { message }
      failureMetadata { metadataEntries { ... on MarkdownMetadataEntry { mdStr } } }
    }
    ... on RunFailureEvent { message }
  } } } }
}"""
CANCEL = """
mutation($ids: [String!]!) { terminateRuns(runIds: $ids) { __typename } }"""


def backfill(server: Server, what: str, keys: Sequence[dg.AssetKey], partitions: Sequence[str]) -> bool:
    """Backfills assets over partitions and waits; returns whether everything succeeded. Interrupted, it is cancelled."""
    began = time.monotonic()
    selection = [{"path": list(key.path)} for key in keys]
    params = {"assetSelection": selection, "partitionNames": list(partitions), "title": what}
    launched = server.ask(BACKFILL, {"params": params})["launchPartitionBackfill"]
    if launched["__typename"] != "LaunchBackfillSuccess":
        raise DiffingError(f"Dagster did not accept the backfill {what!r}: {launched.get('message', launched)}")
    backfill_id = launched["backfillId"]
    states: dict[str, dict[str, Any]] = {}

    def look() -> bool:
        found = server.ask(RUNS_OF_BACKFILL, {"id": backfill_id})
        states.update({state["runId"]: state for state in found["runsOrError"]["results"]})
        return found["partitionBackfillOrError"]["status"] not in BACKFILL_GOES_ON

    ended = False
    try:
        _wait(look, states, len(keys) * len(partitions), what)
        ended = True
    finally:
        if not ended:
            server.ask(CANCEL_BACKFILL, {"id": backfill_id})
    return _told(server, what, states, time.monotonic() - began)


def run(server: Server, what: str, keys: Sequence[dg.AssetKey], blocks: Sequence[Sequence[str]] = ()) -> bool:
    """Materializes assets and waits; returns whether everything succeeded.

    Args:
        server: who launches.
        what: the step in a few words, for people.
        keys: the assets; those without partitions are made once per run.
        blocks: partitions, one run per block of neighbours; none for assets without partitions.

    What has not ended when the wait is interrupted is cancelled: it would otherwise start with the next server.
    """
    began = time.monotonic()
    ids = [_launch(server, what, keys, _partition_tags(block)) for block in blocks or [()]]
    states: dict[str, dict[str, Any]] = {}

    def look() -> bool:
        states.update(_states(server, ids))
        return _ended(states)

    try:
        _wait(look, states, len(keys) * (sum(map(len, blocks)) or 1), what)
    finally:
        if not _ended(states):
            server.ask(CANCEL, {"ids": ids})
    return _told(server, what, states, time.monotonic() - began)


def _wait(look: Callable[[], bool], states: Mapping[str, dict[str, Any]], total: int, what: str) -> None:
    """Looks every few seconds until `look` says that all has ended, and shows how much is made."""
    seen, ended = 0, False
    with track(total, "materializations", what) as done:
        while not ended:
            time.sleep(POLL_S)
            ended = look()
            made = min(sum(state["stats"].get("materializations", 0) for state in states.values()), total)
            if seen < made:
                done(made - seen)
                seen = made


def _told(server: Server, what: str, states: Mapping[str, dict[str, Any]], seconds: float) -> bool:
    """Logs how the runs ended, with reasons, and returns whether there were any and all succeeded."""
    failed = [run_id for run_id, state in states.items() if state["status"] != "SUCCESS"]
    for run_id in failed:
        logger.warning("%s: %s/runs/%s %s", what, server.url, run_id, _reason(server, run_id))
    logger.info("%s: %d of %d run(s) succeeded after %.0f s", what, len(states) - len(failed), len(states), seconds)
    return bool(states) and not failed


def _launch(server: Server, what: str, keys: Sequence[dg.AssetKey], tags: dict[str, str]) -> str:
    """Launches one run and returns its id."""
    selection = [{"path": list(key.path)} for key in keys]
    selector = {"repositoryName": "__repository__", "repositoryLocationName": LOCATION, "pipelineName": "__ASSET_JOB"}
    shown = [{"key": name, "value": value} for name, value in ({STEP_TAG: what} | tags).items()]
    params = {
        "selector": selector | {"assetSelection": selection}, "mode": "default", "executionMetadata": {"tags": shown},
    }  # fmt: skip
    launched = server.ask(LAUNCH, {"params": params})["launchPipelineExecution"]
    if launched["__typename"] != "LaunchRunSuccess":
        raise DiffingError(f"Dagster did not accept the run {what!r}: {launched}")
    return launched["run"]["runId"]


def _partition_tags(block: Sequence[str]) -> dict[str, str]:
    if not block:
        return {}
    if len(block) == 1:
        return {"dagster/partition": block[0]}
    return {"dagster/asset_partition_range_start": block[0], "dagster/asset_partition_range_end": block[-1]}


def _states(server: Server, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    return {state["runId"]: state for state in server.ask(STATES, {"ids": ids})["runsOrError"]["results"]}


def _ended(states: dict[str, dict[str, Any]]) -> bool:
    return bool(states) and all(state["status"] in FINAL for state in states.values())


def _reason(server: Server, run_id: str) -> str:
    """Why a run failed: the failures that its steps list one by one, else their messages, else Dagster's own."""
    events = server.ask(REASONS, {"id": run_id})["runOrError"]["eventConnection"]["events"]
    steps = [event for event in events if "error" in event]
    listed = [entry["mdStr"] for step in steps for entry in (step["failureMetadata"] or {}).get("metadataEntries", ()) if entry]
    told = [step["error"]["message"] for step in steps if step["error"]]
    return "\n".join(listed or told or [event["message"] for event in events if "message" in event] or ["was cancelled"])
