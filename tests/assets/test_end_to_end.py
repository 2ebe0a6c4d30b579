"""Real pairs through Dagster on a real instance: partitions, runs, lake, warehouse, failures."""

from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import duckdb
import pytest

from diffing_assets.definitions import defs
from diffing_assets.keys import CALIBRATED, EXPRESSED, diff_key, grade_key, hypothesis_key
from diffing_assets.partitions import PAIRS, sync_partitions
from diffing_core import models
from diffing_core.evaluation import evidence_arms
from diffing_core.lake import Lake
from diffing_core.methods import all_methods
from diffing_core.pairs import Pair
from diffing_core.registry import load_registry
from diffing_core.runs import RUNS
from tests.model_files import truncated_adapter

STREAMS = [diff_key(method) for method in all_methods().values() if method.kind == "stream"]


@pytest.fixture
def instance(tiny_home: Path) -> Iterator[dg.DagsterInstance]:
    (tiny_home / "dagster").mkdir()
    with dg.DagsterInstance.local_temp(str(tiny_home / "dagster")) as opened:
        registry = load_registry()
        sync_partitions(opened, [pair for pair in registry.pairs() if registry.is_available(pair)])
        yield opened


def materialize(
    instance: dg.DagsterInstance, keys: list[dg.AssetKey], partition: str | None = None, **options
) -> dg.ExecuteInProcessResult:
    job = defs.resolve_implicit_global_asset_job_def()
    return job.execute_in_process(
        instance=instance, asset_selection=keys, partition_key=partition, raise_on_error=False, **options
    )


def all_of(keys: list[str]) -> dict[str, str]:
    """Tags of a run over neighbouring partitions, as a backfill makes it."""
    return {"dagster/asset_partition_range_start": keys[0], "dagster/asset_partition_range_end": keys[-1]}


def materialized(instance: dg.DagsterInstance, key: dg.AssetKey) -> set[str]:
    return instance.get_materialized_partitions(key)


def something_is_seen(instance: dg.DagsterInstance, asset: dg.AssetKey, key: str) -> bool:
    """Whether a result shows its cost, and a table and a plot unless it has no row at all."""
    event = instance.fetch_materializations(dg.AssetRecordsFilter(asset, asset_partitions=[key]), limit=1).records[0]
    shown = event.asset_materialization.metadata
    assert {"compute_s", "forwards_shared_s", "probe_tokens", "dagster/row_count"} <= set(shown)
    if shown["dagster/row_count"].value == 0:
        return shown["findings"].value == "nothing found"
    return "plot" in shown and any(isinstance(value, dg.TableMetadataValue) and value.records for value in shown.values())


def test_only_pairs_whose_weights_are_there_are_partitions(instance: dg.DagsterInstance) -> None:
    keys = instance.get_dynamic_partitions(PAIRS.name)
    pairs = [Pair.parse(key) for key in keys]
    assert pairs == sorted(pairs, key=lambda pair: (pair.model, pair.variant != "default", pair))
    assert {Pair.parse(key).model for key in keys} == {"tiny"}


def test_a_pair_becomes_graded_findings_in_the_warehouse(instance: dg.DagsterInstance, tiny_home: Path) -> None:
    keys = instance.get_dynamic_partitions(PAIRS.name)
    every_method = [diff_key(method) for method in all_methods().values()]
    evaluated = [key_of(arm) for arm in evidence_arms() for key_of in (hypothesis_key, grade_key)]
    assert materialize(instance, [*every_method, EXPRESSED], tags=all_of(keys)).success
    assert materialize(instance, [CALIBRATED]).success
    assert materialize(instance, evaluated, tags=all_of(keys)).success
    from diffing_assets.reports import marts

    assert materialize(instance, list(marts.keys)).success
    assert all(materialized(instance, asset) == set(keys) for asset in [*every_method, *evaluated])
    assert all(something_is_seen(instance, asset, key) for asset in every_method for key in keys)
    with duckdb.connect(tiny_home / "warehouse.duckdb", read_only=True) as connection:
        graded = connection.execute("select count(distinct organism) from raw.grades").fetchone()
        n_arms = connection.execute("select count(*) from marts.method_effectiveness").fetchone()
        null_kl = connection.execute("select max(kl_nats) from raw.kl_tokens where organism = 'identical'").fetchone()
        kl = dict(connection.execute("select organism, avg(kl_nats) from raw.kl_tokens group by 1").fetchall())
    assert graded == (len({Pair.parse(key).organism for key in keys}),)
    assert n_arms == (len(evidence_arms()),)
    assert null_kl == (0.0,)
    assert kl["cake_bake"] > 10 * kl["benign"]


def test_a_person_may_run_a_single_method(instance: dg.DagsterInstance, tiny_home: Path) -> None:
    [kl] = [key for key in STREAMS if key.path[-1] == "kl"]
    assert materialize(instance, [kl], "cake_bake__tiny__default").success
    written = Lake(tiny_home / "lake").read(RUNS)
    assert set(written["method"].to_pylist()) == {"kl"}
    assert all(not materialized(instance, key) for key in STREAMS if key != kl)


def test_launch_form_reaches_the_method_and_changes_the_identity(instance: dg.DagsterInstance, tiny_home: Path) -> None:
    [kl] = [key for key in STREAMS if key.path[-1] == "kl"]
    config = {"ops": {"compare": {"config": {"kl": {"top_tokens": 3}}}}}
    assert materialize(instance, [kl], "cake_bake__tiny__default", run_config=config).success
    rows = Lake(tiny_home / "lake").read(next(spec for spec in all_methods()["kl"].tables if spec.name == "kl_vocabulary"))
    assert len(rows) == 3 * len(set(rows["corpus"].to_pylist()))


def test_default_variants_of_a_base_are_neighbours(instance: dg.DagsterInstance) -> None:
    """What is chosen together runs together: Dagster gives a run a range of the stored keys."""
    sync_partitions(instance, [])
    pairs = [Pair(model, name, variant) for name in "ba" for model in ("m", "l") for variant in ("default", "strong")]
    sync_partitions(instance, pairs)
    assert instance.get_dynamic_partitions(PAIRS.name) == [
        "a__l__default", "b__l__default", "a__l__strong", "b__l__strong",
        "a__m__default", "b__m__default", "a__m__strong", "b__m__strong",
    ]  # fmt: skip


def test_an_unknown_partition_fails_with_the_names_that_exist(instance: dg.DagsterInstance) -> None:
    instance.add_dynamic_partitions(PAIRS.name, ["cake_bakee__tiny__default"])
    result = materialize(instance, STREAMS, "cake_bakee__tiny__default")
    assert not result.success
    failure = result.get_step_failure_events()[0].event_specific_data
    assert "cake_bake" in failure.user_failure_data.description


def test_a_broken_finetune_fails_alone_in_its_cohort(
    instance: dg.DagsterInstance, tiny_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pairs in one run, one with a truncated adapter: the base is loaded once, the other is stored and counted."""
    loaded: list[Path] = []
    load = models.load_module
    monkeypatch.setattr(models, "load_module", lambda folder, *rest, **how: loaded.append(folder) or load(folder, *rest, **how))
    truncated_adapter(tiny_home)
    sync_partitions(instance, [Pair("tiny", "benign", "seed1"), Pair("tiny", "broken")])
    result = materialize(instance, STREAMS, tags=all_of(["benign__tiny__seed1", "broken__tiny__default"]))
    assert not result.success
    assert all(materialized(instance, key) == {"benign__tiny__seed1"} for key in STREAMS)
    assert set(Lake(tiny_home / "lake").read(RUNS)["organism"].to_pylist()) == {"benign"}
    assert len(loaded) == 1
