"""Reports: dbt models over the lake as assets, their tests as checks, and the Evidence site last.

The warehouse is built aside and swapped in by one rename, after every dbt test has passed: a reader's
open session never breaks a build, and a failed build leaves the old snapshot in place.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
from dagster_dbt import DagsterDbtTranslator, DagsterDbtTranslatorSettings, DbtCliResource, DbtProject, dbt_assets

from dbt_reports.site import build_site
from diffing_assets.keys import OWNERS, SITE, shared_tables
from diffing_assets.resources import Workspace
from diffing_core.catalog import all_tables
from diffing_core.registry import Registry
from diffing_core.warehouse import FILE, ORGANISMS, build_raw, publish

PROJECT = DbtProject(Path(__file__).parent.parent / "dbt_reports", target_path=Path("target"))
DBT = str(Path(sys.executable).with_name("dbt"))


class ReportTranslator(DagsterDbtTranslator):
    """dbt models live under `reports/`, grouped as one subject."""

    def __init__(self) -> None:
        super().__init__(DagsterDbtTranslatorSettings(enable_duplicate_source_asset_keys=True))

    def get_asset_key(self, dbt_resource_props: Mapping[str, Any]) -> dg.AssetKey:
        """`reports/<model>`; a source is the asset that writes the table."""
        if dbt_resource_props["resource_type"] == "source":
            return super().get_asset_key(dbt_resource_props)
        return dg.AssetKey(["reports", dbt_resource_props["name"]])

    def get_group_name(self, dbt_resource_props: Mapping[str, Any]) -> str:
        """One lane for all of them."""
        return "reports"


def prepare_manifest(project: DbtProject) -> None:
    """Parses the dbt project if a file of it is newer than the manifest; parsing costs seconds per process."""
    manifest = project.manifest_path
    folders = [project.project_dir / name for name in ("models", "macros", "tests")]
    files = [file for folder in folders for suffix in ("sql", "yml", "md") for file in folder.rglob(f"*.{suffix}")]
    newest = max(file.stat().st_mtime for file in [*files, project.project_dir / "dbt_project.yml"])
    if manifest.exists() and manifest.stat().st_mtime >= newest:
        return
    os.environ.setdefault("DIFFING_WAREHOUSE", str(project.project_dir / FILE))
    dbt_resource().cli(["parse", "--quiet"], target_path=project.project_dir / "target").wait()


def dbt_resource() -> DbtCliResource:
    """dbt of this environment, whether or not it is on the PATH."""
    return DbtCliResource(project_dir=PROJECT, dbt_executable=DBT)


prepare_manifest(PROJECT)


@dbt_assets(manifest=PROJECT.manifest_path, dagster_dbt_translator=ReportTranslator(), project=PROJECT, pool="warehouse")
def marts(context: dg.AssetExecutionContext, dbt: DbtCliResource, workspace: Workspace) -> Iterator[Any]:
    """Loads the lake into a new warehouse, builds and tests the models there, and publishes it.

    All models or none: a warehouse with some of them would replace the one that people read.
    """
    if context.is_subset:
        raise dg.Failure("reports are built into one new warehouse: select all dbt models", allow_retries=False)
    building = workspace.home / "build" / FILE
    lake, registry = workspace.lake(), workspace.registry()
    build_raw(lake, all_tables().values(), registered(registry), building)
    os.environ["DIFFING_WAREHOUSE"] = str(building)
    yield from dbt.cli(["build"], context=context).stream()
    publish(building, workspace.warehouse)
    context.log.info("published %s", workspace.warehouse)


def collected_tables() -> list[dg.AssetSpec]:
    """Tables of the lake that many assets fill: they join the methods to the reports in the lineage."""
    return [
        dg.AssetSpec(
            key=dg.AssetKey(["raw", table]),
            deps=writers,
            group_name="reports",
            description=f"Rows of `raw.{table}` in the lake, whoever wrote them.",
            owners=OWNERS,
            kinds={"parquet"},
        )
        for table, writers in shared_tables().items()
    ]


@dg.asset(key=SITE, deps=[dg.AssetKey(["reports", "method_effectiveness"])], group_name="reports", owners=OWNERS,
          kinds={"evidence"}, pool="warehouse")  # fmt: skip
def site(context: dg.AssetExecutionContext, workspace: Workspace) -> dg.MaterializeResult:
    """The Evidence site: pages a person reads in the browser, built from the marts."""
    folder = build_site(workspace.home, context.log.info)
    files = [file for file in folder.rglob("*") if file.is_file()]
    return dg.MaterializeResult(
        metadata={
            "pages": sum(file.name == "index.html" for file in files),
            "size_mb": sum(file.stat().st_size for file in files) / 1e6,
            "open": dg.MetadataValue.path(str(folder / "index.html")),
        }
    )


def registered(registry: Registry) -> Any:
    """The registry as rows, so that pairs without results are seen as missing."""
    rows = []
    for pair in registry.pairs():
        organism, variant = registry.organism(pair.organism), registry.variant(pair)
        rows.append(
            {
                "organism": pair.organism,
                "model": pair.model,
                "variant": pair.variant,
                "type": organism.type,
                "arm": organism.arm,
                "description": organism.description,
                "kind": variant.kind,
                "dilution": variant.dilution,
            }
        )
    return ORGANISMS.table({name: [row[name] for row in rows] for name in ORGANISMS.schema.names})
