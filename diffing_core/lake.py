"""The Parquet lake: the truth about every finished result.

`lake/<table>/<method>/<pair>/<step>.<corpus>@<settings_id>.parquet`, one file per table and run. A file is
written beside its place under a hidden name and renamed, so a reader sees the old rows or the new ones,
never half of either; running again replaces the same files. The row in `runs` is written last. What is no table, such as fitted
weights, lies in `lake/_files/<method>/<pair>/<run_id>`.
"""

import os
import uuid
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from diffing_core.errors import StorageError
from diffing_core.identity import RunKey
from diffing_core.pairs import Pair
from diffing_core.runs import RUNS, Cost, run_row
from diffing_core.settings import Settings
from diffing_core.tables import TableSpec

SEED = "_schema.parquet"
FILES = "_files"
SAME_RESULT = ("version", "settings_id", "model_revision", "adapter_hash")


class Lake:
    """Reads and writes the tables under one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, spec: TableSpec, key: RunKey) -> Path:
        """Where the rows of one table and run lie."""
        name = f"{key.step}.{key.corpus}@{key.settings_id}.parquet"
        return self.root / spec.name / key.method / key.pair.key / name

    def folder(self, key: RunKey) -> Path:
        """A folder for what a result keeps beside its tables; no other identity's. What an interrupted run left is there."""
        folder = self.root / FILES / key.method / key.pair.key / key.run_id
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def write(self, spec: TableSpec, key: RunKey, table: pa.Table) -> Path:
        """Stores the rows of one table, replacing what an earlier run of the same settings left."""
        checked = spec.check(table)
        keys = [pa.array([value] * len(checked), pa.string()) for value in key.columns().values()]
        stored = pa.Table.from_arrays(keys + checked.columns, schema=spec.stored_schema)
        path = self.path(spec, key)
        replace_file(path, lambda aside: pq.write_table(stored, aside, compression="zstd"))
        return path

    def write_result(
        self, key: RunKey, tables: Mapping[TableSpec, pa.Table], settings: Settings, cost: Cost
    ) -> None:
        """Stores all tables of one run and then the row that declares it finished.

        All are checked before the first is written. Where another identity's result is replaced, its row
        goes first, so that it never vouches for a half of the new tables.
        """
        for spec, table in tables.items():
            spec.check(table)
        if not self.finished(key):
            self.path(RUNS, key).unlink(missing_ok=True)
        for spec, table in tables.items():
            self.write(spec, key, table)
        self.write(RUNS, key, run_row(key, settings, cost, datetime.now(UTC)))

    def finished(self, key: RunKey) -> bool:
        """Whether exactly this identity has a complete result."""
        path = self.path(RUNS, key)
        return path.exists() and pq.read_table(path, columns=["run_id"])["run_id"].to_pylist() == [key.run_id]

    def read(self, spec: TableSpec, *, pair: Pair | None = None, method: str = "*") -> pa.Table:
        """All stored rows of a table, optionally of one pair or method; no rows is a valid answer."""
        where = pair.key if pair else "*"
        files = sorted((self.root / spec.name).glob(f"{method}/{where}/[!.]*.parquet"))
        return pa.concat_tables(
            [spec.stored_schema.empty_table(), *(_read(file, spec) for file in files)]
        )

    def read_current(self, spec: TableSpec, *, pair: Pair, method: str, step: str = "diff") -> pa.Table:
        """Rows of the newest finished result, all its corpora; rows of unfinished results never count.

        A corpus counts only if it was read by the same version and settings on the same weights as the
        newest one: findings on two versions of a finetune are never mixed.
        """
        runs = [row for row in self.read(RUNS, pair=pair, method=method).to_pylist() if row["step"] == step]
        newest = max(runs, key=lambda row: row["finished_at"], default=None)
        current = [row["run_id"] for row in runs if all(row[name] == newest[name] for name in SAME_RESULT)]
        rows = self.read(spec, pair=pair, method=method)
        return rows.filter(pc.is_in(rows["run_id"], pa.array(current, pa.string())))

    def seed(self, specs: Iterable[TableSpec]) -> None:
        """Writes one file of no rows per table, so that a scan of an empty table has the right types."""
        for spec in specs:
            path = self.root / spec.name / SEED
            if not path.exists() or pq.read_schema(path) != spec.stored_schema:
                empty = spec.stored_schema.empty_table()
                replace_file(path, lambda aside, rows=empty: pq.write_table(rows, aside))

    def glob(self, spec: TableSpec) -> str:
        """Pattern that a SQL reader scans; hidden files aside of their place never match."""
        return str(self.root / spec.name / "**" / "[!.]*.parquet")


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write(aside)` fill a hidden neighbour of `path`, then renames it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        write(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _read(file: Path, spec: TableSpec) -> pa.Table:
    try:
        return pq.ParquetFile(file).read().cast(spec.stored_schema)
    except (ValueError, pa.ArrowNotImplementedError) as error:
        raise StorageError(
            f"{file} does not hold what table {spec.name!r} now is, {spec.stored_schema.names}: {error}; "
            "materialize this partition again or delete the file"
        ) from error
