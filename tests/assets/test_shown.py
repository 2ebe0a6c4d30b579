"""What a person sees on a materialization, for methods that find something, nothing, or are not there to find."""

from dataclasses import replace

import dagster as dg
import pytest

from diffing_assets import shown
from diffing_core.comparison import Outcome
from diffing_core.figures import Figure
from diffing_core.findings import Finding
from diffing_core.identity import RunKey
from diffing_core.methods import get_method
from diffing_core.methods.base import Method
from diffing_core.paired_pass import MethodResult
from diffing_core.pairs import Pair
from diffing_core.runs import Cost
from diffing_core.tables import Column, TableSpec

PAIR = Pair("tiny", "o")
LAYERS = TableSpec("layers", "Per layer.", ("layer",), (
    Column("layer", "int32", "Block.", role="key"),
    Column("n_tokens", "int64", "Tokens.", role="count"),
    Column("size", "float64", "Size of the difference.", "nats", "effect", nullable=True),
    Column("path", "list<float64>", "Per token."),
))  # fmt: skip
WORDS = TableSpec("words", "Per word.", ("word",), (Column("word", "string", "A word.", role="key"),))
ROWS = {"layer": [0, 1, 2], "n_tokens": [9, 9, 9], "size": [0.0, None, 0.5], "path": [[0.0], [0.1], [0.2]]}


@pytest.fixture
def plotted(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What was drawn, in place of pictures."""
    drawn: list[tuple] = []
    monkeypatch.setattr(shown, "bar_plot", lambda *given: drawn.append(given) or dg.MetadataValue.md("picture"))
    return drawn


def method(found: dict[str, list[Finding]] | None) -> Method:
    """A method that finds what is given per first word of `words`; None finds nothing by design."""
    findings = None if found is None else lambda tables, _: found.get(tables["words"]["word"][0].as_py(), [])
    return replace(get_method("kl"), tables=(WORDS, LAYERS), findings=findings, headline=lambda _: {"n": 1}, figures=())


def outcome(of: Method, corpora: tuple[str, ...] = ("a",), rows: dict = ROWS) -> Outcome:
    made = Outcome(PAIR, of)
    for corpus in corpora:
        tables = {"words": WORDS.table({"word": [f"{corpus}{n}" for n in range(9)]}), "layers": LAYERS.table(rows)}
        key = RunKey(PAIR, "m", "1", "s", "", "", corpus, "", "diff")
        made.results.append((key, MethodResult(PAIR, of, None, tables, Cost(n_tokens=5, compute_s=2.0, shared_s=3.0))))
    return made


def cells(value: dg.TableMetadataValue) -> list[dict]:
    return [dict(record.data) for record in value.records]


def test_cost_and_headline_are_told_for_every_corpus() -> None:
    told = shown.outcome_metadata(outcome(method(None), ("a", "b")))
    assert (told["a: n"], told["b: n"]) == (1, 1)
    assert (told["compute_s"], told["forwards_shared_s"], told["probe_tokens"]) == (4.0, 6.0, 10)


def test_findings_of_every_corpus_are_shown_and_one_unit_drawn(plotted: list[tuple]) -> None:
    """Bars of nats beside bars of relative norms would compare what cannot be compared."""
    found = [Finding("token", "cake", 2.0, "nats", "words"), Finding("layer", "1", 9.0, "norm", "layers")]
    made = outcome(method({"b0": found, "c0": found[:1]}), ("a", "b", "c"))
    told = cells(shown.outcome_metadata(made)["findings"])
    assert [(row["corpus"], row["rank"], row["item"], row["unit"]) for row in told] == [
        ("b", 1, "cake", "nats"), ("b", 2, "1", "norm"), ("c", 1, "cake", "nats"),
    ]  # fmt: skip
    assert plotted == [(["cake"], [2.0], "nats")]


@pytest.mark.parametrize("found", [None, {}], ids=["no evidence by design", "nothing found"])
def test_without_findings_the_smallest_table_is_shown(found: dict | None, plotted: list[tuple]) -> None:
    told = shown.outcome_metadata(outcome(method(found)))
    assert cells(told["layers"])[2] == {"layer": 2, "n_tokens": 9, "size": 0.5, "path": "[0.2]"}
    assert plotted == [(["0", "2"], [0.0, 0.5], "Size of the difference. [nats]")]
    assert told.get("findings") == (None if found is None else "nothing found")


def test_figures_are_drawn_of_the_first_corpus_where_there_is_something(plotted: list[tuple]) -> None:
    figure = Figure("line", "Size by layer", LAYERS, "layer", "size")
    told = shown.outcome_metadata(outcome(replace(method({}), figures=(figure,)), ("a", "b")))
    assert told["Size by layer"].value.startswith("![Size by layer](data:image/png;base64,")
    nothing = outcome(replace(method({}), figures=(figure,)), rows=ROWS | {"size": [None] * 3})
    assert "Size by layer" not in shown.outcome_metadata(nothing)


def test_text_of_models_cannot_draw_or_spoil_the_page() -> None:
    picture = shown.bar_plot(["$\\frac$", "\x1b[31mred"], [1.0, -1.0], "nats").value
    assert picture.startswith("![plot](data:image/png;base64,")
    assert len(picture) < 30_000
    [row] = cells(shown.rows_table([{"item": "\x1b[31m" + "x" * 500}]))
    assert row["item"] == "·[31m" + "x" * (shown.TEXT_LIMIT - 5)
