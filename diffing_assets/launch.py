"""Launching runs and backfills on a server, and waiting for them with progress to be seen."""

import logging
import time
from collections.abc import Sequence

import dagster as dg

from diffing_assets.instance import Server
from diffing_core.errors import DiffingError

POLL_S = 2.0
SAY_EVERY_S = 15.0
ENDED = ("COMPLETED", "COMPLETED_SUCCESS", "COMPLETED_FAILED", "FAILED", "CANCELED")
LOCATION = {"repositoryName": "__repository__", "repositoryLocationName": "diffing"}
logger = logging.getLogger(__name__)

BACKFILL = """
mutation($params: LaunchBackfillParams!) {
  launchPartitionBackfill(backfillParams: $params) {
    __typename
    ... on LaunchBackfillSuccess { backfillId }
    ... on PythonError { message }
    ... on PartitionKeysNotFoundError { message }
  }
}"""
BACKFILL_STATUS = """
query($id: String!) {
  partitionBackfillOrError(backfillId: $id) {
    ... on PartitionBackfill { status error { message } runs(limit: 1000) { runId status } }
  }
}"""
RUN = """
mutation($params: ExecutionParams!) {
  launchPipelineExecution(executionParams: $params) {
    __typename
    ... on LaunchRunSuccess { run { runId } }
    ... on PythonError { message }
    ... on RunConfigValidationInvalid { errors { message } }
  }
}"""
RUN_STATUS = """
query($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }"""


def backfill(server: Server, what: str, keys: Sequence[dg.AssetKey], partitions: Sequence[str]) -> bool:
    """Backfills assets over partitions and waits; returns whether everything succeeded."""
    params = {
        "assetSelection": [{"path": list(key.path)} for key in keys],
        "partitionNames": list(partitions),
        "title": what,
    }
    launched = server.ask(BACKFILL, {"params": params})["launchPartitionBackfill"]
    if launched["__typename"] != "LaunchBackfillSuccess":
        raise DiffingError(f"Dagster did not accept the backfill {what!r}: {launched.get('message', launched)}")
    began = said = time.monotonic()
    while True:
        state = server.ask(BACKFILL_STATUS, {"id": launched["backfillId"]})["partitionBackfillOrError"]
        counts = _counts([run["status"] for run in state["runs"]])
        if state["status"] in ENDED:
            break
        if time.monotonic() - said > SAY_EVERY_S:
            said = time.monotonic()
            logger.info("%s: %d partitions, runs %s, %.0f s", what, len(partitions), counts, said - began)
        time.sleep(POLL_S)
    logger.info("%s: %s after %.0f s, runs %s", what, state["status"].lower(), time.monotonic() - began, counts)
    return state["status"] in ("COMPLETED", "COMPLETED_SUCCESS")


def run(server: Server, what: str, keys: Sequence[dg.AssetKey]) -> bool:
    """Materializes assets that have no partitions and waits; returns whether they succeeded."""
    selector = LOCATION | {"pipelineName": "__ASSET_JOB", "assetSelection": [{"path": list(key.path)} for key in keys]}
    params = {"selector": selector, "mode": "default", "executionMetadata": {"tags": []}}
    launched = server.ask(RUN, {"params": params})["launchPipelineExecution"]
    if launched["__typename"] != "LaunchRunSuccess":
        raise DiffingError(f"Dagster did not accept the run {what!r}: {launched}")
    began = time.monotonic()
    run_id = launched["run"]["runId"]
    while (status := server.ask(RUN_STATUS, {"id": run_id})["runOrError"]["status"]) not in _FINAL:
        time.sleep(POLL_S)
    logger.info("%s: %s after %.0f s", what, status.lower(), time.monotonic() - began)
    return status == "SUCCESS"


_FINAL = ("SUCCESS", "FAILURE", "CANCELED")


def _counts(statuses: Sequence[str]) -> str:
    found = {status: statuses.count(status) for status in sorted(set(statuses))}
    return ", ".join(f"{count} {status.lower()}" for status, count in found.items()) or "not started"
