"""The warehouse: what counts as a row, exact types, and readers that never notice a rebuild."""

import subprocess
import sys
import textwrap
import threading
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffing_core.errors import StorageError, TableError
from diffing_core.findings import FINDINGS, Finding, findings_table
from diffing_core.identity import RunKey
from diffing_core.lake import Lake
from diffing_core.pairs import Pair
from diffing_core.runs import RUNS, Cost
from diffing_core.settings import Settings
from diffing_core.tables import SQL_TYPES, Column, TableSpec
from diffing_core.warehouse import FILE, ORGANISMS, build_raw, connect_live, publish

VECTORS = TableSpec(
    name="vectors",
    doc="Vectors per token.",
    grain=("token_id",),
    columns=(
        Column("token_id", "int32", "Vocabulary index.", role="key"),
        Column("vector", "list<float32>", "Its vector.", "activation units"),
    ),
    heavy=True,
)
EVERY_TYPE = TableSpec(
    name="every_type",
    doc="One column per type.",
    grain=(),
    columns=tuple(
        Column(f"c{n}", dtype, "A column.", nullable=n % 2 == 1) for n, dtype in enumerate(SQL_TYPES)
    ),
)
SPECS = (FINDINGS, VECTORS, EVERY_TYPE, RUNS)
SETTINGS = Settings()


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(tmp_path / "lake")


def run_key(method: str = "kl", organism: str = "cake_bake") -> RunKey:
    return RunKey(
        Pair("demo", organism), method, "1", SETTINGS.settings_id(), "base", "adapter", "unrelated", "hash"
    )


def found(*items: str) -> pa.Table:
    return findings_table([Finding("token", item, 1.0, "nats", "kl_vocabulary") for item in items])


def registered(*names: str) -> pa.Table:
    columns = {name: ["x"] * len(names) for name in ORGANISMS.schema.names}
    return ORGANISMS.table(columns | {"organism": list(names), "dilution": [None] * len(names)})


def build(lake: Lake, path: Path, *names: str) -> Path:
    build_raw(lake, SPECS, registered(*names), path)
    return path


def query(path: Path, sql: str) -> list[tuple]:
    with duckdb.connect(path, read_only=True) as connection:
        return connection.execute(sql).fetchall()


def test_rows_count_once_their_run_is_finished(lake: Lake, tmp_path: Path) -> None:
    lake.write_result(run_key("kl"), {FINDINGS: found("cake"), VECTORS: _vectors()}, SETTINGS, Cost())
    lake.write(FINDINGS, run_key("adl"), found("unfinished"))
    lake.write(VECTORS, run_key("adl"), _vectors())
    path = build(lake, tmp_path / FILE)
    assert query(path, "select item from raw.findings") == [("cake",)]
    assert query(path, "select token_id, vector from raw.vectors") == [(7, [1.0, 2.5])]
    lake.write_result(run_key("adl"), {}, SETTINGS, Cost())
    assert query(path, "select count(*) from raw.vectors") == [(1,)], "a view shows runs of the snapshot only"


def test_an_empty_lake_has_every_table_with_its_types_and_comments(lake: Lake, tmp_path: Path) -> None:
    path = build(lake, tmp_path / FILE, "cake_bake")
    for spec in SPECS:
        described = query(path, f'select column_name, column_type, "null" from (describe raw.{spec.name})')
        wanted = [(column.name, SQL_TYPES[column.dtype].upper()) for column in spec.stored_columns]
        aliases = {"TIMESTAMPTZ": "TIMESTAMP WITH TIME ZONE"}
        assert [row[:2] for row in described] == [(name, aliases.get(dtype, dtype)) for name, dtype in wanted]
        if not spec.heavy:
            assert [row[2] == "YES" for row in described] == [
                column.nullable for column in spec.stored_columns
            ]
    assert query(path, "select organism, dilution from raw.organisms") == [("cake_bake", None)]
    comment = "select comment from duckdb_columns() where table_name = 'vectors' and column_name = 'vector'"
    assert query(path, comment) == [("Its vector. [activation units]",)]
    assert query(path, "select comment from duckdb_views() where view_name = 'vectors'") == [
        ("Vectors per token.",)
    ]


def test_values_survive_exactly(lake: Lake, tmp_path: Path) -> None:
    values = {
        "bool": True, "int32": 2**31 - 1, "int64": 2**53 + 1, "float32": 1.5, "float64": 0.1 + 0.2,
        "string": "'Ġca\x1fke'", "timestamp": datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC),
        "list<int32>": [1, -2], "list<float32>": [0.5], "list<float64>": [0.1], "list<string>": ["a", "b"],
        "list<bool>": [True, False],
    }  # fmt: skip
    row = {column.name: [values[column.dtype]] for column in EVERY_TYPE.columns}
    lake.write_result(run_key(), {EVERY_TYPE: EVERY_TYPE.table(row)}, SETTINGS, Cost())
    path = build(lake, tmp_path / FILE)
    with duckdb.connect(path, read_only=True) as connection:
        connection.execute("set TimeZone = 'UTC'")
        stored = (
            connection.execute("select columns('^c[0-9]+$') from raw.every_type")
            .to_arrow_table()
            .to_pylist()[0]
        )
    assert stored == {name: given[0] for name, given in row.items()}


def test_hidden_half_written_files_are_never_read(lake: Lake, tmp_path: Path) -> None:
    lake.write_result(run_key(), {FINDINGS: found("cake")}, SETTINGS, Cost())
    place = lake.path(FINDINGS, run_key())
    whole = place.read_bytes()
    place.with_name(f".{place.name}.1a2b3c4d").write_bytes(whole[:100])
    place.with_name(".other.parquet").write_bytes(whole[:100])
    (place.parent.parent / ".other.parquet").write_bytes(b"")
    assert query(build(lake, tmp_path / FILE), "select item from raw.findings") == [("cake",)]


def test_a_file_of_another_schema_is_named(lake: Lake, tmp_path: Path) -> None:
    lake.write_result(run_key(), {FINDINGS: found("cake")}, SETTINGS, Cost())
    place = lake.path(FINDINGS, run_key())
    pq.write_table(pq.ParquetFile(place).read().drop_columns(["score_unit"]), place)
    with pytest.raises(StorageError, match=f"(?s)'findings'.*{place.name}.*materialize"):
        build(lake, tmp_path / FILE)


def test_the_registry_is_checked(lake: Lake, tmp_path: Path) -> None:
    with pytest.raises(TableError, match="organisms"):
        build_raw(lake, SPECS, registered("cake_bake", "cake_bake").drop_columns(["arm"]), tmp_path / FILE)
    assert ORGANISMS.dbt_source()["description"].endswith("One row per organism, model, variant.")


def test_publish_keeps_the_old_snapshot_unless_the_build_is_whole(lake: Lake, tmp_path: Path) -> None:
    target = tmp_path / FILE
    publish(build(lake, tmp_path / "build" / FILE, "old"), target)
    (tmp_path / "build" / FILE).write_bytes(b"not a database")
    with pytest.raises(StorageError, match="cannot be published"):
        publish(tmp_path / "build" / FILE, target)
    (tmp_path / "build" / FILE).unlink()
    with pytest.raises(StorageError, match="does not exist"):
        publish(tmp_path / "build" / FILE, target)
    with pytest.raises(StorageError, match="cannot become"):
        publish(target, tmp_path / "other.duckdb")
    assert query(target, "select organism from raw.organisms") == [("old",)]


def test_publish_takes_in_the_log_of_a_killed_build(lake: Lake, tmp_path: Path) -> None:
    """The last writes may still lie in the log beside the file; one beside the target belongs to another file."""
    building, target = build(lake, tmp_path / "build" / FILE, "o"), tmp_path / FILE
    killed = f"""
        import duckdb, os
        connection = duckdb.connect({str(building)!r})
        connection.execute("set checkpoint_threshold = '1TB'")
        connection.execute("create table raw.late as select 1 as n")
        os._exit(9)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(killed)], check=False)
    assert building.with_name(f"{FILE}.wal").exists()
    target.with_name(f"{FILE}.wal").write_bytes(b"log of an older file")
    publish(building, target)
    assert query(target, "select n from raw.late") == [(1,)]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["build", "lake", FILE]
    assert not list(building.parent.iterdir())


READER = """
import sys, duckdb
held = duckdb.connect(sys.argv[1], read_only=True)
for line in sys.stdin:
    print(held.execute("select max(organism) from raw.organisms").fetchone()[0], flush=True)
"""


def test_a_held_session_outlives_swaps_while_writers_write(lake: Lake, tmp_path: Path) -> None:
    target = tmp_path / FILE
    publish(build(lake, tmp_path / "build" / FILE, "v0"), target)
    writer = threading.Thread(target=_write_many, args=(lake, 30))
    with subprocess.Popen(
        [sys.executable, "-c", READER, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as reader:
        assert _ask(reader) == "v0"
        writer.start()
        for version in ("v1", "v2", "v3"):
            publish(build(lake, tmp_path / "build" / FILE, version), target)
            assert _ask(reader) == "v0", "the session keeps the snapshot that it opened"
            assert query(target, "select organism from raw.organisms") == [(version,)], (
                "a new one sees the new"
            )
        writer.join()
        reader.stdin.close()
    publish(build(lake, tmp_path / "build" / FILE, "v4"), target)
    assert query(target, "select count(*) from raw.findings") == [(30,)]


def test_live_views_see_the_lake_beside_the_snapshot(lake: Lake, tmp_path: Path) -> None:
    target = tmp_path / FILE
    with connect_live(lake, SPECS, target) as connection:
        assert connection.execute("select count(*) from live.findings").fetchone() == (0,)
    publish(build(lake, tmp_path / "build" / FILE, "o"), target)
    lake.write_result(run_key(), {FINDINGS: found("cake"), VECTORS: _vectors()}, SETTINGS, Cost())
    lake.write(FINDINGS, run_key("adl"), found("unfinished"))
    with connect_live(lake, SPECS, target) as connection:
        assert connection.execute("select item from live.findings").fetchall() == [("cake",)]
        assert connection.execute("select count(*) from raw.findings").fetchone() == (0,)
        assert connection.execute("select count(*) from raw.vectors").fetchone() == (0,)
        with pytest.raises(duckdb.Error, match="read-only"):
            connection.execute("delete from raw.findings")


def _vectors() -> pa.Table:
    return VECTORS.table({"token_id": [7], "vector": [[1.0, 2.5]]})


def _write_many(lake: Lake, count: int) -> None:
    for n in range(count):
        lake.write_result(run_key(organism=f"o{n}"), {FINDINGS: found(f"word{n}")}, SETTINGS, Cost())


def _ask(reader: subprocess.Popen) -> str:
    reader.stdin.write("?\n")
    reader.stdin.flush()
    return reader.stdout.readline().strip()
