"""Discovery and policy, tick by tick: what is asked for when a finetune appears, changes, or does not."""

from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from diffing_assets import automation
from diffing_assets.definitions import ASSETS, defs
from diffing_assets.keys import FINETUNE, diff_key
from diffing_assets.partitions import PAIRS
from diffing_assets.resources import Workspace
from diffing_core.methods import all_methods

KL = diff_key(all_methods()["kl"])


@pytest.fixture
def instance(tiny_home: Path) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as opened:
        yield opened


def tick(instance: dg.DagsterInstance, cursor: str | None) -> dg.SensorResult | dg.SkipReason:
    context = dg.build_sensor_context(instance=instance, cursor=cursor, resources={"workspace": Workspace()})
    return automation.new_finetunes(context)


def observe(instance: dg.DagsterInstance, key: str, version: str) -> None:
    tags = {"dagster/data_version": version}
    instance.report_runless_asset_event(dg.AssetObservation(asset_key=FINETUNE, partition=key, tags=tags))


def test_new_finetunes_become_partitions_once(instance: dg.DagsterInstance) -> None:
    first = tick(instance, None)
    keys = instance.get_dynamic_partitions(PAIRS.name)
    assert {event.partition for event in first.asset_events} == set(keys)
    assert not first.run_requests
    assert isinstance(tick(instance, first.cursor), dg.SkipReason)


def test_a_changed_adapter_is_observed_and_nothing_else(instance: dg.DagsterInstance, tiny_home: Path) -> None:
    cursor = tick(instance, None).cursor
    stale = cursor.replace("owl_love__tiny__default ", "owl_love__tiny__default 0")
    again = tick(instance, stale)
    assert [event.partition for event in again.asset_events] == ["owl_love__tiny__default"]


def test_a_dropped_in_file_gets_a_partition_and_a_removed_one_loses_it(
    instance: dg.DagsterInstance, tiny_home: Path
) -> None:
    cursor = tick(instance, None).cursor
    file = tiny_home / "registry" / "organisms" / "stranger.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(
        "name: stranger\ntype: generic\narm: unknown\ndescription: sent by somebody\n"
        "variants: {tiny: {default: {kind: identical}}}\n"
    )
    found = tick(instance, cursor)
    assert [event.partition for event in found.asset_events] == ["stranger__tiny__default"]
    file.unlink()
    tick(instance, found.cursor)
    assert "stranger__tiny__default" not in instance.get_dynamic_partitions(PAIRS.name)


def test_without_being_asked_for_no_asset_has_a_policy() -> None:
    assert all(spec.automation_condition is None for spec in defs.resolve_all_asset_specs())


def test_policy_asks_for_observed_pairs_once_and_again_when_they_change(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(automation.ENABLED, "1")
    automated = dg.Definitions(assets=automation.with_policy(ASSETS), resources={"workspace": Workspace(), "dbt": object()})
    key = "owl_love__tiny__default"
    instance.add_dynamic_partitions(PAIRS.name, [key, "cake_bake__tiny__default"])

    def ask(cursor: object) -> tuple[set[str], object]:
        result = dg.evaluate_automation_conditions(automated, instance, dg.AssetSelection.assets(KL), cursor=cursor)
        return result.get_requested_partitions(KL), result.cursor

    requested, cursor = ask(None)
    assert requested == set(), "nothing is observed yet"
    observe(instance, key, "one")
    requested, cursor = ask(cursor)
    assert requested == {key}
    instance.report_runless_asset_event(dg.AssetMaterialization(KL, partition=key))
    requested, cursor = ask(cursor)
    assert requested == set()
    observe(instance, key, "one")
    requested, cursor = ask(cursor)
    assert requested == set(), "observed again, unchanged"
    observe(instance, key, "two")
    requested, cursor = ask(cursor)
    assert requested == {key}
