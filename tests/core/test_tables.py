"""TableSpec: what it refuses, and that SQL, Parquet and documentation follow from it."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from diffing_core.catalog import all_tables
from diffing_core.errors import TableError
from diffing_core.tables import ARROW_TYPES, KEY_COLUMNS, Column, TableSpec

SPEC = TableSpec(
    "scores",
    "Scores of things.",
    ("layer", "token"),
    (
        Column("layer", "int32", "Which layer.", role="key", low=0),
        Column("token", "string", "Which token; it's text.", role="key"),
        Column("score", "float64", "How much.", "nats", low=-1, high=1),
        Column("note", "float32", "Perhaps.", nullable=True),
        Column("vector", "list<float32>", "A direction."),
    ),
)
EVERY_TYPE = TableSpec("every_type", "One column of each.", (), tuple(
    Column(f"c{number}", dtype, "A value.", nullable=True) for number, dtype in enumerate(ARROW_TYPES)
))  # fmt: skip
VALUES = (True, 2**31 - 1, -(2**63), 1.5, 0.1, "it's é", datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC),
          [1, -2], [0.5], [0.1, 2.0], ["a", ""], [True, False])  # fmt: skip


def columns(**changes: Any) -> dict[str, Any]:
    """Two good rows, with changes."""
    good = {
        "layer": [0, 1], "token": ["a", "a"], "score": [0.5, -1.0], "note": [None, 2.0], "vector": np.eye(2),
    }  # fmt: skip
    return good | changes


@pytest.fixture
def connection() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as opened:
        opened.execute("create schema raw; set timezone = 'UTC'")
        yield opened


def test_good_rows_pass_unchanged() -> None:
    table = SPEC.table(columns())
    assert table.to_pylist()[1] == {"layer": 1, "token": "a", "score": -1.0, "note": 2.0, "vector": [0.0, 1.0]}
    assert SPEC.check(table) is table


def test_lists_and_arrays_make_the_same_table() -> None:
    arrays = columns(layer=np.arange(2), score=np.array([0.5, -1.0]), vector=[[1.0, 0.0], [0.0, 1.0]])
    assert SPEC.table(arrays).equals(SPEC.table(columns()))


def test_a_table_of_no_rows_is_valid() -> None:
    assert SPEC.check(SPEC.empty()).num_rows == 0
    assert SPEC.table({name: [] for name in SPEC.schema.names}).equals(SPEC.empty())
    assert SPEC.table(columns(layer=[], token=[], score=[], note=[], vector=np.zeros((0, 4)))).num_rows == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layer": [0, None]}, r"column 'layer': 1 null\(s\)"),
        ({"layer": [0, 2**40]}, "column 'layer'"),
        ({"layer": [0, 2**70]}, "column 'layer'"),
        ({"layer": [0, 1.5]}, "column 'layer': fractions"),
        ({"layer": np.array([0, 1.5])}, "column 'layer'"),
        ({"layer": ["0", "1"]}, "column 'layer'"),
        ({"layer": [-1, 0]}, "column 'layer': values span .* allowed 0 to None"),
        ({"token": [0, 1]}, "column 'token'"),
        ({"score": [0.5, 1.01]}, "column 'score': values span .* allowed -1 to 1"),
        ({"score": [0.5, float("nan")]}, r"column 'score': 1 value\(s\) are NaN or infinite"),
        ({"score": np.array([-np.inf, np.nan])}, r"column 'score': 2 value\(s\) are NaN or infinite"),
        ({"note": [None, float("inf")]}, r"column 'note': 1 value\(s\) are NaN or infinite"),
        ({"note": [None, 1e300]}, r"column 'note': 1 value\(s\) are NaN or infinite"),
        ({"vector": np.array([[1, np.nan], [np.inf, 0]])}, r"column 'vector': 2 value\(s\) are NaN or infinite"),
        ({"vector": [[1.0], [None]]}, r"column 'vector': 1 null\(s\)"),
        ({"vector": [[1.0], None]}, r"column 'vector': 1 null\(s\)"),
        ({"vector": [1.0, 2.0]}, "column 'vector'"),
        ({"layer": [0, 0]}, r"2 rows but 1 distinct \('layer', 'token'\).*'count_all': 2"),
        ({"layer": [0, 1, 2]}, "columns of different length .'layer': 3, 'token': 2"),
    ],
)  # fmt: skip
def test_bad_values_are_refused_by_table_and_column(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(TableError, match=f"table 'scores'.*{said}"):
        SPEC.table(columns(**changes))


def test_missing_and_extra_columns_are_both_named() -> None:
    given = columns(sore=[0, 0])
    del given["score"]
    with pytest.raises(TableError, match=r"missing column\(s\) \['score'\], unexpected column\(s\) \['sore'\]"):
        SPEC.table(given)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda table: table.drop_columns(["note"]),
        lambda table: table.append_column("more", pa.array([1, 2])),
        lambda table: table.select([1, 0, 2, 3, 4]),
        lambda table: table.set_column(2, "score", pa.array([0.5, 0.5], pa.float32())),
    ],
    ids=["missing", "extra", "order", "type"],
)
def test_check_refuses_a_table_of_another_schema(wrong: Any) -> None:
    with pytest.raises(TableError, match="table 'scores': schema is"):
        SPEC.check(wrong(SPEC.table(columns())))


def test_nulls_are_equal_where_the_grain_holds_them() -> None:
    spec = TableSpec("spots", "Spots.", ("position",), (Column("position", "int32", "Where.", nullable=True),))
    assert spec.table({"position": [None, 0]}).num_rows == 2
    with pytest.raises(TableError, match="2 rows but 1 distinct"):
        spec.table({"position": [None, None]})


def test_an_empty_grain_means_one_row() -> None:
    spec = TableSpec("single", "One row.", (), (Column("x", "int32", "X."),))
    assert spec.table({"x": [1]}).num_rows == 1
    with pytest.raises(TableError, match="holds one row per run, found 2"):
        spec.table({"x": [1, 2]})


def test_a_grain_of_unknown_columns_is_refused() -> None:
    with pytest.raises(TableError, match=r"grain names unknown column\(s\) \['leyer'\]"):
        TableSpec("scores", "Scores.", ("leyer",), SPEC.columns)


def test_stored_form_begins_with_the_key_columns() -> None:
    assert SPEC.stored_schema.names == [column.name for column in KEY_COLUMNS] + SPEC.schema.names


@pytest.mark.parametrize("spec", all_tables().values(), ids=lambda spec: spec.name)
def test_ddl_and_comments_of_every_table_are_valid_sql(spec: TableSpec, connection: duckdb.DuckDBPyConnection) -> None:
    for statement in [spec.ddl(), *spec.comments()]:
        connection.execute(statement)
    made = connection.execute(f"select * from raw.{spec.name}").to_arrow_table().schema
    assert dict(zip(made.names, made.types, strict=True)) == dict(
        zip(spec.stored_schema.names, spec.stored_schema.types, strict=True)
    )
    facts = connection.execute(
        "select column_name, is_nullable, comment from duckdb_columns() where schema_name = 'raw' order by column_index"
    ).fetchall()
    assert facts == [(column.name, column.nullable, column.description) for column in spec.stored_columns]
    [(comment,)] = connection.execute("select comment from duckdb_tables() where schema_name = 'raw'").fetchall()
    assert comment == spec.doc


def test_values_of_every_type_survive_the_way_into_duckdb_and_back(connection: duckdb.DuckDBPyConnection) -> None:
    table = EVERY_TYPE.table({column.name: [value] for column, value in zip(EVERY_TYPE.columns, VALUES, strict=True)})
    connection.execute(EVERY_TYPE.ddl())
    connection.register("given", table)
    connection.execute("insert into raw.every_type by name select 'k' as organism, 'k' as model, 'k' as variant, "
                       "'k' as corpus, 'k' as method, 'k' as settings_id, 'k' as run_id, * from given")  # fmt: skip
    back = connection.execute(f"select {', '.join(table.schema.names)} from raw.every_type").to_arrow_table()
    assert back.to_pylist() == table.to_pylist()
    assert [field.type for field in back.schema] == [field.type for field in table.schema]


def test_dbt_source_names_grain_columns_and_units() -> None:
    entry = SPEC.dbt_source()
    assert entry["name"] == "scores"
    assert entry["description"] == "Scores of things. One row per run_id, layer, token."
    assert [column["name"] for column in entry["columns"]] == SPEC.stored_schema.names
    assert {"name": "score", "description": "How much. [nats]"} in entry["columns"]


@pytest.mark.parametrize("name", ["model", "run_id", "score"])
def test_a_column_that_every_stored_row_has_is_refused_when_it_is_declared(name: str) -> None:
    """DuckDB would refuse the stored table, long after it was computed."""
    score = Column("score", "float64", "A number.")
    with pytest.raises(TableError, match=rf"table 'mine': column\(s\) \['{name}'\] twice"):
        TableSpec("mine", "Mine.", (name,), (score, Column(name, "string", "Another.")))
