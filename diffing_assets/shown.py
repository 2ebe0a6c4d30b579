"""What a person sees on a materialization: schema, headline numbers, a small table, a plot, cost."""

from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg

from diffing_assets.pictures import bar_plot, picture
from diffing_core.comparison import Outcome
from diffing_core.tables import TableSpec

SHOWN_ROWS = 15
NUMBERS = ("float64", "float32", "int64", "int32")
TEXT_LIMIT = 160


def column_schema(specs: Sequence[TableSpec]) -> dg.TableSchema:
    """Columns of the tables an asset writes, with meanings and units; names carry their table."""
    return dg.TableSchema(
        [
            dg.TableColumn(f"{spec.name}.{column.name}", column.dtype, column.description)
            for spec in specs
            for column in spec.columns
        ]
    )


def outcome_metadata(outcome: Outcome) -> dict[str, Any]:
    """Metadata of one method on one pair."""
    numbers: dict[str, Any] = {}
    for key, result in outcome.results:
        prefix = f"{key.corpus}: " if len(outcome.results) > 1 else ""
        numbers |= {f"{prefix}{name}": value for name, value in result.method.headline(result.tables).items()}
    costs = [result.cost for _, result in outcome.results]
    return numbers | {
        "dagster/row_count": outcome.n_rows,
        "compute_s": sum(cost.compute_s for cost in costs),
        "forwards_shared_s": sum(cost.shared_s for cost in costs),
        "probe_tokens": sum(cost.n_tokens for cost in costs),
        "probes": "\n".join(outcome.probes) or None,
        "run_ids": ", ".join(key.run_id for key, _ in outcome.results),
        **(_findings(outcome) or _smallest_table(outcome)),
        **_figures(outcome),
    }


def rows_table(rows: Sequence[Mapping[str, Any]]) -> dg.TableMetadataValue:
    """A small table of scalars; text of models under test is cut and made printable."""
    return dg.TableMetadataValue(
        records=[dg.TableRecord({name: _cell(value) for name, value in row.items()}) for row in rows],
        schema=dg.TableSchema([dg.TableColumn(name, "string") for name in (rows[0] if rows else {})]),
    )


def _findings(outcome: Outcome) -> dict[str, Any]:
    """The best findings on every corpus as a table; as a plot those on the first, as far as their unit is the same."""
    if outcome.method.findings is None:
        return {}
    rows = [
        {"corpus": key.corpus, "rank": rank, "kind": each.kind, "item": each.item, "score": each.score, "unit": each.score_unit}
        for key, result in outcome.results
        for rank, each in enumerate(outcome.method.findings(result.tables, result.settings)[:SHOWN_ROWS], start=1)
    ]
    if not rows:
        return {}
    plotted = [row for row in rows if all(row[name] == rows[0][name] for name in ("corpus", "unit"))]
    plot = bar_plot([row["item"] for row in plotted], [row["score"] for row in plotted], rows[0]["unit"])
    return {"findings": rows_table(rows), "plot": plot}


def _figures(outcome: Outcome) -> dict[str, Any]:
    """The method's own figures of the first corpus; the report has those of all."""
    drawn = {
        figure.title: picture(figure, result.tables)
        for _, result in outcome.results[:1]
        for figure in outcome.method.figures
    }
    return {title: shown for title, shown in drawn.items() if shown is not None}


def _smallest_table(outcome: Outcome) -> dict[str, Any]:
    """Where nothing was found, or nothing is sought: the smallest table with rows, and its first measured column."""
    filled = [
        (result.tables[spec.name], spec)
        for _, result in outcome.results[:1]
        for spec in outcome.method.tables
        if result.tables[spec.name].num_rows
    ]
    found = {"findings": "nothing found"} if outcome.method.findings is not None and outcome.results else {}
    if not filled:
        return found
    table, spec = min(filled, key=lambda each: each[0].num_rows)
    rows = table.slice(0, SHOWN_ROWS).to_pylist()
    keys = [column.name for column in spec.columns if column.role == "key"]
    shown = found | {spec.name: rows_table(rows)}
    measured = [column for role in ("effect", "count") for column in spec.columns if column.role == role and column.dtype in NUMBERS]
    if not measured:
        return shown
    plotted = [row for row in rows if row[measured[0].name] is not None]
    labels = [" ".join(str(row[name]) for name in keys) for row in plotted]
    return shown | {"plot": bar_plot(labels, [row[measured[0].name] for row in plotted], measured[0].description)}


def _cell(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    return "".join(character if character.isprintable() else "·" for character in str(value))[:TEXT_LIMIT]
