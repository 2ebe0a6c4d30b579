"""Small pictures inside Markdown, for the web UI: a method's figures, and bars of what it found."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import dagster as dg

from diffing_core.figures import Figure

if TYPE_CHECKING:
    import pyarrow as pa
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

BLUE = "#4269d0"
LABEL_CHARS, SMALL, DPI = 32, 7, 80
TICKS = 16


def picture(figure: Figure, tables: Mapping[str, "pa.Table"]) -> dg.MarkdownMetadataValue | None:
    """A method's figure drawn from its tables; None if there is nothing to draw."""
    series = figure.series(tables)
    if not series:
        return None
    draw = {"heatmap": _heatmap, "line": _lines, "bar": _bars}[figure.kind]
    return as_markdown(draw(figure, series), figure.title)


def bar_plot(labels: Sequence[str], values: Sequence[float], unit: str) -> dg.MarkdownMetadataValue:
    """A horizontal bar chart."""
    return as_markdown(_bar_canvas(labels, values, unit), "plot")


def as_markdown(canvas: "Canvas", title: str) -> dg.MarkdownMetadataValue:
    """The picture as PNG."""
    file = io.BytesIO()
    canvas.savefig(file, format="png", dpi=DPI)
    return dg.MetadataValue.md(f"![{title}](data:image/png;base64,{base64.b64encode(file.getvalue()).decode()})")


def printable(text: Any) -> str:
    """Text of models as a label: short, without control characters, and no formula to matplotlib."""
    said = "".join(character if character.isprintable() else "·" for character in str(text))
    return said[:LABEL_CHARS].replace("$", r"\$")


def _heatmap(figure: Figure, series: Mapping[str, Mapping[Any, float]]) -> "Canvas":
    columns = _in_order({x for cells in series.values() for x in cells})
    values = [[cells.get(x, float("nan")) for x in columns] for cells in series.values()]
    present = [value for cells in series.values() for value in cells.values()]
    bound = max(map(abs, present))
    colours = {"cmap": "RdBu_r", "vmin": -bound, "vmax": bound} if min(present) < 0 else {"cmap": "Blues", "vmin": 0}
    canvas, axes = _canvas(0.32 * len(columns) + 3, 0.24 * len(series) + 1)
    axes.set_facecolor("#e5e5e5")
    image = axes.imshow(values, aspect="auto", **colours)
    _ticks(axes.set_xticks, columns, rotation=0 if all(isinstance(x, int) for x in columns) else 60)
    _ticks(axes.set_yticks, list(series), most=len(series))
    canvas.colorbar(image, ax=axes).ax.tick_params(labelsize=SMALL)
    _name(axes, figure.x, "")
    axes.set_title(f"{figure.title}: {printable(figure.value_title)}", fontsize=SMALL + 1)
    return canvas


def _lines(figure: Figure, series: Mapping[str, Mapping[Any, float]]) -> "Canvas":
    canvas, axes = _canvas(6, 3)
    for name, cells in series.items():
        xs = _in_order(cells)
        axes.plot(xs, [cells[x] for x in xs], marker="." if len(xs) < 3 * TICKS else None, linewidth=1, label=printable(name))
    axes.set_yscale("log" if figure.log else "linear")
    axes.xaxis.get_major_locator().set_params(integer=True)
    if figure.group:
        axes.legend(fontsize=SMALL - 1, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    _name(axes, figure.x, figure.value_title)
    axes.set_title(figure.title, fontsize=SMALL + 1)
    return canvas


def _bars(figure: Figure, series: Mapping[str, Mapping[Any, float]]) -> "Canvas":
    [cells] = series.values()
    ordered = sorted(cells, key=lambda x: -cells[x])
    return _bar_canvas(ordered, [cells[x] for x in ordered], f"{figure.title}: {figure.value_title}")


def _bar_canvas(labels: Sequence[Any], values: Sequence[float], unit: str) -> "Canvas":
    canvas, axes = _canvas(5, 0.25 * len(labels) + 0.6)
    axes.barh(range(len(labels)), values, color=BLUE)
    _ticks(axes.set_yticks, labels, most=len(labels))
    _name(axes, unit, "")
    axes.invert_yaxis()
    return canvas


def _canvas(width: float, height: float) -> "tuple[Canvas, Axes]":
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(width, height), layout="constrained")
    axes = canvas.subplots()
    axes.tick_params(labelsize=SMALL)
    return canvas, axes


def _name(axes: "Axes", x: str, y: str) -> None:
    axes.set_xlabel(x.replace("$", r"\$"), fontsize=SMALL)
    axes.set_ylabel(y.replace("$", r"\$"), fontsize=SMALL)


def _ticks(set_ticks: Any, labels: Sequence[Any], most: int = TICKS, **style: Any) -> None:
    """At most so many labels, evenly spaced."""
    step = -(-len(labels) // most) or 1
    places = range(0, len(labels), step)
    set_ticks(places, [printable(labels[place]) for place in places], fontsize=SMALL, **style)


def _in_order(xs: Iterable[Any]) -> list[Any]:
    """Numbers by size, names by alphabet."""
    xs = list(xs)
    return sorted(xs) if all(isinstance(x, int | float) for x in xs) else sorted(xs, key=str)
