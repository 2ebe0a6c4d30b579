"""TableSpec: the one description of a table.

From it come the run-time check, the Parquet schema, the DuckDB DDL, the Dagster column schema, the dbt
source entry and the documentation, so that none of them can drift from another.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from diffing_core.errors import TableError

Role = Literal["key", "effect", "count", "info"]

ARROW_TYPES: dict[str, pa.DataType] = {
    "bool": pa.bool_(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float32": pa.float32(),
    "float64": pa.float64(),
    "string": pa.string(),
    "timestamp": pa.timestamp("us", tz="UTC"),
    "list<int32>": pa.list_(pa.int32()),
    "list<float32>": pa.list_(pa.float32()),
    "list<float64>": pa.list_(pa.float64()),
    "list<string>": pa.list_(pa.string()),
    "list<bool>": pa.list_(pa.bool_()),
}

SQL_TYPES: dict[str, str] = {
    "bool": "boolean",
    "int32": "integer",
    "int64": "bigint",
    "float32": "float",
    "float64": "double",
    "string": "varchar",
    "timestamp": "timestamptz",
    "list<int32>": "integer[]",
    "list<float32>": "float[]",
    "list<float64>": "double[]",
    "list<string>": "varchar[]",
    "list<bool>": "boolean[]",
}


@dataclass(frozen=True)
class Column:
    """One column: its type, meaning, unit and the part it plays.

    `effect` columns measure how base and tuned differ: identical models must give exactly zero there.
    A `signed` one changes its sign when base and tuned are swapped.
    """

    name: str
    dtype: str
    doc: str
    unit: str = ""
    role: Role = "info"
    nullable: bool = False
    low: float | None = None
    high: float | None = None
    signed: bool = False

    @property
    def arrow(self) -> pa.Field:
        """The Parquet field."""
        return pa.field(self.name, ARROW_TYPES[self.dtype], nullable=self.nullable)

    @property
    def description(self) -> str:
        """Meaning with the unit, as people see it in SQL, dbt and the web UI."""
        return f"{self.doc} [{self.unit}]" if self.unit else self.doc


KEY_COLUMNS: tuple[Column, ...] = (
    Column("organism", "string", "Registered name of the finetune.", role="key"),
    Column("model", "string", "Registered name of the base model.", role="key"),
    Column("variant", "string", "Variant of the organism on this model.", role="key"),
    Column("corpus", "string", "Probe corpus that was read; empty where none is.", role="key"),
    Column("method", "string", "Method that wrote the row.", role="key"),
    Column("settings_id", "string", "Hash of the method's settings.", role="key"),
    Column("run_id", "string", "Hash of the whole identity; resolves in the table `runs`.", role="key"),
)


@dataclass(frozen=True)
class TableSpec:
    """Name, grain and columns of one table; rows are unique on `grain` within one run.

    `heavy` tables (vectors per token) stay Parquet: the warehouse shows them as views.
    """

    name: str
    doc: str
    grain: tuple[str, ...]
    columns: tuple[Column, ...]
    heavy: bool = False

    def __post_init__(self) -> None:
        unknown = set(self.grain) - {column.name for column in self.columns}
        if unknown:
            raise TableError(f"table {self.name!r}: grain names unknown column(s) {sorted(unknown)}")
        times = Counter(column.name for column in self.stored_columns)
        twice = sorted(name for name, n in times.items() if n > 1)
        if twice:
            keys = ", ".join(column.name for column in KEY_COLUMNS)
            raise TableError(f"table {self.name!r}: column(s) {twice} twice; every stored row has {keys}")

    @cached_property
    def schema(self) -> pa.Schema:
        """Columns that a method fills."""
        return pa.schema([column.arrow for column in self.columns])

    @cached_property
    def stored_columns(self) -> tuple[Column, ...]:
        """Key columns first, then the method's own: what lies in Parquet and in DuckDB."""
        return KEY_COLUMNS + self.columns

    @cached_property
    def stored_schema(self) -> pa.Schema:
        """Arrow schema of the stored form."""
        return pa.schema([column.arrow for column in self.stored_columns])

    def table(self, columns: Mapping[str, Any]) -> pa.Table:
        """Builds and checks a table from columns (lists, arrays; a 2-d array fills a list column)."""
        missing = [name for name in self.schema.names if name not in columns]
        extra = [name for name in columns if name not in self.schema.names]
        if missing or extra:
            raise TableError(
                f"table {self.name!r}: missing column(s) {missing}, unexpected column(s) {extra}; "
                f"expected exactly {self.schema.names}"
            )
        arrays = [self._array(column, columns[column.name]) for column in self.columns]
        lengths = {name: len(array) for name, array in zip(self.schema.names, arrays, strict=True)}
        if len(set(lengths.values())) > 1:
            raise TableError(f"table {self.name!r}: columns of different length {lengths}")
        return self.check(pa.Table.from_arrays(arrays, schema=self.schema))

    def empty(self) -> pa.Table:
        """A table of no rows: the honest answer of a method that found nothing to write."""
        return self.schema.empty_table()

    def check(self, table: pa.Table) -> pa.Table:
        """Returns the table if schema, nulls, ranges and grain hold; raises TableError otherwise."""
        if not table.schema.equals(self.schema):
            raise TableError(f"table {self.name!r}: schema is\n{table.schema}\nexpected\n{self.schema}")
        for column in self.columns:
            self._check_values(column, table[column.name])
        self._check_grain(table)
        return table

    def ddl(self, schema: str = "raw") -> str:
        """`create table` statement of the stored form, with units in comments."""
        lines = [
            f"    \"{column.name}\" {SQL_TYPES[column.dtype]}{'' if column.nullable else ' not null'}"
            for column in self.stored_columns
        ]
        return f"create table {schema}.{self.name} (\n" + ",\n".join(lines) + "\n)"

    def comments(self, schema: str = "raw") -> list[str]:
        """`comment on` statements, so that people and agents who query DuckDB see meanings and units."""
        said = [f"comment on table {schema}.{self.name} is {_quoted(self.doc)}"]
        said += [
            f"comment on column {schema}.{self.name}.\"{column.name}\" is {_quoted(column.description)}"
            for column in self.stored_columns
        ]
        return said

    def dbt_source(self) -> dict[str, Any]:
        """Entry of `sources.yml`."""
        grain = ", ".join(("run_id", *self.grain))
        return {
            "name": self.name,
            "description": f"{self.doc} One row per {grain}.",
            "columns": [
                {"name": column.name, "description": column.description} for column in self.stored_columns
            ],
        }

    def _array(self, column: Column, values: Any) -> pa.Array:
        dtype = column.arrow.type
        try:
            if pa.types.is_list(dtype) and getattr(values, "ndim", 1) == 2:
                flat = pa.array(values.reshape(-1), type=dtype.value_type)
                return pa.FixedSizeListArray.from_arrays(flat, values.shape[1]).cast(dtype)
            array = pa.array(values, type=dtype)
            if pa.types.is_integer(dtype) and isinstance(values, list) and array.to_pylist() != values:
                raise pa.ArrowInvalid("fractions in a column of whole numbers")  # pyarrow would drop them unsaid
            return array
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError) as error:
            raise TableError(f"table {self.name!r}, column {column.name!r}: {error}") from error

    def _check_values(self, column: Column, values: pa.ChunkedArray) -> None:
        where = f"table {self.name!r}, column {column.name!r}"
        n_nulls = values.null_count
        if pa.types.is_list(values.type):
            values = pc.list_flatten(values)
            n_nulls += values.null_count
        if n_nulls and not column.nullable:
            raise TableError(f"{where}: {n_nulls} null(s), but the column is declared not null")
        if pa.types.is_floating(values.type):
            strange = pc.sum(pc.invert(pc.is_finite(values))).as_py()
            if strange:
                raise TableError(f"{where}: {strange} value(s) are NaN or infinite; write null or leave out")
        if column.low is None and column.high is None:
            return
        extremes = pc.min_max(values).as_py()
        too_low = column.low is not None and extremes["min"] is not None and extremes["min"] < column.low
        too_high = column.high is not None and extremes["max"] is not None and extremes["max"] > column.high
        if too_low or too_high:
            raise TableError(f"{where}: values span {extremes}, allowed {column.low} to {column.high}")

    def _check_grain(self, table: pa.Table) -> None:
        if table.num_rows <= 1:
            return
        if not self.grain:
            raise TableError(f"table {self.name!r} holds one row per run, found {table.num_rows}")
        groups = table.group_by(list(self.grain)).aggregate([([], "count_all")])
        if groups.num_rows != table.num_rows:
            worst = groups.sort_by([("count_all", "descending")]).slice(0, 1).to_pylist()[0]
            raise TableError(
                f"table {self.name!r}: {table.num_rows} rows but {groups.num_rows} distinct {self.grain}; "
                f"for example {worst}"
            )


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
