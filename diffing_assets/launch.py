"""Launching runs and backfills on a server, and waiting for them with progress to be seen."""

import logging
import time
from collections.abc import Sequence
from typing import Any

import dagster as dg

from diffing_assets.server import LOCATION, Server
from diffing_core.errors import DiffingError
from diffing_core.progress import track

POLL_S = 2.0
FINAL = ("SUCCESS", "FAILURE", "CANCELED")
ENDED = ("COMPLETED", "COMPLETED_SUCCESS", "COMPLETED_FAILED", "FAILED", "CANCELED")
REPOSITORY = {"repositoryName": "__repository__", "repositoryLocationName": LOCATION}
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
    ... on PartitionBackfill {
      status
      assetBackfillData {
        assetBackfillStatuses {
          ... on AssetPartitionsStatusCounts {
            numPartitionsTargeted numPartitionsMaterialized numPartitionsFailed
          }
        }
      }
    }
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
    began = time.monotonic()
    seen = 0
    with track(len(keys) * len(partitions), "materializations", what) as done:
        while (state := _backfill_state(server, launched["backfillId"]))["status"] not in ENDED:
            done(_finished(state) - seen)
            seen = _finished(state)
            time.sleep(POLL_S)
        done(_finished(state) - seen)
    logger.info("%s: %s after %.0f s", what, state["status"].lower(), time.monotonic() - began)
    return state["status"] in ("COMPLETED", "COMPLETED_SUCCESS")


def run(server: Server, what: str, keys: Sequence[dg.AssetKey]) -> bool:
    """Materializes assets that have no partitions and waits; returns whether they succeeded."""
    selector = REPOSITORY | {"pipelineName": "__ASSET_JOB", "assetSelection": [{"path": list(key.path)} for key in keys]}
    params = {"selector": selector, "mode": "default", "executionMetadata": {"tags": []}}
    launched = server.ask(RUN, {"params": params})["launchPipelineExecution"]
    if launched["__typename"] != "LaunchRunSuccess":
        raise DiffingError(f"Dagster did not accept the run {what!r}: {launched}")
    began = time.monotonic()
    run_id = launched["run"]["runId"]
    while (status := server.ask(RUN_STATUS, {"id": run_id})["runOrError"]["status"]) not in FINAL:
        time.sleep(POLL_S)
    logger.info("%s: %s after %.0f s", what, status.lower(), time.monotonic() - began)
    return status == "SUCCESS"


def _backfill_state(server: Server, backfill_id: str) -> dict[str, Any]:
    return server.ask(BACKFILL_STATUS, {"id": backfill_id})["partitionBackfillOrError"]


def _finished(state: dict[str, Any]) -> int:
    """Materializations that have succeeded or failed so far; nothing is known before the daemon's first look."""
    counted = (state["assetBackfillData"] or {}).get("assetBackfillStatuses", [])
    return sum(each["numPartitionsMaterialized"] + each["numPartitionsFailed"] for each in counted if each)
