"""The lake: rows are there whole or not at all, and only finished results count."""

import os
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffing_core.catalog import all_tables
from diffing_core.errors import StorageError, TableError
from diffing_core.identity import RunKey
from diffing_core.lake import Lake, replace_file
from diffing_core.pairs import Pair
from diffing_core.runs import RUNS, Cost, run_row
from diffing_core.settings import Settings
from diffing_core.tables import Column, TableSpec

SCORES = TableSpec("scores", "Scores.", ("item",), (
    Column("item", "string", "What."), Column("score", "float64", "How much.", low=0),
))  # fmt: skip
NOTES = TableSpec("notes", "Notes.", ("item",), (Column("item", "string", "What."),))
KEY = RunKey(Pair("m", "o"), "kl", "1", "ab12cd34", "base", "tuned", "probe", "tokens")


class Knobs(Settings):
    """One knob."""

    count: int = 3


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(tmp_path)


def scores(*items: str) -> pa.Table:
    return SCORES.table({"item": list(items), "score": [1.0] * len(items)})


def notes(*items: str) -> pa.Table:
    return NOTES.table({"item": list(items)})


def finish(lake: Lake, key: RunKey, *items: str, minutes: int = 0) -> None:
    """Writes a result that was finished so many minutes after noon."""
    lake.write(SCORES, key, scores(*items))
    lake.write(
        RUNS, key, run_row(key, Settings(), Cost(), datetime(2026, 1, 1, 12, tzinfo=UTC) + timedelta(minutes=minutes))
    )


def items(table: pa.Table) -> list[str]:
    return table["item"].to_pylist()


def current(lake: Lake, spec: TableSpec = SCORES, pair: Pair = KEY.pair, method: str = "kl") -> list[str]:
    return sorted(items(lake.read_current(spec, pair=pair, method=method)))


def files(lake: Lake) -> list[str]:
    return sorted(str(path.relative_to(lake.root)) for path in lake.root.rglob("*") if path.is_file())


def test_rows_come_back_with_their_key(lake: Lake) -> None:
    path = lake.write(SCORES, KEY, scores("a", "b"))
    assert lake.read(SCORES).to_pylist()[1] == KEY.columns() | {"item": "b", "score": 1.0}
    assert path.relative_to(lake.root) == Path("scores/kl/o__m__default/diff.probe@ab12cd34.parquet")


def test_reading_what_was_never_written_gives_typed_nothing(lake: Lake) -> None:
    assert lake.read(SCORES).schema == SCORES.stored_schema
    assert lake.read_current(SCORES, pair=KEY.pair, method="kl").num_rows == 0
    assert not lake.finished(KEY)


def test_pair_and_method_narrow_what_is_read(lake: Lake) -> None:
    near = replace(KEY, pair=Pair("m", "o", "default2"))
    for key, item in ((KEY, "a"), (replace(KEY, method="kl2"), "b"), (near, "c")):
        lake.write(SCORES, key, scores(item))
    assert sorted(items(lake.read(SCORES))) == ["a", "b", "c"]
    assert sorted(items(lake.read(SCORES, pair=KEY.pair))) == ["a", "b"]
    assert items(lake.read(SCORES, pair=KEY.pair, method="kl")) == ["a"]
    assert sorted(items(lake.read(SCORES, method="kl"))) == ["a", "c"]


def test_a_writer_that_fails_half_way_leaves_the_old_rows_and_no_other_file(lake: Lake) -> None:
    path = lake.write(SCORES, KEY, scores("old"))

    def half(aside: Path) -> None:
        aside.write_bytes(path.read_bytes()[:100])
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_file(path, half)
    assert items(lake.read(SCORES)) == ["old"]
    assert files(lake) == [str(path.relative_to(lake.root))]


def test_rows_that_fail_their_check_are_not_written(lake: Lake) -> None:
    lake.write(SCORES, KEY, scores("old"))
    with pytest.raises(TableError, match="schema is"):
        lake.write(SCORES, KEY, notes("new"))
    assert items(lake.read(SCORES)) == ["old"]


def test_running_again_replaces_and_never_adds(lake: Lake) -> None:
    for item in ("first", "second"):
        lake.write_result(KEY, {SCORES: scores(item), NOTES: notes(item)}, Knobs(), Cost())
    assert items(lake.read(SCORES)) == items(lake.read(NOTES)) == ["second"]
    assert len(lake.read(RUNS)) == 1
    assert len(files(lake)) == 3


def test_a_reader_with_the_file_open_keeps_the_rows_it_began_with(lake: Lake) -> None:
    path = lake.write(SCORES, KEY, scores("old"))
    with pq.ParquetFile(path) as opened:
        lake.write(SCORES, KEY, scores("new"))
        assert items(opened.read()) == ["old"]
    assert items(lake.read(SCORES)) == ["new"]


def test_the_row_in_runs_says_what_was_run_and_is_written_last(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    monkeypatch.setattr(
        "os.replace", lambda aside, path, move=os.replace: (order.append(path.parts[-4]), move(aside, path))
    )
    before = datetime.now(UTC)
    lake.write_result(KEY, {SCORES: scores("a"), NOTES: notes("a")}, Knobs(), Cost(2, 30, 0.5, 1.5, 0.25))
    [row] = lake.read(RUNS).to_pylist()
    assert order == ["scores", "notes", "runs"]
    assert before <= row.pop("finished_at") <= datetime.now(UTC)
    assert row == KEY.columns() | {
        "step": "diff", "version": "1", "settings": '{"count": 3}', "corpus_hash": "tokens", "model_revision": "base",
        "adapter_hash": "tuned", "n_sequences": 2, "n_tokens": 30, "compute_s": 0.5, "shared_s": 1.5, "cost_usd": 0.25,
    }  # fmt: skip


def test_a_failed_run_is_never_read_as_finished(lake: Lake) -> None:
    """In the toolkit a crash left empty files, after which the next run skipped and reported success."""
    with pytest.raises(TableError):
        lake.write_result(KEY, {SCORES: scores("a"), NOTES: scores("a")}, Knobs(), Cost())
    assert items(lake.read(SCORES)) == [], "a result with one wrong table is refused before anything is written"
    assert current(lake) == []
    assert not lake.finished(KEY)


def test_a_failed_second_run_does_not_pass_as_the_first(lake: Lake) -> None:
    """The adapter was trained again and the run on it broke: its rows lie where those of the old run did."""
    finish(lake, KEY, "old")
    retrained = replace(KEY, adapter_hash="retrained")
    lake.write(SCORES, retrained, scores("new"))
    assert current(lake) == []
    assert not lake.finished(retrained)
    finish(lake, retrained, "new")
    assert current(lake) == ["new"]
    assert lake.finished(retrained)
    assert not lake.finished(KEY)


def test_a_crash_half_way_leaves_nothing_of_the_old_result_current(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(lake, KEY, "old")
    retrained = replace(KEY, adapter_hash="retrained")
    with monkeypatch.context() as broken:
        broken.setattr(lake, "write", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            lake.write_result(retrained, {SCORES: scores("new")}, Knobs(), Cost())
    assert current(lake) == []


def test_the_newest_result_counts_with_all_its_corpora(lake: Lake) -> None:
    other = replace(KEY, settings_id="ffffffff")
    finish(lake, KEY, "early", minutes=1)
    finish(lake, other, "late", minutes=3)
    finish(lake, replace(other, corpus="chats"), "of chats", minutes=2)
    assert current(lake) == ["late", "of chats"]


@pytest.mark.parametrize("name", ["version", "settings_id", "model_revision", "adapter_hash"])
def test_findings_on_two_versions_of_a_finetune_are_never_mixed(lake: Lake, name: str) -> None:
    finish(lake, replace(KEY, corpus="chats"), "old chats", minutes=1)
    finish(lake, replace(KEY, **{name: "changed"}), "new texts", minutes=2)
    assert current(lake) == ["new texts"]


def test_another_step_or_method_never_displaces_a_result(lake: Lake) -> None:
    finish(lake, KEY, "of diff", minutes=1)
    finish(lake, replace(KEY, step="hypotheses"), "of hypotheses", minutes=2)
    finish(lake, replace(KEY, method="adl"), "of adl", minutes=3)
    assert current(lake) == ["of diff"]
    assert items(lake.read_current(SCORES, pair=KEY.pair, method="kl", step="hypotheses")) == ["of hypotheses"]
    assert current(lake, method="adl") == ["of adl"]


def test_a_variant_never_shares_a_result_with_another(lake: Lake) -> None:
    """In seven of the toolkit's nine methods the second variant got the first one's numbers."""
    variants = [Pair("m", "o", variant) for variant in ("default", "mix", "default.2")]
    for pair in variants:
        finish(lake, replace(KEY, pair=pair), pair.variant)
    assert [current(lake, pair=pair) for pair in variants] == [[pair.variant] for pair in variants]


def test_each_identity_has_a_folder_of_its_own_and_finds_it_again(lake: Lake) -> None:
    others = [
        replace(KEY, pair=Pair("m", "o", "other")), replace(KEY, corpus_hash="other tokens"), replace(KEY, settings_id="x"),
        replace(KEY, adapter_hash="other"), replace(KEY, model_revision="other"), replace(KEY, version="2"),
    ]  # fmt: skip
    folders = [lake.folder(key) for key in (KEY, *others)]
    assert len(set(folders)) == 1 + len(others)
    (folders[0] / "weights").write_text("mine")
    assert (lake.folder(KEY) / "weights").read_text() == "mine"
    assert not any(list(folder.iterdir()) for folder in folders[1:])


def test_hidden_files_are_never_read(lake: Lake) -> None:
    """A killed process leaves its half-written file beside the place."""
    path = lake.write(SCORES, KEY, scores("a"))
    for name in (f".{path.name}.0a1b2c3d", ".half.parquet"):
        path.with_name(name).write_bytes(b"half")
    assert items(lake.read(SCORES)) == ["a"]
    assert duckdb.read_parquet(lake.glob(SCORES)).select("item").fetchall() == [("a",)]


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.drop_columns(["score"]),
        lambda table: table.rename_columns({"score": "points"}),
        lambda table: table.append_column("more", pa.array([1])),
        lambda table: table.set_column(8, "score", pa.array(["much"])),
        lambda table: table.set_column(8, "score", pa.array([[1.0]])),
        lambda table: table.set_column(8, "score", pa.array([None], pa.float64())),
    ],
    ids=["fewer", "renamed", "more", "type", "list", "null"],
)
def test_files_of_an_older_schema_are_refused_by_name(lake: Lake, change: Callable[[pa.Table], pa.Table]) -> None:
    path = lake.write(SCORES, KEY, scores("a"))
    pq.write_table(change(lake.read(SCORES)), path)
    with pytest.raises(StorageError, match=r"diff\.probe@ab12cd34\.parquet .*materialize this partition again"):
        lake.read(SCORES)


def test_a_damaged_file_is_told_by_name(lake: Lake) -> None:
    path = lake.write(SCORES, KEY, scores("a"))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(StorageError, match=r"diff\.probe@ab12cd34\.parquet"):
        lake.read(SCORES)


def test_a_wider_number_format_than_declared_today_is_read(lake: Lake) -> None:
    path = lake.write(SCORES, KEY, scores("a"))
    narrow = lake.read(SCORES).set_column(8, "score", pa.array([1.0], pa.float32()))
    pq.write_table(narrow, path)
    assert lake.read(SCORES).schema == SCORES.stored_schema


def test_seeded_tables_can_be_scanned_before_there_are_rows(lake: Lake) -> None:
    specs = list(all_tables().values())
    lake.seed(specs)
    for spec in specs:
        relation = duckdb.read_parquet(lake.glob(spec))
        assert (relation.columns, relation.fetchall()) == (spec.stored_schema.names, []), spec.name
        assert lake.read(spec).num_rows == 0


def test_a_seed_follows_its_spec_and_is_otherwise_left_alone(lake: Lake) -> None:
    lake.seed([SCORES])
    seed = lake.root / "scores" / "_schema.parquet"
    written = seed.stat().st_ino
    lake.seed([SCORES])
    assert seed.stat().st_ino == written
    lake.seed([replace(SCORES, columns=(*SCORES.columns, Column("more", "int32", "More.")))])
    assert pq.read_schema(seed).names[-1] == "more"
