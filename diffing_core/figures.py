"""Figures as plain data: which columns of which table are worth a look, for whoever draws them.

A figure is declared beside the tables of its method. The web UI's picture and the chart on the report's page are
derived from it, so a new figure is one line and nothing here draws.

    heatmap  x across, group down, value as colour        line  value over x, a line per group        bar  a bar per x
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from diffing_core.tables import Column, TableSpec

Kind = Literal["heatmap", "line", "bar"]
Coordinate = str | int | float


@dataclass(frozen=True)
class Figure:
    """Columns of one table to draw; rows with a null in any of them are left out.

    Attributes:
        most: groups drawn (lines, rows of a heatmap; bars), those with the largest absolute values.
        log: whether values are drawn on a logarithmic axis; zeros are left out then.
    """

    kind: Kind
    title: str
    table: TableSpec
    x: str
    value: str
    group: str | None = None
    most: int = 12
    log: bool = False

    def __post_init__(self) -> None:
        known = [column.name for column in self.table.columns]
        unknown = [name for name in (self.x, self.value, self.group) if name not in (*known, None)]
        if unknown:
            raise TypeError(f"figure {self.title!r}: table {self.table.name!r} has no column {unknown}; it has {known}")
        if (self.kind == "heatmap" and not self.group) or (self.kind == "bar" and self.group):
            raise TypeError(f"figure {self.title!r}: a heatmap needs a group, a bar chart has none")

    def column(self, name: str) -> Column:
        """One of its columns."""
        return next(column for column in self.table.columns if column.name == name)

    @property
    def value_title(self) -> str:
        """Name and unit of what is drawn."""
        unit = self.column(self.value).unit
        return f"{self.value} [{unit}]" if unit else self.value

    def series(self, tables: Mapping[str, pa.Table]) -> dict[str, dict[Coordinate, float]]:
        """Group -> x -> value, in the order of the table; bars are one group. Rows that share a place give the largest."""
        table = tables[self.table.name]
        groups = table[self.group].to_pylist() if self.group else [""] * len(table)
        found: dict[str, dict[Coordinate, float]] = {}
        for group, x, value in zip(groups, table[self.x].to_pylist(), table[self.value].to_pylist(), strict=True):
            if None in (group, x, value) or (self.log and value <= 0):
                continue
            cells = found.setdefault(str(group), {})
            cells[x] = max(value, cells.get(x, value))
        return self._largest(found)

    def _largest(self, found: dict[str, dict[Coordinate, float]]) -> dict[str, dict[Coordinate, float]]:
        if self.kind == "bar":
            return {name: _first(cells, self.most, abs) for name, cells in found.items()}
        return _first(found, self.most, lambda cells: max(map(abs, cells.values())))


def _first(items: dict, most: int, size) -> dict:
    """The items of the largest size, as they were ordered."""
    kept = set(sorted(items, key=lambda name: -size(items[name]))[:most])
    return {name: item for name, item in items.items() if name in kept}
