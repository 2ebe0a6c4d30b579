"""Figures as data: columns that exist, what is drawn of a table, and every declared figure on a real result."""

import pytest

from diffing_core.figures import Figure
from diffing_core.methods import all_methods, get_method
from diffing_core.tables import Column, TableSpec

CHANGES = TableSpec("changes", "Per tensor.", ("name",), (
    Column("name", "string", "Tensor.", role="key"),
    Column("layer", "int32", "Block.", nullable=True),
    Column("module", "string", "Module."),
    Column("size", "float64", "Size.", "nats", "effect", nullable=True),
))  # fmt: skip
TABLES = {
    "changes": CHANGES.table(
        {
            "name": ["q", "q bias", "up", "embed", "lost", "flat"],
            "layer": [1, 1, 0, None, 0, 0],
            "module": ["q", "q", "up", "embed", "q", "flat"],
            "size": [-3.0, 1.0, 0.5, 9.0, None, 0.0],
        }
    )
}


def heatmap(**changes: object) -> Figure:
    return Figure(**{"kind": "heatmap", "title": "t", "table": CHANGES, "x": "layer", "value": "size", "group": "module"} | changes)


def test_rows_of_one_place_give_the_largest_and_nulls_are_left_out() -> None:
    assert heatmap().series(TABLES) == {"q": {1: 1.0}, "up": {0: 0.5}, "flat": {0: 0.0}}
    assert heatmap(log=True).series(TABLES) == {"q": {1: 1.0}, "up": {0: 0.5}}
    assert heatmap(most=1).series(TABLES) == {"q": {1: 1.0}}
    assert heatmap().value_title == "size [nats]"


def test_bars_are_one_group_and_the_longest_are_kept() -> None:
    bars = heatmap(kind="bar", x="name", group=None, most=2)
    assert bars.series(TABLES) == {"": {"q": -3.0, "embed": 9.0}}
    assert heatmap(kind="line", group=None).series(TABLES) == {"": {1: 1.0, 0: 0.5}}


def test_a_figure_of_a_column_or_table_that_is_not_there_is_no_figure() -> None:
    with pytest.raises(TypeError, match=r"no column \['depth'\]; it has \['name', 'layer'"):
        heatmap(x="depth")
    with pytest.raises(TypeError, match="a heatmap needs a group"):
        heatmap(group=None)
    with pytest.raises(TypeError, match="draw a table that it does not write"):
        type(get_method("kl"))(**vars(get_method("kl")) | {"figures": (heatmap(),)})


@pytest.mark.parametrize("name", ["kl", "norm_diff", "logit_lens", "weight_diff", "task_vectors"])
def test_figures_draw_numbers(name: str) -> None:
    figures = all_methods()[name].figures
    assert figures
    assert all(figure.column(figure.value).dtype in ("float64", "float32", "int32", "int64") for figure in figures)
    assert len({figure.title for figure in figures}) == len(figures)
