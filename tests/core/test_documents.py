"""Documents: the same from every kind of file, one read, no more of it in memory than is drawn."""

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffing_core import documents as documents_module
from diffing_core.documents import documents, drawn
from diffing_core.errors import CorpusError
from diffing_core.registry import Corpus

TEXTS = ["one", "two\nlines", "drei äöü", "four"]


def spec(**fields: object) -> Corpus:
    return Corpus.model_validate({"name": "probe", "kind": "text", "source": {"path": "unused"}} | fields)


def save_to_disk(folder: Path, table: pa.Table) -> None:
    """What `Dataset.save_to_disk` of Hugging Face datasets writes."""
    folder.mkdir(parents=True)
    with pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
        out.write_table(table, max_chunksize=2)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": folder.name}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def written(folder: Path, kind: str, records: list[Any], column: str) -> Path:
    """The records as one kind of source."""
    table = pa.table({column: records, "other": list(range(len(records)))})
    lines = "".join(json.dumps({column: record}) + "\n" for record in records)
    match kind:
        case "jsonl":
            (folder / "a.jsonl").write_text(lines)
        case "gz":
            (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        case "parquet":
            pq.write_table(table, folder / "a.parquet", row_group_size=2)
        case "saved":
            save_to_disk(folder / "train", table)
            save_to_disk(folder / "test", table.slice(0, 1))
            (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    return folder


@pytest.mark.parametrize("kind", ["jsonl", "gz", "parquet", "saved"])
def test_texts_and_chats_are_the_same_from_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}] for text in TEXTS]
    for name, records, chat in (("text", TEXTS, {}), ("turns", chats, {"kind": "chat", "column": "turns"})):
        (tmp_path / name).mkdir()
        folder = written(tmp_path / name, kind, records, name)
        assert list(documents(spec(**chat), folder)) == records


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
@pytest.mark.parametrize("layout", ["lines", "list", "indented list"])
def test_a_json_file_holds_lines_or_a_list(tmp_path: Path, name: str, layout: str) -> None:
    records = [{"text": text, "n": 1} for text in TEXTS]
    lines = "\n \n" + "".join(json.dumps(record) + "\n" for record in records)
    content = lines if layout == "lines" else "\n" + json.dumps(records, indent=2 if "indented" in layout else None)
    (tmp_path / name).write_bytes(gzip.compress(content.encode()) if name.endswith("gz") else content.encode())
    assert list(documents(spec(), tmp_path)) == list(documents(spec(), tmp_path / name)) == TEXTS


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{\n  "text": "one"\n}', r"a.json, line 1: not JSON: .*one record per line is expected, or one list .*README.md names"),
        ('[{"text": "one"}, {"body": "two"}]', r"a.json, record 2: no field 'text'; found \['body'\]"),
        ('["one"]', "a.json, record 1: no field 'text'; found a str"),
        ('[{"text": "one"}', "a.json: not JSON"),
        ('{"text": "one"}\n{"body": "two"}', r"a.json, line 2: no field 'text'; found \['body'\]"),
    ],
)
def test_what_is_wrong_with_a_json_file_is_told(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(CorpusError, match=told):
        list(documents(spec(), tmp_path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
def test_a_byte_order_mark_is_no_part_of_the_first_document(tmp_path: Path, name: str) -> None:
    content = "one" if name == "a.txt" else json.dumps({"text": "one"})
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert list(documents(spec(), tmp_path / name)) == ["one"]


def test_texts_of_the_entry_itself() -> None:
    own = Corpus(name="own", kind="text", texts=("one", "two", "three"))
    assert list(documents(own, None)) == ["one", "two", "three"]
    assert list(documents(own.model_copy(update={"read_at_most": 2}), None)) == ["one", "two"]


def test_a_text_file_holds_documents_between_blank_lines(tmp_path: Path) -> None:
    file = tmp_path / "reference.txt"
    file.write_text("\n\nOne,\n  in two lines.\n\n \n\nTwo.\nEnd.")
    assert list(documents(spec(), file)) == ["One,\n  in two lines.", "Two.\nEnd."]


def test_read_at_most_ends_the_reading(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\nnot JSON\n')
    assert list(documents(spec(read_at_most=2), tmp_path)) == ["one", "two"]
    with pytest.raises(CorpusError, match="line 3: not JSON"):
        list(documents(spec(), tmp_path))


def test_dataset_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The toolkit read each dataset once per configured split."""
    written(tmp_path, "jsonl", TEXTS, "text")
    opened, read = [], documents_module._jsonl
    monkeypatch.setattr(documents_module, "_jsonl", lambda file, column: opened.append(file) or read(file, column))
    drawn(documents(spec(), tmp_path), 2, 0)
    assert opened == [tmp_path / "a.jsonl"]


def test_a_seed_has_an_effect_also_where_a_dataset_is_streamed(tmp_path: Path) -> None:
    """The toolkit never shuffled streamed datasets, so its seed chose nothing."""
    folder = written(tmp_path, "gz", [f"{number}" for number in range(100)], "text")
    first, again, other = (drawn(documents(spec(), folder), 10, seed) for seed in (0, 0, 1))
    assert first == again
    assert first[0] != other[0]
    assert first[1] == other[1] == 100


def test_memory_holds_the_sample_and_not_the_source(tmp_path: Path) -> None:
    with (tmp_path / "a.jsonl").open("w") as file:
        for number in range(4000):
            file.write(json.dumps({"text": f"{number} " + "x" * 5000}) + "\n")
    tracemalloc.start()
    chosen, count = drawn(documents(spec(), tmp_path), 10, 0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (len(chosen), count) == (10, 4000)
    assert peak < 2_000_000, "20 MB were read"


def test_a_missing_column_is_told_with_those_that_exist(tmp_path: Path) -> None:
    for kind in ("parquet", "saved"):
        (tmp_path / kind).mkdir()
        with pytest.raises(CorpusError, match=r"no column 'text'; found \['body', 'other'\]"):
            list(documents(spec(), written(tmp_path / kind, kind, TEXTS, "body")))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("latin.jsonl", '{"text": "äöü"}\n'.encode("latin-1")),
        ("latin.txt", "äöü".encode("latin-1")),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "one"}\n' * 500)[:-20]),
        ("plain.jsonl.gz", b'{"text": "one"}\n'),
        ("cut.parquet", b"PAR1 and no more"),
        ("cut.arrow", b"\xff\xff\xff\xff\x10\x00"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=name):
        list(documents(spec(column="text"), tmp_path / name))
