"""Automation: a sensor that discovers finetunes, and runs by a declarative policy that must be asked for.

Discovery adds keys and observes data versions; it never starts a run. What runs is decided by the policy
on the assets, which exists only if DIFFING_AUTOMATION is set: an automation that is absent cannot be
switched on by accident, and GPU time costs money.
"""

import os
from typing import Any

import dagster as dg

from diffing_assets.keys import BASE_ACTIVATIONS, FINETUNE, PROBES
from diffing_assets.partitions import sync_partitions
from diffing_assets.resources import Workspace
from diffing_assets.sources import data_version
from diffing_core.errors import DiffingError

ENABLED = "DIFFING_AUTOMATION"
NIGHTLY = "0 2 * * *"
MORNING = "0 6 * * *"


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


def is_enabled() -> bool:
    """Whether runs by themselves are asked for."""
    return bool(os.environ.get(ENABLED))


def pair_policy() -> dg.AutomationCondition:
    """When a pair's asset runs: it is missing or out of date, and what it reads is there and at rest.

    Out of date: the observed data version changed, an upstream result is newer, or the code version
    changed. A failed execution is asked for once more; a nightly sweep asks for what is still missing.
    The corpora and the base's activations are external: they never trigger anything and never block.
    """
    condition = dg.AutomationCondition
    fresh = condition.newly_missing() | condition.any_deps_updated() | condition.code_version_changed()
    retry = condition.execution_failed().newly_true()
    sweep = condition.cron_tick_passed(NIGHTLY) & condition.missing()
    ready = ~condition.any_deps_missing() & ~condition.any_deps_in_progress() & ~condition.in_progress()
    wanted = (fresh | retry | sweep | condition.initial_evaluation() & condition.missing()).since(
        condition.newly_requested() | condition.newly_updated()
    )
    unwatched = dg.AssetSelection.assets(BASE_ACTIVATIONS, PROBES)
    return (ready & wanted).ignore(unwatched).with_label("missing or out of date")


def calibration_policy() -> dg.AutomationCondition:
    """Null calibration follows any new result; one missing or broken pair must not hold it back."""
    condition = dg.AutomationCondition
    return (condition.any_deps_updated() & ~condition.in_progress()).with_label("after new results")


def report_policy() -> dg.AutomationCondition:
    """Reports are rebuilt every morning, after the night's runs."""
    condition = dg.AutomationCondition
    return (condition.cron_tick_passed(MORNING) & ~condition.in_progress()).with_label("every morning")


def with_policy(assets: list[Any]) -> list[Any]:
    """The assets, with a policy on each that can be run, if automation is asked for."""
    if not is_enabled():
        return assets
    return [_automated(each) if isinstance(each, dg.AssetsDefinition) and each.is_materializable else each for each in assets]


def _automated(assets: dg.AssetsDefinition) -> dg.AssetsDefinition:
    def with_condition(spec: dg.AssetSpec) -> dg.AssetSpec:
        if spec.group_name == "reports":
            return spec.replace_attributes(automation_condition=report_policy())
        condition = pair_policy() if spec.partitions_def else calibration_policy()
        return spec.replace_attributes(automation_condition=condition)

    return assets.map_asset_specs(with_condition)


def sensors() -> list[dg.SensorDefinition]:
    """Discovery always; the evaluation of the policy only where it is asked for, and stopped until started."""
    if not is_enabled():
        return [new_finetunes]
    evaluation = dg.AutomationConditionSensorDefinition(
        "automation",
        target=dg.AssetSelection.all(),
        minimum_interval_seconds=60,
        default_status=dg.DefaultSensorStatus.STOPPED,
    )
    return [new_finetunes, evaluation]


def _observation(key: str, version: str) -> dg.AssetObservation:
    return dg.AssetObservation(asset_key=FINETUNE, partition=key, tags={"dagster/data_version": version})

