"""Pictures of figures: real PNG of every kind, small, and safe from the text of models."""

import base64
import struct

import pytest

from diffing_assets.pictures import picture, printable
from diffing_core.figures import Figure
from diffing_core.tables import Column, TableSpec

SPEC = TableSpec("t", "Per place.", ("x", "name"), (
    Column("x", "int32", "Place.", role="key"),
    Column("name", "string", "Name.", role="key"),
    Column("size", "float64", "Size.", "nats", "effect", nullable=True),
))  # fmt: skip
ROWS = {"x": [0, 1, 40, 1], "name": ["$\\frac$", "b", "\x1b[31m" + "c" * 90, "c"], "size": [1.0, -2.0, None, 0.5]}
FIGURES = [
    Figure("heatmap", "heat", SPEC, "x", "size", "name"),
    Figure("line", "lines", SPEC, "x", "size", "name"),
    Figure("line", "log", SPEC, "x", "size", log=True),
    Figure("bar", "bars", SPEC, "name", "size"),
    Figure("heatmap", "names", SPEC, "name", "size", "name"),
]


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.title)
def test_every_kind_becomes_a_small_png(figure: Figure) -> None:
    shown = picture(figure, {"t": SPEC.table(ROWS)}).value
    assert shown.startswith(f"![{figure.title}](data:image/png;base64,")
    file = base64.b64decode(shown.partition("base64,")[2].rstrip(")"))
    assert file.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", file[16:24])
    assert 200 < width < 800
    assert 60 < height < 800
    assert len(file) < 40_000


def test_nothing_to_draw_gives_no_picture() -> None:
    assert picture(FIGURES[0], {"t": SPEC.empty()}) is None
    assert picture(FIGURES[0], {"t": SPEC.table(ROWS | {"size": [None] * 4})}) is None


def test_text_of_models_is_cut_and_no_formula() -> None:
    assert printable("$\\frac$") == r"\$\frac\$"
    assert printable("\x1b[31m" + "x" * 90) == "·[31m" + "x" * 27
