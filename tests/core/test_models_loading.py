"""Loading pairs and cohorts from folders: what fits together, and every refusal."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from transformers import dynamic_module_utils

from diffing_core import models
from diffing_core.adapters import is_switchable
from diffing_core.checkpoints import load_tokenizer
from diffing_core.errors import ModelLoadError, NotComputableError, RegistryError
from diffing_core.models import Subject, load_cohort, load_pair, source_revisions
from diffing_core.pairs import Pair
from diffing_core.registry import Model, Organism, Registry, Source, Variant, Weights
from diffing_core.weights import WeightPair, weight_stream
from tests.model_files import VOCAB, build, save_adapter, save_base, tokenizer, tokens


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """One base and three adapters on different modules, never written to."""
    folder = tmp_path_factory.mktemp("made")
    base = save_base(folder / "base")
    save_adapter(folder / "a", base, seed=1)
    save_adapter(folder / "b", base, seed=2, target_modules=["gate_proj", "o_proj"], use_dora=True)
    save_adapter(folder / "c", base, seed=3, modules_to_save=["lm_head"])
    return folder


@pytest.fixture
def files(made, tmp_path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(made, tmp_path / "files")


def registry_of(folder: Path, model: dict | None = None, **variants: Variant) -> Registry:
    organism = Organism(name="o", type="generic", arm="unknown", description="", variants={"tiny": variants})
    base = Model(**{"name": "tiny", "source": Source(path=folder / "base"), **(model or {})})
    return Registry({"tiny": base}, {}, {"o": organism})


def lora(folder: Path, **more: object) -> Variant:
    return Variant(kind="lora", source=Source(path=folder), **more)


def full(folder: Path) -> Variant:
    return Variant(kind="full", source=Source(path=folder))


def refusal(registry: Registry) -> str:
    with pytest.raises(ModelLoadError) as caught:
        load_pair(registry.organism("o"), "tiny", registry=registry)
    return str(caught.value)


def logits_of(subject: Subject) -> torch.Tensor:
    with subject.active() as model, torch.no_grad():
        return model(**tokens()).logits


def separately(folder: Path, adapter: str) -> torch.Tensor:
    base = tf.AutoModelForCausalLM.from_pretrained(folder / "base")
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(base, folder / adapter).eval()(**tokens()).logits


def edit_tensors(file: Path, **replaced: torch.Tensor) -> None:
    save_file(load_file(file) | replaced, file, metadata={"format": "pt"})


def test_a_cohort_equals_separate_loads_and_the_base(made):
    registry = registry_of(made, **{name: lora(made / name) for name in "abc"}, again=lora(made / "a"))
    cohort = load_cohort(registry.pairs(), registry)
    assert len(cohort) == 4
    assert not cohort.failed
    for pair in cohort:
        folder = registry.variant(pair.pair).source.path.name
        assert torch.equal(logits_of(pair.tuned), separately(made, folder))
        assert pair.base is cohort.base
        assert (pair.base_revision, pair.adapter_hash) == source_revisions(pair.pair, registry)
        assert pair.tuned.revision == f"{pair.base_revision}+{pair.adapter_hash}"
        assert pair.notes == ()
    assert torch.equal(logits_of(cohort.base), logits_of(Subject(build())))
    tuned = {pair.pair.variant: pair.tuned for pair in cohort}
    assert tuned["again"] is tuned["a"]
    assert len({subject.revision for subject in tuned.values()}) == 3


def test_members_that_fail_leave_the_others_and_the_base_as_they_are(files):
    other = save_base(files / "other", hidden_size=64)
    save_adapter(files / "wide", other, target_modules=["q_proj"])
    registry = registry_of(files, a0=lora(files / "wide"), a1=lora(files / "a"), b=lora(files / "wide", dilution=1.0))
    cohort = load_cohort(registry.pairs(), registry)
    assert [pair.pair.variant for pair in cohort] == ["a1"]
    assert [pair.variant for pair in cohort.failed] == ["a0", "b"]
    assert "does not fit base LlamaForCausalLM: Error(s) in loading state_dict" in str(
        cohort.failed[Pair("tiny", "o", "a0")]
    )
    assert torch.equal(logits_of(cohort.pairs[0].tuned), separately(files, "a"))
    assert torch.equal(logits_of(cohort.base), logits_of(Subject(build())))


@pytest.mark.parametrize(
    ("adapter", "error"),
    [
        ({"peft_type": "PROMPT_TUNING"}, NotComputableError),
        ({"peft_type": "NEWKIND"}, ModelLoadError),
        ([], ModelLoadError),
        ({"peft_type": "IA3"}, Exception),
    ],
    ids=["cannot be merged", "unknown kind", "no object", "wrong kind"],
)
def test_whatever_an_adapter_raises_it_fails_alone(files, adapter, error):
    """An error that another library raises must not take the cohort along."""
    file = files / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | adapter if adapter else adapter))
    registry = registry_of(files, a=lora(files / "a"), b=lora(files / "b"))
    cohort = load_cohort(registry.pairs(), registry)
    assert [pair.pair.variant for pair in cohort] == ["b"]
    assert {pair.variant: isinstance(failure, error) for pair, failure in cohort.failed.items()} == {"a": True}
    assert torch.equal(logits_of(cohort.pairs[0].tuned), separately(files, "b"))
    assert torch.equal(logits_of(cohort.base), logits_of(Subject(build())))


def test_a_finetune_for_which_memory_does_not_suffice_fails_alone(files, monkeypatch):
    save_base(files / "whole", seed=3)
    load = models.load_module

    def out_of_memory(folder, *rest, **how):
        if folder == files / "whole":
            raise torch.OutOfMemoryError("no memory is left")
        return load(folder, *rest, **how)

    monkeypatch.setattr(models, "load_module", out_of_memory)
    registry = registry_of(files, a=lora(files / "a"), whole=full(files / "whole"))
    cohort = load_cohort(registry.pairs(), registry)
    assert [pair.pair.variant for pair in cohort] == ["a"]
    assert [type(error) for error in cohort.failed.values()] == [torch.OutOfMemoryError]


def test_a_load_that_fails_half_way_leaves_nothing_behind(files):
    for name in ("half", "late"):
        shutil.copytree(files / "a", files / name)
        change_config(files / name, target_modules=["q_proj", "v_proj", "mlp"], init_lora_weights=False)
    registry = registry_of(
        files, a0=lora(files / "half"), a1=lora(files / "b"), a2=lora(files / "late"), a3=lora(files / "c")
    )
    cohort = load_cohort(registry.pairs(), registry)
    assert [pair.variant for pair in cohort.failed] == ["a0", "a2"]
    assert torch.equal(logits_of(cohort.base), logits_of(Subject(build())))
    for pair, folder in zip(cohort, "bc", strict=True):
        assert torch.equal(logits_of(pair.tuned), separately(files, folder))


MALFORMED = {
    "rank pattern that is no mapping": ("a", "adapter_config.json", {"rank_pattern": [1]}),
    "modules to save that are no list": ("a", "adapter_config.json", {"modules_to_save": 5}),
    "bias that is no text, so that it is merged": ("a", "adapter_config.json", {"bias": None}),
    "width that the heads do not divide": ("full", "config.json", {"hidden_size": 30}),
    "padding token beyond the vocabulary": ("full", "config.json", {"pad_token_id": 999}),
    "quantisation without its settings": ("full", "config.json", {"quantization_config": {"quant_method": "gptq"}}),
    "tokenizer of a kind that is not known": ("full", "tokenizer.json", {"model": {"type": "Nope"}}),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_finetune_whose_files_a_library_stumbles_over_fails_alone(files, monkeypatch, tmp_path, what):
    monkeypatch.setenv("DIFFING_HOME", str(tmp_path / "home"))
    shutil.copytree(files / "base", files / "full")
    name, file, values = MALFORMED[what]
    place = files / name / file
    place.write_text(json.dumps(json.loads(place.read_text()) | values))
    bad = lora(files / name) if name == "a" else full(files / name)
    registry = registry_of(files, bad=bad, good=lora(files / "b"))
    cohort = load_cohort(registry.pairs(), registry)
    assert [(pair.variant, type(error)) for pair, error in cohort.failed.items()] in (
        [("bad", ModelLoadError)], [("bad", NotComputableError)]
    )  # fmt: skip
    [pair] = cohort
    torch.testing.assert_close(logits_of(pair.tuned), separately(files, "b"))


def test_pairs_of_several_bases_are_refused(made):
    registry = registry_of(made, default=lora(made / "a"))
    with pytest.raises(ModelLoadError, match=r"pairs are of \['other', 'tiny'\]"):
        load_cohort([Pair("tiny", "o"), Pair("other", "o")], registry)


def test_full_checkpoint_stands_beside_the_base(files):
    save_base(files / "full", seed=7)
    registry = registry_of(files, default=full(files / "full"), lora=lora(files / "a"))
    cohort = load_cohort(registry.pairs(), registry)
    assert torch.equal(logits_of(cohort.pairs[0].tuned), logits_of(Subject(build(seed=7))))
    assert torch.equal(logits_of(cohort.base), logits_of(Subject(build())))
    assert source_revisions(Pair("tiny", "o"), registry) == (cohort.base.revision, cohort.pairs[0].tuned.revision)


def test_identical_is_the_base_itself(made):
    registry = registry_of(made, default=Variant(kind="identical"))
    pair = load_pair(registry.organism("o"), "tiny", registry=registry)
    assert pair.tuned is pair.base
    assert (pair.base_revision, "identical") == source_revisions(pair.pair, registry)


def test_demo_artifacts_that_are_not_built_or_do_not_exist(files, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFING_HOME", str(tmp_path))
    with pytest.raises(ModelLoadError, match="demo artifact 'base' of 'tiny' is not built; run `diffing demo"):
        load_pair(Pair("tiny", "identical"))
    nowhere = Variant(kind="lora", source=Source(demo="nowhere"))
    registry = registry_of(files, bad=nowhere, good=lora(files / "a"))
    cohort = load_cohort(registry.pairs(), registry)
    assert "has no artifact 'nowhere'" in str(cohort.failed[Pair("tiny", "o", "bad")])
    assert [pair.pair.variant for pair in cohort] == ["good"]


def test_seed_twin_compares_two_adapters(made):
    twin = lora(made / "b", against=Weights(kind="lora", source=Source(path=made / "a")))
    registry = registry_of(made, default=twin)
    pair = load_pair(Pair("tiny", "o"), registry=registry)
    assert torch.equal(logits_of(pair.base), separately(made, "a"))
    assert torch.equal(logits_of(pair.tuned), separately(made, "b"))
    assert (pair.base_revision, pair.adapter_hash) == source_revisions(pair.pair, registry)


def test_base_that_is_itself_base_and_adapter(made):
    registry = registry_of(made, {"adapter": Source(path=made / "a")}, default=lora(made / "b"))
    pair = load_pair(Pair("tiny", "o"), registry=registry)
    torch.testing.assert_close(logits_of(pair.base), separately(made, "a"))
    assert pair.base_revision == source_revisions(pair.pair, registry)[0]
    assert "+" in pair.base_revision


def test_dtype_of_entry_and_of_call(made):
    registry = registry_of(made, {"dtype": "bfloat16", "chat_template": "hello"}, default=lora(made / "a"))
    pair = load_pair(Pair("tiny", "o"), registry=registry)
    assert pair.base.dtype == torch.bfloat16
    assert (pair.tokenizer.padding_side, pair.tokenizer.chat_template) == ("right", "hello")
    assert load_pair(Pair("tiny", "o"), registry=registry, dtype="float32").base.dtype == torch.float32


def test_resized_vocabulary_compares_the_common_part(files):
    build(seed=7, vocab_size=VOCAB + 8).save_pretrained(files / "full")
    tokenizer([f"w{number}" for number in range(VOCAB + 2)]).save_pretrained(files / "full")
    registry = registry_of(files, default=full(files / "full"))
    pair = load_pair(Pair("tiny", "o"), registry=registry)
    assert pair.common_vocab == VOCAB
    assert pair.notes == (
        "the finetune's tokenizer has 2 tokens more and 0 fewer than the base's; common ids agree",
        "the vocabularies have 64 and 72 rows; the first 64 are compared",
    )


def test_reordered_tokenizer_is_refused(files):
    words = [f"w{number}" for number in range(VOCAB)]
    words[4], words[9] = words[9], words[4]
    tokenizer(words).save_pretrained(files / "a")
    message = refusal(registry_of(files, default=lora(files / "a")))
    assert "2 ids mean another token, for example 4 is 'w4' in the base and 'w9' in the finetune" in message


def test_missing_tokenizer_is_refused(files):
    for file in files.glob("base/token*"):
        file.unlink()
    message = refusal(registry_of(files, default=lora(files / "a")))
    assert "cannot load the tokenizer of model tiny" in message
    assert "under tokenizer in the registry entry" in message


@pytest.mark.parametrize("where", ["base", "full"])
def test_non_finite_weights_are_named(files, where):
    save_base(files / "full", seed=7)
    weight = torch.full((32,), float("nan"))
    edit_tensors(files / where / "model.safetensors", **{"model.norm.weight": weight})
    message = refusal(registry_of(files, default=full(files / "full")))
    assert f"{files / where}: tensor model.norm.weight holds NaN or infinite values" in message


def test_non_finite_adapter_is_named(files):
    file = files / "a" / "adapter_model.safetensors"
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    edit_tensors(file, **{name: torch.full((32, 2), float("inf"))})
    assert f"{file}: tensor {name} holds NaN or infinite values" in refusal(
        registry_of(files, default=lora(files / "a"))
    )


@pytest.mark.parametrize("file", ["base/model.safetensors", "a/adapter_model.safetensors"])
def test_truncated_file_is_named(files, file):
    content = (files / file).read_bytes()
    (files / file).write_bytes(content[: len(content) - 10])
    message = refusal(registry_of(files, default=lora(files / "a")))
    assert f"{files / file} is truncated: {len(content) - 10:,} bytes, its header promises {len(content):,}" in message


@pytest.mark.parametrize(("content", "expected"), [(b"", "not a complete"), (b"\x04" + b"\0" * 7 + b"{{{{", "damaged")])
def test_file_that_is_not_safetensors(files, content, expected):
    file = files / "a" / "adapter_model.safetensors"
    file.write_bytes(content)
    message = refusal(registry_of(files, default=lora(files / "a")))
    assert str(file) in message
    assert expected in message


def test_missing_shard_is_named(files):
    shutil.rmtree(files / "base")
    build().save_pretrained(files / "base", max_shard_size="20KB")
    tokenizer().save_pretrained(files / "base")
    registry = registry_of(files, default=lora(files / "a"))
    assert load_pair(Pair("tiny", "o"), registry=registry).pair == Pair("tiny", "o")
    shard = sorted(files.glob("base/*.safetensors"))[1]
    shard.unlink()
    assert f"lacks {shard.name}, which model.safetensors.index.json names" in refusal(registry)


def test_missing_tensor_is_not_filled_with_random_numbers(files):
    file = files / "base" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    message = refusal(registry_of(files, default=lora(files / "a")))
    assert "lacks 1 tensors of LlamaForCausalLM, for example model.layers.1.mlp.up_proj.weight" in message


def test_pickled_weights_are_refused(files):
    (files / "base" / "model.safetensors").rename(files / "base" / "pytorch_model.bin")
    message = refusal(registry_of(files, default=lora(files / "a")))
    assert "holds no .safetensors file (found pytorch_model.bin)" in message
    assert "save_pretrained(new_folder)" in message


def test_missing_folder_and_missing_adapter_config(files):
    assert f"no folder {files / 'nope'}" in refusal(registry_of(files, default=lora(files / "nope")))
    message = refusal(registry_of(files, default=lora(files / "base")))
    assert "has no adapter_config.json; for a whole checkpoint write kind: full" in message


def test_config_that_transformers_does_not_know(files):
    config = json.loads((files / "base" / "config.json").read_text())
    (files / "base" / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    assert "cannot load" in (message := refusal(registry_of(files, default=lora(files / "a"))))
    assert "unheard_of" in message


def change_config(folder: Path, **values: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_adapter_of_a_deeper_base_is_refused(files):
    deep = save_base(files / "deep", num_hidden_layers=4)
    save_adapter(files / "d", deep)
    change_config(files / "d", base_model_name_or_path="")
    message = refusal(registry_of(files, default=lora(files / "d")))
    assert "does not fit base LlamaForCausalLM: 0 tensors are missing and 4 are left over" in message


def test_adapter_with_foreign_module_names_is_refused(files):
    other = save_base(files / "gpt", kind="gpt2")
    save_adapter(files / "g", other, target_modules=["c_attn"])
    message = refusal(registry_of(files, default=lora(files / "g")))
    assert "does not fit base LlamaForCausalLM" in message
    assert "c_attn" in message


def test_adapter_config_that_promises_more_than_the_file_is_refused(files):
    change_config(files / "a", target_modules=["q_proj", "v_proj", "up_proj"])
    message = refusal(registry_of(files, default=lora(files / "a")))
    assert "6 tensors are missing and 0 are left over" in message


def test_an_adapter_that_would_change_the_shared_base_gets_a_merged_model_beside_it(files, monkeypatch):
    """PEFT's start of PiSSA takes the adapter's part out of the base: on the shared copy every pair would suffer."""
    monkeypatch.setenv("DIFFING_HOME", str(files / "home"))
    change_config(files / "a", init_lora_weights="pissa")
    before = load_pair(Pair("tiny", "o", "plain"), registry=registry_of(files, plain=lora(files / "b")))
    registry = registry_of(files, default=lora(files / "a"), plain=lora(files / "b"))
    cohort = load_cohort([Pair("tiny", "o"), Pair("tiny", "o", "plain")], registry)
    pissa, plain = cohort.pairs
    assert torch.equal(logits_of(plain.base), logits_of(before.base))
    assert torch.equal(logits_of(plain.tuned), logits_of(before.tuned))
    torch.testing.assert_close(logits_of(pissa.tuned), separately(files, "a"), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits_of(pissa.tuned), logits_of(pissa.base))


def test_an_adapter_that_changes_the_base_whenever_it_is_loaded_is_not_switched(files):
    """KaSA takes small singular values out of the base's weights, and switching it off does not put them back."""
    assert is_switchable(files / "a")
    change_config(files / "a", kasa_config={})
    assert is_switchable(files / "a")
    change_config(files / "a", kasa_config={"beta": 0.1})
    assert not is_switchable(files / "a")


def test_an_adapter_whose_tensors_are_of_another_kind_is_refused(files, monkeypatch):
    monkeypatch.setenv("DIFFING_HOME", str(files / "home"))
    change_config(files / "a", peft_type="IA3", feedforward_modules=[])
    assert "tensors are missing or left over" in refusal(registry_of(files, default=lora(files / "a")))


@pytest.mark.parametrize("rows", [VOCAB, VOCAB + 8])
def test_adapter_that_would_overwrite_the_shared_embeddings_is_refused(files, rows):
    name = "base_model.model.model.embed_tokens.weight"
    edit_tensors(files / "a" / "adapter_model.safetensors", **{name: torch.ones(rows, 32)})
    message = refusal(registry_of(files, default=lora(files / "a")))
    assert f"stores its own model.embed_tokens of shape ({rows}, 32), the base has one of shape (64, 32)" in message


def test_adapter_that_carries_the_bases_own_embeddings_is_taken(files):
    own = load_file(files / "base" / "model.safetensors")["model.embed_tokens.weight"]
    file = files / "a" / "adapter_model.safetensors"
    edit_tensors(file, **{"base_model.model.model.embed_tokens.weight": own})
    pair = load_pair(Pair("tiny", "o"), registry=registry_of(files, default=lora(files / "a")))
    assert torch.equal(logits_of(pair.tuned), separately(files, "a"))


def test_adapter_that_names_another_model_of_the_registry_is_refused(files):
    change_config(files / "a", base_model_name_or_path="owner/other")
    registry = registry_of(files, default=lora(files / "a"))
    registry.models["second"] = Model(name="second", source=Source(repo="owner/other"))
    assert "was made for owner/other, which is or was model second of the registry" in refusal(registry)


def test_adapter_that_names_an_unknown_base_is_noted(files):
    change_config(files / "a", base_model_name_or_path="mirror/tiny")
    pair = load_pair(Pair("tiny", "o"), registry=registry_of(files, default=lora(files / "a")))
    assert pair.notes == (f"the adapter names mirror/tiny as its base, not {files / 'base'}; names and shapes fit",)


def test_finetune_of_another_depth_is_refused(files):
    save_base(files / "full", num_hidden_layers=2)
    message = refusal(registry_of(files, default=full(files / "full")))
    assert "base has 3 layers of width 32, the finetune 2 of 32" in message


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"])
def test_revision_covers_tokenizer_chat_template_and_generation_config(files, file):
    """What is asked and where an answer ends follow from them, so results on an edited one are not current."""
    registry = registry_of(files, default=lora(files / "a"))
    before = source_revisions(Pair("tiny", "o"), registry)
    with (files / "base" / file).open("a") as opened:
        opened.write("\n")
    base, adapter = source_revisions(Pair("tiny", "o"), registry)
    assert base != before[0]
    assert adapter == before[1]


def test_a_tokenizer_of_its_own_needs_no_weights_and_is_part_of_the_identity(files):
    tokenizer().save_pretrained(files / "words")
    (files / "base/tokenizer.json").unlink()
    own = {"tokenizer": Source(path=files / "words")}
    registry = registry_of(files, own, default=lora(files / "a"))
    pair = load_pair(Pair("tiny", "o"), registry=registry)
    before = source_revisions(Pair("tiny", "o"), registry)
    assert (pair.base_revision, pair.adapter_hash) == before
    assert pair.base_revision != pair.base.revision, "stored activations belong to the weights alone"
    (files / "words/chat_template.jinja").write_text("hello")
    assert source_revisions(Pair("tiny", "o"), registry)[0] != before[0]
    (files / "empty").mkdir()
    message = refusal(registry_of(files, {"tokenizer": Source(path=files / "empty")}, default=lora(files / "a")))
    assert "holds no file of a tokenizer; mend tokenizer in the registry entry" in message


def test_entries_of_one_tokenizer_keep_their_own_chat_template(made):
    """The toolkit's tokenizer cache was keyed by name, so the first entry's template served all."""
    templates = [{"chat_template": "one"}, {"chat_template": "two"}, {}]
    pairs = [load_pair(Pair("tiny", "o"), registry=registry_of(made, each, default=lora(made / "a"))) for each in templates]
    assert [pair.tokenizer.chat_template for pair in pairs] == ["one", "two", None]


@pytest.mark.parametrize("field", [{"chat_template": "hello"}, {"end_of_turn": "w5"}, {"template_options": {"date_string": "1 May 2024"}}])
def test_what_the_entry_says_of_chats_is_part_of_the_identity(made, field):
    plain, said = (registry_of(made, each, default=lora(made / "a")) for each in ({}, field))
    pair = load_pair(Pair("tiny", "o"), registry=said)
    assert (pair.base_revision, pair.adapter_hash) == source_revisions(pair.pair, said)
    assert pair.base_revision != source_revisions(pair.pair, plain)[0]


def test_end_of_turn_is_a_token_that_ends_answers_of_both_sides(made):
    pair = load_pair(Pair("tiny", "o"), registry=registry_of(made, {"end_of_turn": "w5"}, default=lora(made / "a")))
    assert pair.base.stop_ids == pair.tuned.stop_ids == (5,)
    for text in ("w5 w6", "nothing"):
        with pytest.raises(RegistryError, match=f"end_of_turn of model tiny: '{text}' is not one token"):
            load_pair(Pair("tiny", "o"), registry=registry_of(made, {"end_of_turn": text}, default=lora(made / "a")))


OWN_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
with Path(MARK).open("a") as mark:
    mark.write("ran ")
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def with_own_code(folder: Path, mark: Path) -> Path:
    """The same model, as one whose code lies in its folder; running it leaves a mark."""
    (folder / "own.py").write_text(OWN_CODE.replace("MARK", repr(str(mark))))
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": classes}))
    return folder


def test_trust_in_the_bases_code_does_not_cover_a_finetune(files, tmp_path, monkeypatch):
    """In the toolkit trusting remote code was hard coded in places; a stranger's finetune could run anything."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    with_own_code(files / "base", tmp_path / "base_ran")
    shutil.copytree(files / "base", files / "tuned")
    with_own_code(files / "tuned", tmp_path / "tuned_ran")
    trusting = {"trust_remote_code": True}
    assert "trust_remote_code" in refusal(registry_of(files, default=full(files / "tuned")))
    assert not (tmp_path / "base_ran").exists()
    message = refusal(registry_of(files, trusting, default=full(files / "tuned")))
    assert f"cannot load {files / 'tuned'}" in message
    assert "trust_remote_code" in message
    assert (tmp_path / "base_ran").exists()
    assert not (tmp_path / "tuned_ran").exists()
    registry = registry_of(files, trusting, default=full(files / "tuned").model_copy(update=trusting))
    pair = load_pair(Pair("tiny", "o"), registry=registry)
    assert (tmp_path / "tuned_ran").exists()
    assert torch.equal(logits_of(pair.tuned), logits_of(pair.base))


def test_a_base_whose_code_is_trusted_takes_adapters_that_must_be_merged(files, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setenv("DIFFING_HOME", str(tmp_path / "home"))
    torch.manual_seed(0)
    config = peft.LoHaConfig(r=2, init_weights=False, target_modules=["q_proj"])
    peft.get_peft_model(tf.AutoModelForCausalLM.from_pretrained(files / "base"), config).save_pretrained(files / "loha")
    with_own_code(files / "base", tmp_path / "ran")
    assert "trust_remote_code" in refusal(registry_of(files, default=lora(files / "loha")))
    registry = registry_of(files, {"trust_remote_code": True}, default=lora(files / "loha"))
    pair = load_pair(Pair("tiny", "o"), registry=registry)
    assert not torch.equal(logits_of(pair.tuned), logits_of(pair.base))
    shutil.rmtree(tmp_path / "home")
    stream = weight_stream(WeightPair.of(Pair("tiny", "o"), registry))
    changed = {delta.name for delta in stream if (delta.pair.tuned - delta.pair.base).any()}
    assert changed == {f"layers.{layer}.self_attn.q_proj.weight" for layer in range(pair.base.n_layers)}


def test_revision_follows_content_and_not_time_or_place(files, tmp_path):
    registry = registry_of(files, default=lora(files / "a"))
    before = source_revisions(Pair("tiny", "o"), registry)
    moved = shutil.copytree(files, tmp_path / "moved")
    assert source_revisions(Pair("tiny", "o"), registry_of(moved, default=lora(moved / "a"))) == before
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    edit_tensors(files / "a" / "adapter_model.safetensors", **{name: torch.ones(32, 2)})
    after = source_revisions(Pair("tiny", "o"), registry)
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_a_folder_without_a_tokenizer_is_told_where_transformers_would_make_an_empty_one(tmp_path):
    build("qwen3").save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match="holds none of tokenizer.json"):
        load_tokenizer(tmp_path, Model(name="base", source=Source(path=tmp_path)))
