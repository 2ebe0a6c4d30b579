"""Automation: a sensor that discovers finetunes, and runs by a declarative policy that must be asked for.

Discovery adds keys and observes data versions; it never starts a run. What runs is decided by the policy
on the assets, which exists only if DIFFING_AUTOMATION is set: an automation that is absent cannot be
switched on by accident, and GPU time costs money.
"""

import os
from typing import Any

import dagster as dg

from diffing_assets.keys import BASE_ACTIVATIONS, FINETUNE
from diffing_assets.partitions import sync_partitions
from diffing_assets.resources import Workspace
from diffing_assets.sources import data_version
from diffing_core.errors import DiffingError

ENABLED = "DIFFING_AUTOMATION"
NIGHTLY = "0 2 * * *"


@dg.sensor(
    name="new_finetunes",
    minimum_interval_seconds=60,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Adds a partition for every registered finetune and notes when adapter, base or corpora changed.",
)
def new_finetunes(context: dg.SensorEvaluationContext, workspace: Workspace) -> dg.SensorResult | dg.SkipReason:
    registry = workspace.registry()
    available = [pair for pair in registry.pairs() if registry.is_available(pair)]
    new, gone = sync_partitions(context.instance, available)
    known = dict(line.split(" ", 1) for line in (context.cursor or "").splitlines())
    versions: dict[str, str] = {}
    for pair in available:
        try:
            versions[pair.key] = data_version(pair, registry)
        except DiffingError as error:
            context.log.warning("%s cannot be observed: %s", pair, error)
    if available and not versions:
        raise DiffingError(f"none of {len(available)} finetune(s) could be observed; the log names each reason")
    changed = {key: version for key, version in versions.items() if known.get(key) != version}
    if not (new or gone or changed):
        return dg.SkipReason(f"{len(available)} finetune(s), nothing new or changed")
    return dg.SensorResult(
        asset_events=[_observation(key, version) for key, version in changed.items()],
        cursor="\n".join(f"{key} {version}" for key, version in sorted(versions.items())),
    )


def policy() -> dg.AutomationCondition | None:
    """When an asset runs by itself; None unless automation is asked for.

    A partition is requested once its dependencies are there and it became missing, or a dependency's
    data changed, or its code version changed, or its last execution newly failed; a nightly sweep asks
    again for what is still missing. The base's activations never trigger anything.
    """
    if not os.environ.get(ENABLED):
        return None
    condition = dg.AutomationCondition
    fresh = condition.newly_missing() | condition.any_deps_updated() | condition.code_version_changed()
    retry = condition.execution_failed().newly_true()
    sweep = condition.cron_tick_passed(NIGHTLY) & condition.missing()
    ready = ~condition.any_deps_missing() & ~condition.any_deps_in_progress() & ~condition.in_progress()
    wanted = (fresh | retry | sweep).since(condition.newly_requested() | condition.newly_updated())
    return (ready & wanted).ignore(dg.AssetSelection.assets(BASE_ACTIVATIONS)).with_label("missing or out of date")


def with_policy(assets: list[Any]) -> list[Any]:
    """The assets, with the policy attached where it is asked for."""
    condition = policy()
    if condition is None:
        return assets
    return dg.map_asset_specs(
        lambda spec: spec if spec.skippable is None else spec.replace_attributes(automation_condition=condition), assets
    )


def sensors() -> list[dg.SensorDefinition]:
    """Discovery always; the evaluation of the policy only where it is asked for, and stopped until started."""
    if policy() is None:
        return [new_finetunes]
    evaluation = dg.AutomationConditionSensorDefinition(
        "automation",
        target=dg.AssetSelection.all(),
        minimum_interval_seconds=60,
        default_status=dg.DefaultSensorStatus.STOPPED,
        run_tags={"dagster/retry_strategy": "FROM_ASSET_FAILURE"},
    )
    return [new_finetunes, evaluation]


def _observation(key: str, version: str) -> dg.AssetObservation:
    return dg.AssetObservation(asset_key=FINETUNE, partition=key, tags={"dagster/data_version": version})

