"""Launching runs on a server and waiting for them, with progress and reasons of failures to be seen.

Runs over ranges of partitions are launched directly, as "pass partition ranges to single run" does in the web UI.
A backfill would make the same runs, but its daemon looks only every 30 s: once to launch them, once to end.
"""

import logging
import time
from collections.abc import Sequence
from typing import Any

import dagster as dg

from diffing_assets.server import LOCATION, POLL_S, Server
from diffing_core.errors import DiffingError
from diffing_core.progress import track

FINAL = {"SUCCESS", "FAILURE", "CANCELED"}
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
    total, seen = len(keys) * (sum(map(len, blocks)) or 1), 0
    try:
        with track(total, "materializations", what) as done:
            while not _ended(states):
                time.sleep(POLL_S)
                states = _states(server, ids)
                made = sum(state["stats"].get("materializations", 0) for state in states.values())
                if seen < min(made, total):
                    done(min(made, total) - seen)
                    seen = min(made, total)
    finally:
        if not _ended(states):
            server.ask(CANCEL, {"ids": ids})
    failed = [run_id for run_id, state in states.items() if state["status"] != "SUCCESS"]
    for run_id in failed:
        logger.warning("%s: %s/runs/%s %s", what, server.url, run_id, _reason(server, run_id))
    logger.info("%s: %d of %d run(s) succeeded after %.0f s", what, len(ids) - len(failed), len(ids), time.monotonic() - began)
    return not failed


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
