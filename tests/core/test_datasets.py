"""Which files are a corpus's subset and split, in folders and on the hub, and when its data version changes."""

import gzip
import json
import logging
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi
from huggingface_hub.hf_file_system import HfFileSystemFile

from diffing_core.corpus import read_texts
from diffing_core.documents import documents
from diffing_core.errors import CorpusError, ModelLoadError
from diffing_core.registry import Corpus, HubRef
from diffing_core.registry.datasets import Listing, corpus_files, corpus_version
from tests import hub
from tests.hub import commit_of, reached

SHARDED = ["README.md", "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet",
           "data/test-00000-of-00001.parquet"]  # fmt: skip
SUBSETS = ["de/train.jsonl", "de/validation.jsonl", "en/train.jsonl", "en/val.jsonl"]
SAVED = ["dataset_dict.json", "own/data-00000-of-00001.arrow", "own/state.json", "test/data-00000-of-00001.arrow",
         "test/cache-91ab.arrow", "test/dataset_info.json"]  # fmt: skip
CONFIGS = """---
language: en
configs:
- config_name: small
  default: true
  data_files:
  - split: train
    path: small/*.parquet
  - split: heldout
    path: [small/deep/a.parquet, "other/**"]
- config_name: plain
  data_files: "**/c.jsonl"
- config_name: folder
  data_dir: other
---
# A dataset
"""
CONFIGURED = ["small/a.parquet", "small/deep/a.parquet", "other/b.jsonl", "other/deep/c.jsonl", "c.jsonl"]


def spec(**fields: object) -> Corpus:
    return Corpus.model_validate({"name": "probe", "kind": "text", "source": {"path": "unused"}} | fields)


@pytest.mark.parametrize(
    ("names", "fields", "expected"),
    [
        (SHARDED, {}, SHARDED[1:3]),
        (SHARDED, {"split": "test"}, SHARDED[3:]),
        (SHARDED, {"split": "test+train"}, [SHARDED[3], *SHARDED[1:3]]),
        (SUBSETS, {"subset": "de"}, ["de/train.jsonl"]),
        (SUBSETS, {"subset": "en", "split": "validation"}, ["en/val.jsonl"]),
        (SUBSETS, {}, ["de/train.jsonl", "en/train.jsonl"]),
        (SAVED, {"split": "own"}, ["own/data-00000-of-00001.arrow"]),
        (SAVED, {"split": "test"}, ["test/data-00000-of-00001.arrow"]),
        (["data-00000-of-00001.arrow", "state.json"], {}, ["data-00000-of-00001.arrow"]),
        (["a.jsonl", "deep/b.parquet"], {}, ["a.jsonl", "deep/b.parquet"]),
        (["train/0.jsonl", "dev/0.jsonl"], {"split": "validation"}, ["dev/0.jsonl"]),
        (["c4-train.0.jsonl.gz", "c4-eval.0.jsonl.gz"], {"split": "test"}, ["c4-eval.0.jsonl.gz"]),
        (["data/train_sft-0.parquet", "data/test_sft-0.parquet"], {"split": "train_sft"}, ["data/train_sft-0.parquet"]),
        (["pretraining.jsonl"], {}, ["pretraining.jsonl"]),
        ([".cache/a.jsonl", "LICENSE.txt", "b.jsonl", "c.csv"], {}, ["b.jsonl"]),
        (["a.json", "b.jsonl", "en/c.json.gz", "config.json"], {}, ["a.json", "b.jsonl", "en/c.json.gz"]),
        (["a.parquet", "b.jsonl", "statistics.json"], {}, ["a.parquet", "b.jsonl"]),
    ],
)
def test_files_of_a_split_are_known_by_their_names(names: list[str], fields: dict, expected: list[str]) -> None:
    assert Listing("here", names).files_of(spec(**fields)) == sorted(expected)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ["small/a.parquet"]),
        ({"subset": "small"}, ["small/a.parquet"]),
        ({"split": "heldout"}, ["other/b.jsonl", "other/deep/c.jsonl", "small/deep/a.parquet"]),
        ({"subset": "plain"}, ["c.jsonl", "other/deep/c.jsonl"]),
        ({"subset": "folder"}, ["other/b.jsonl", "other/deep/c.jsonl"]),
    ],
)
def test_files_of_a_split_are_those_that_the_readme_names(fields: dict, expected: list[str]) -> None:
    assert Listing("here", CONFIGURED, CONFIGS).files_of(spec(**fields)) == expected


def test_the_only_config_is_the_default_one() -> None:
    only = "---\nconfigs:\n- config_name: x\n  data_files: a/*\n---\n"
    assert Listing("here", ["a/b.jsonl", "c.jsonl"], only).files_of(spec()) == ["a/b.jsonl"]


@pytest.mark.parametrize(
    ("readme", "fields", "said"),
    [
        ("", {"split": "test"}, r"corpus 'probe': here holds 5 file\(s\) of .*none of split 'test'; found splits: none"),
        ("", {"subset": "big"}, "none of split 'train' and subset 'big'"),
        (CONFIGS, {"split": "test"}, "found splits: heldout, train"),
        (CONFIGS, {"subset": "smal"}, "subset 'smal' is none of those of here: small, plain, folder; set subset"),
        (CONFIGS.replace("default: true", "x: 1"), {}, "subset None is none of those of here: small, plain"),
        ("---\na: [\n---\n", {}, "README.md of here does not begin with valid YAML"),
    ],
)
def test_what_is_not_there_is_told_with_what_is(readme: str, fields: dict, said: str) -> None:
    with pytest.raises(CorpusError, match=said):
        Listing("here", CONFIGURED, readme).files_of(spec(**fields))


def test_a_file_is_a_corpus_and_has_no_subset(tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    file.write_text("")
    assert list(corpus_files(spec(), file)) == [file]
    with pytest.raises(CorpusError, match="test.jsonl is one file and has no subset"):
        list(corpus_files(spec(subset="x"), file))


def test_data_files_that_are_not_read_are_named_in_the_log_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They were passed over without a word beside a file that is read."""
    names = ["part-0.jsonl", "part-1.json", "part-2.jsonl.zst", "part-3.csv", "part-4.txt", "README.md", "LICENSE.txt",
             "dataset_info.json"]  # fmt: skip
    for name in names:
        (tmp_path / name).write_text("")
    for _ in range(2):
        assert [file.name for file in corpus_files(spec(), tmp_path)] == names[:2]
    [told] = caplog.messages
    assert "not read: part-2.jsonl.zst, part-3.csv, part-4.txt; files of .jsonl" in told
    caplog.clear()
    with caplog.at_level(logging.INFO):
        list(corpus_files(spec(name="other"), tmp_path / names[0]))
    assert not caplog.messages


# ---- data versions ------------------------------------------------------------------------------------------------


def write(folder: Path, **texts: str) -> Path:
    for name, text in texts.items():
        file = folder / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"text": text}) + "\n")
    return folder


def test_an_edited_file_changes_the_data_version_and_moving_or_touching_it_does_not(tmp_path: Path) -> None:
    here, there = (write(tmp_path / name, train="one", test="two") for name in ("here", "there"))
    before = corpus_version(spec(), here)
    os.utime(here / "train.jsonl", ns=(1, 1))
    assert corpus_version(spec(), here) == before == corpus_version(spec(), there)
    write(here, test="not of this split")
    assert corpus_version(spec(), here) == before
    write(here, train="two")
    assert corpus_version(spec(), here) != before
    assert corpus_version(spec(), here / "train.jsonl") != corpus_version(spec(), there / "train.jsonl")


def test_unchanged_files_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path, train="one")
    before = corpus_version(spec(), folder)
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("opened"))
    assert corpus_version(spec(), folder) == before


# ---- on the hub ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    many = root / "datasets/lab/many"
    for revision in ("main", "v2"):
        names = [f"en/train-0000{number}-of-00003" for number in range(3)]
        write(many / revision, **{name: f"{revision} {name}" for name in (*names, "en/test", "de/train")})
    (many / "v2/README.md").write_text("---\nconfigs: [{config_name: x, data_files: en/test.jsonl}]\n---\n")
    return root


@pytest.fixture
def cache(hub_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with reached(hub_root, tmp_path, monkeypatch) as empty:
        yield empty


def fetched(cache: Path) -> list[str]:
    return sorted(file.name for file in cache.rglob("*.jsonl"))


def test_only_the_files_of_subset_and_split_are_fetched(cache: Path) -> None:
    found = list(documents(spec(subset="en"), HubRef("lab/many")))
    assert found == [f"main en/train-0000{number}-of-00003" for number in range(3)]
    assert fetched(cache) == [f"train-0000{number}-of-00003.jsonl" for number in range(3)]


def test_a_dataset_is_read_as_a_stream_and_no_further_than_asked(cache: Path) -> None:
    hub.sent.clear()
    found = list(documents(spec(subset="en", read_at_most=2), HubRef("lab/many")))
    assert found == [f"main en/train-0000{number}-of-00003" for number in range(2)]
    assert sorted(hub.sent) == [f"en/train-0000{number}-of-00003.jsonl" for number in range(2)]
    assert fetched(cache) == []


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "parquet", "arrow"])
def test_of_a_bounded_reading_no_more_is_sent_than_it_takes(hub_root: Path, cache: Path, kind: str) -> None:
    """A hub's data set was fetched as whole files before its first document was read."""
    place, name, bounded = HubRef("lab/large"), f"{kind}/a.{kind}", spec(subset=kind, read_at_most=1500)
    file = hub_root / "datasets/lab/large/main" / name
    texts = large(file, kind)
    hub.sent.clear()
    assert list(documents(bounded, place)) == texts[:1500]
    assert 0 < hub.sent[name] < file.stat().st_size / 2, "a quarter of its documents were read"
    assert not list(cache.rglob(f"a.{kind}"))
    hub.sent.clear()
    assert read_texts(spec(subset=kind), place, 10) == texts[:10]
    assert 0 < hub.sent[name] < file.stat().st_size / 3
    assert list(documents(spec(subset=kind), place)) == texts
    hub.sent.clear()
    assert list(documents(bounded, place)) == texts[:1500]
    assert not hub.sent, "a file that is here already is read here"


def test_a_repository_without_an_owner_is_fetched_as_whole_files(hub_root: Path, cache: Path) -> None:
    write(hub_root / "datasets/old/main", train="one")
    assert list(documents(spec(read_at_most=1), HubRef("old"))) == ["one"]
    assert fetched(cache) == ["train.jsonl"]


def large(file: Path, kind: str) -> list[str]:
    """6000 texts of a kilobyte that does not compress, in row groups of 500."""
    draw = random.Random(0)
    texts = [draw.randbytes(750).hex() for _ in range(6000)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    table = pa.table({"text": texts})
    file.parent.mkdir(parents=True)
    match kind:
        case "parquet":
            pq.write_table(table, file, row_group_size=500)
        case "arrow":
            with pa.OSFile(str(file), "wb") as opened, pa.ipc.new_stream(opened, table.schema) as out:
                out.write_table(table, max_chunksize=500)
        case _:
            file.write_bytes(gzip.compress(lines.encode(), 1) if kind.endswith("gz") else lines.encode())
    return texts


def test_a_file_that_cannot_be_read_to_its_end_is_told_as_out_of_reach(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bytes:
        raise ConnectionError("the line is dead")

    monkeypatch.setattr(HfFileSystemFile, "_fetch_range", refuse)
    with pytest.raises(ModelLoadError, match=r"cannot fetch lab/many .*ConnectionError \(the line is dead\)"):
        list(documents(spec(subset="en", read_at_most=2), HubRef("lab/many")))


def test_revision_subfolder_and_readme_of_a_dataset(cache: Path) -> None:
    assert list(documents(spec(), HubRef("lab/many", "v2"))) == ["v2 en/test"]
    assert list(documents(spec(), HubRef("lab/many", subfolder="de"))) == ["main de/train"]
    assert corpus_version(spec(), HubRef("lab/many", "v2")) == commit_of("v2")
    assert corpus_version(spec(), HubRef("lab/many", subfolder="de")) == f"{commit_of('main')}.de"


def test_the_hub_is_asked_once_for_what_many_pairs_share(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, ask = [], HfApi.repo_info
    monkeypatch.setattr(HfApi, "repo_info", lambda api, repo, **options: asked.append(repo) or ask(api, repo, **options))
    versions = {corpus_version(spec(name=name), HubRef("lab/many", "v2")) for name in ("a", "b", "c")}
    assert versions == {commit_of("v2")}
    assert asked == ["lab/many"]
    assert corpus_version(spec(), HubRef("lab/few", commit_of("v2"))) == commit_of("v2"), "a commit needs no hub"


def test_a_dataset_that_is_not_on_the_hub_is_named(cache: Path) -> None:
    with pytest.raises(ModelLoadError, match="cannot fetch lab/few .* RepositoryNotFoundError"):
        list(documents(spec(), HubRef("lab/few")))
    with pytest.raises(CorpusError, match=r"lab/many/de holds 1 file\(s\).*none of split 'test'; found splits: train"):
        list(documents(spec(split="test"), HubRef("lab/many", subfolder="de")))
