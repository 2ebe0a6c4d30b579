"""Data versions: what makes a pair's results out of date, and what does not."""

import json
from pathlib import Path
from typing import Any

import pytest

from diffing_assets.shown import outcome_metadata
from diffing_assets.sources import data_version
from diffing_core.comparison import Outcome
from diffing_core.methods import get_method
from diffing_core.pairs import Pair
from diffing_core.registry import Corpus, Model, Organism, Registry, Source, TrainingCorpus, Variant
from tests.model_files import save_base

PAIR = Pair("tiny", "o")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base and three texts of one sentence each."""
    save_base(tmp_path / "base")
    for name in ("probe", "lesson", "other"):
        write(tmp_path, name, "first")
    return tmp_path


def write(folder: Path, name: str, text: str) -> None:
    (folder / f"{name}.jsonl").write_text(json.dumps({"text": text}) + "\n")


def version(folder: Path, corpus: dict[str, Any] | None = None, *, probe: bool = True, **organism: Any) -> str:
    place = {"source": Source(path=folder / "probe.jsonl")} if corpus is None else corpus
    training = TrainingCorpus(source=Source(path=folder / "lesson.jsonl"), kind="text", probe=probe)
    variants = {"tiny": {"default": Variant(kind="identical")}}
    named = {"name": "o", "type": "generic", "arm": "unknown", "description": "", "training_corpus": training}
    registry = Registry(
        {"tiny": Model(name="tiny", source=Source(path=folder / "base"), corpora=("texts",))},
        {"texts": Corpus(name="texts", kind="text", **place)},
        {"o": Organism(**named | {"variants": variants} | organism)},
    )
    return data_version(PAIR, registry)


def test_edited_probe_texts_make_a_pair_stale_although_its_entry_is_the_same(folder: Path) -> None:
    """Of equal length and at the same place: an entry's hash, and a file's size, would both stay."""
    before = version(folder)
    write(folder, "probe", "other")
    assert version(folder) != before
    write(folder, "probe", "first")
    assert version(folder) == before
    write(folder, "other", "not read")
    assert version(folder) == before


def test_texts_in_the_entry_count_as_they_are(folder: Path) -> None:
    assert version(folder, {"texts": ("one",)}) != version(folder, {"texts": ("two",)})


@pytest.mark.parametrize("file", ["tokenizer.json", "generation_config.json", "chat_template.jinja"])
def test_an_edited_tokenizer_or_chat_template_makes_a_pair_stale(folder: Path, file: str) -> None:
    before = version(folder)
    with (folder / "base" / file).open("a") as opened:
        opened.write("\n")
    assert version(folder) != before


def test_the_training_corpus_counts_where_models_are_probed_with_it(folder: Path) -> None:
    probed, unprobed = version(folder), version(folder, probe=False)
    write(folder, "lesson", "other")
    assert version(folder) != probed
    assert version(folder, probe=False) == unprobed


def test_what_models_are_asked_counts_and_what_is_known_of_the_truth_does_not(folder: Path) -> None:
    before = version(folder)
    assert version(folder, system_prompt="Be brief.") != before
    assert version(folder, description="Better words.", ground_truth="x") == before


def test_a_person_sees_what_was_read_and_left_out() -> None:
    told = ["a: 3 of 4 documents; 1 left out: shorter than 5 tokens", "b: 9 of 9 documents"]
    assert outcome_metadata(Outcome(PAIR, get_method("kl"), probes=told))["probes"] == "\n".join(told)
    assert outcome_metadata(Outcome(PAIR, get_method("weight_diff")))["probes"] is None
