"""The warehouse: one DuckDB file, rebuilt from the lake beside its place and swapped in by one rename.

Readers open the published file read-only. A session that is open during a swap keeps the snapshot that it
opened and never makes a build fail; the next session sees the new one. DuckDB names a catalog after its
file, and views carry that name, so the file being built and the published one have the same name.
"""

import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from diffing_core.errors import StorageError
from diffing_core.lake import SEED, Lake
from diffing_core.runs import RUNS
from diffing_core.tables import KEY_COLUMNS, Column, TableSpec

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

CATALOG = "warehouse"
FILE = f"{CATALOG}.duckdb"


class RegistrySpec(TableSpec):
    """A table about the registry instead of a run: it stores its own columns and no run keys."""

    @cached_property
    def stored_columns(self) -> tuple[Column, ...]:
        """What lies in DuckDB."""
        return self.columns

    def dbt_source(self) -> dict[str, Any]:
        """Entry of `sources.yml`."""
        return super().dbt_source() | {"description": f"{self.doc} One row per {', '.join(self.grain)}."}


ORGANISMS = RegistrySpec(
    name="organisms",
    doc="The registered finetunes, with or without results.",
    grain=("organism", "model", "variant"),
    columns=(
        *KEY_COLUMNS[:3],
        Column("type", "string", "What kind of change was trained in; decides the rubric."),
        Column("arm", "string", "organism, a null (identical, benign, seed_twin), known_large or unknown."),
        Column("description", "string", "What was trained in, in a sentence."),
        Column("kind", "string", "lora, full or identical."),
        Column(
            "dilution", "float64", "Parts of unrelated text per part of training text.", nullable=True, low=0
        ),
    ),
)


def build_raw(lake: Lake, specs: Iterable[TableSpec], organisms: pa.Table, path: Path) -> None:
    """Writes a new warehouse file with the schema `raw`: a table per spec, a view for heavy ones.

    Rows of runs that are not finished are left out.

    Raises:
        StorageError: a Parquet file does not hold what its spec says.
    """
    import duckdb

    specs = _runs_first(specs)
    lake.seed(specs)
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    path.unlink(missing_ok=True)
    with duckdb.connect(path) as connection:
        connection.execute("set enable_progress_bar = false; create schema raw")
        for spec in specs:
            _load(connection, lake, spec)
        connection.execute(ORGANISMS.ddl())
        connection.register("registered", ORGANISMS.check(organisms))
        connection.execute("insert into raw.organisms by name select * from registered")
        for statement in ORGANISMS.comments():
            connection.execute(statement)


def publish(build: Path, target: Path) -> None:
    """Puts a finished build in the place where readers look, in one rename.

    Raises:
        StorageError: the build is missing, damaged, or named differently from its target.
    """
    import duckdb

    if build.name != target.name:
        raise StorageError(f"{build.name} cannot become {target.name}: views inside carry the file's name")
    if not build.exists():
        raise StorageError(f"{build} does not exist, {target} stays as it is; build the warehouse first")
    try:
        with duckdb.connect(build) as connection:  # takes in the log of a killed build
            connection.execute("checkpoint")
    except duckdb.Error as error:
        raise StorageError(f"{build} cannot be published, {target} stays as it is: {error}") from error
    _sweep(target)
    os.replace(build, target)


def connect_live(lake: Lake, specs: Iterable[TableSpec], published: Path | None) -> "DuckDBPyConnection":
    """A session in memory that sees the lake as it is now, and the published snapshot if there is one.

    Names resolve without a catalog: `live.<table>` for the lake, `raw.`, `staging.` and `marts.` for the snapshot.
    """
    import duckdb

    specs = _runs_first(specs)
    lake.seed(specs)
    connection = duckdb.connect()
    connection.execute("set enable_progress_bar = false; create schema live")
    for spec in specs:
        connection.execute(f"create view live.{spec.name} as {_select(lake, spec, 'live')}")
    if published is not None and published.exists():
        connection.execute(f"attach {_quoted(str(published))} as {CATALOG} (read_only)")
        connection.execute(f"set search_path = '{','.join(_schemas(connection))}'")
    return connection


def _schemas(connection: "DuckDBPyConnection") -> list[str]:
    """Every schema of the session, the lake's last, so that two-part names resolve without a catalog."""
    found = connection.execute(
        "select database_name || '.' || schema_name from duckdb_schemas() where not internal order by 1"
    ).fetchall()
    return sorted((name for (name,) in found), key=lambda name: name == "memory.live")


def _runs_first(specs: Iterable[TableSpec]) -> list[TableSpec]:
    """Runs are read before the rest, so that what finishes meanwhile is left out whole."""
    return [RUNS, *(spec for spec in specs if spec.name != RUNS.name)]


def _load(connection: "DuckDBPyConnection", lake: Lake, spec: TableSpec) -> None:
    import duckdb

    select = _select(lake, spec, "raw")
    comments = spec.comments()
    try:
        if spec.heavy:
            connection.execute(f"create view raw.{spec.name} as {select}")
            comments[0] = comments[0].replace("on table", "on view", 1)
        else:
            connection.execute(spec.ddl())
            connection.execute(f"insert into raw.{spec.name} {select}")
    except duckdb.Error as error:
        raise StorageError(
            f"table {spec.name!r} cannot be read from {lake.root / spec.name}: {error}; "
            "materialize the partition again or delete the file"
        ) from error
    for statement in comments:
        connection.execute(statement)


def _select(lake: Lake, spec: TableSpec, schema: str) -> str:
    """Rows of finished runs. The seed file comes first: DuckDB takes names and types from the first file."""
    columns = ", ".join(f'"{column.name}"' for column in spec.stored_columns)
    files = f"[{_quoted(str(lake.root / spec.name / SEED))}, {_quoted(lake.glob(spec))}]"
    finished = "" if spec.name == RUNS.name else f" where run_id in (select run_id from {schema}.{RUNS.name})"
    return f"select {columns} from read_parquet({files}, hive_partitioning = false){finished}"


def _sweep(path: Path) -> None:
    """Removes what a killed process left: the log of another file of this name would damage the new one."""
    path.with_name(f"{path.name}.wal").unlink(missing_ok=True)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
