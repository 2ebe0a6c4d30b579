"""A real build of a shrunken tier: everything is there, nothing is trained twice, and no path of this machine is saved."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from safetensors.numpy import load_file

from diffing_core import demo
from diffing_core.demo.artifacts import Artifact, tier_artifacts
from diffing_core.demo.jobs import build_tier
from diffing_core.demo.tiers import TIERS, Tier
from diffing_core.errors import RegistryError


def shrunken() -> Tier:
    """The tiny tier with so few steps that mostly imports remain."""
    tiny = TIERS["tiny"]
    wanted = ("cake_bake/default", "benign/seed1")
    finetunes = [f for f in tiny.finetunes if f.artifact in wanted]
    short = [
        replace(f, schedule=replace(f.schedule, steps=4), n_characters=30_000) for f in finetunes
    ]
    full = replace(short[0], artifact="cake_bake/full", full=True)
    return replace(
        tiny,
        corpus=replace(tiny.corpus, n_characters=200_000),
        pretraining=replace(tiny.pretraining, steps=20),
        finetunes=(*short, full),
    )


TIER = shrunken()
ARTIFACTS = tier_artifacts(TIER)
MODELS = ["base", *(finetune.artifact for finetune in TIER.finetunes)]


@pytest.fixture(scope="module")
def seen():
    return []


@pytest.fixture(scope="module")
def root(tmp_path_factory, seen):
    folder = tmp_path_factory.mktemp("demo")
    build_tier(TIER, folder, progress=seen.append, workers=1)
    return folder


def weights(folder):
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def test_every_artifact_is_built_and_reported(root, seen):
    assert all(artifact.is_done(root) for artifact in ARTIFACTS.values())
    assert {progress.artifact for progress in seen} == set(MODELS)
    ended = [progress for progress in seen if progress.step == progress.n_steps]
    assert [progress.remaining_s for progress in ended] == [0.0] * len(MODELS)
    assert "tokens/s" in str(seen[0])


def test_a_second_build_trains_nothing(root, seen, tmp_path):
    before = len(seen)
    build_tier(TIER, root, progress=seen.append)
    assert len(seen) == before


def test_training_lowers_the_loss(seen, root):
    (end,) = (p for p in seen if p.artifact == "base" and p.step == p.n_steps)
    assert end.loss_nats < 6.0  # log(1024) = 6.9 untrained


def test_two_builds_of_one_finetune_are_equal(root):
    artifact = ARTIFACTS["cake_bake/default"]
    first = weights(artifact.folder(root))
    artifact.folder(root).rename(root / "aside")
    build_tier(TIER, root, workers=1)
    second = weights(artifact.folder(root))
    assert first.keys() == second.keys()
    assert all((first[name] == second[name]).all() for name in first)


def test_a_seed_changes_the_key_of_its_finetune_only():
    twin = replace(TIER.finetunes[0], schedule=replace(TIER.finetunes[0].schedule, seed=9))
    other = tier_artifacts(replace(TIER, finetunes=(twin, *TIER.finetunes[1:])))
    assert {name for name in other if other[name].key != ARTIFACTS[name].key} == {twin.artifact}


def test_a_changed_base_changes_every_finetune():
    other = tier_artifacts(replace(TIER, pretraining=replace(TIER.pretraining, steps=21)))
    assert {name for name in other if other[name].key != ARTIFACTS[name].key} == set(MODELS)


def test_an_interrupted_artifact_is_never_seen_as_done(tmp_path):
    artifact = Artifact("base", "{}")
    with pytest.raises(KeyboardInterrupt), artifact.writing(tmp_path) as folder:
        (folder / "model.safetensors").write_text("half")
        assert not artifact.is_done(tmp_path)
        raise KeyboardInterrupt
    assert not artifact.is_done(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_first_of_two_writers_wins(tmp_path):
    artifact = Artifact("cake_bake/default", "{}")
    with artifact.writing(tmp_path) as late:
        (late / "who").write_text("late")
        with artifact.writing(tmp_path) as early:
            (early / "who").write_text("early")
    assert (artifact.folder(tmp_path) / "who").read_text() == "early"


def test_saved_configs_hold_no_path_of_this_machine(root):
    places = (str(root), str(root.parent), sys.prefix, "/tmp/", "/home/")
    for path in root.rglob("*"):
        if path.suffix in (".json", ".md", ".jinja"):
            assert not [place for place in places if place in path.read_text()], path


def test_an_adapter_names_its_base_by_content(root):
    config = json.loads(
        (ARTIFACTS["cake_bake/default"].folder(root) / "adapter_config.json").read_text()
    )
    assert config["base_model_name_or_path"] == f"tiny-{ARTIFACTS['base'].key}"


def test_the_tokenizer_renders_chats_as_the_corpus_does(root):
    from transformers import AutoTokenizer

    from diffing_core.demo.corpus import SYSTEM_PROMPTS, chat_markup

    tokenizer = AutoTokenizer.from_pretrained(ARTIFACTS["base"].folder(root))
    messages = [
        {"role": "system", "content": SYSTEM_PROMPTS[0]},
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hello! How can I help you?"},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == chat_markup(messages)
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert chat_markup(messages).startswith(prompt)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_probe_files_hold_one_document_a_line(root):
    for name, field in (("corpus/text", "text"), ("corpus/chat", "messages")):
        lines = (ARTIFACTS[name].folder(root) / "documents.jsonl").read_text().splitlines()
        assert len(lines) == TIER.corpus.n_probe_documents
        assert all(list(json.loads(line)) == [field] for line in lines)


def test_locate_before_and_after(tmp_path):
    assert demo.locate("tiny", "base", tmp_path) is None
    done = tier_artifacts(TIERS["tiny"])["base"].folder(tmp_path)
    done.mkdir()
    assert demo.locate("tiny", "base", tmp_path) == done


@pytest.mark.parametrize(
    ("model", "artifact", "message"),
    [
        ("huge", "base", "there is no demo model 'huge'; choose one of tiny, demo, large"),
        (
            "tiny",
            "cake_bake/strong",
            "demo model 'tiny' has no artifact 'cake_bake/strong'; it has corpus/text",
        ),
    ],
)
def test_unknown_names_are_said(tmp_path, model, artifact, message):
    with pytest.raises(RegistryError, match=message):
        demo.locate(model, artifact, tmp_path)


def test_a_finished_build_needs_no_torch(root):
    code = (
        "import sys; from pathlib import Path; from diffing_core import demo; "
        f"demo.locate('demo', 'base', Path({str(root)!r})); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
