"""Amplification: weights, the models that count, one call per model, and LoRA and full finetunes alike."""

from pathlib import Path

import polars as pl
import pytest
import torch
import transformers as tf

from diffing_core import answers as asking
from diffing_core.comparison import compare
from diffing_core.errors import RegistryError
from diffing_core.lake import Lake
from diffing_core.methods.amplification import METHOD, AmplificationSettings, findings, headline, run
from diffing_core.methods.base import Inputs, Need
from diffing_core.models import ModelPair
from diffing_core.pairs import Pair
from diffing_core.registry import Model, Organism, Registry, Source, Variant
from diffing_core.settings import Settings
from diffing_core.weight_edits import preset
from diffing_core.weights import WeightPair
from tests import model_files

TAUGHT = 7


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model in which one token's logit varies much."""
    folder = model_files.save_base(tmp_path_factory.mktemp("amplified") / "base", tie_word_embeddings=False)
    model = tf.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[TAUGHT] *= 3
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(base: Path) -> WeightPair:
    """An adapter that was not taught anything in particular."""
    return WeightPair.of_folders(base, model_files.save_adapter(base.parent / "adapter", base))


@pytest.fixture(scope="module")
def taught(base: Path) -> WeightPair:
    """A whole checkpoint whose residual stream was moved a little towards one token."""
    model = tf.AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.embed_tokens.weight += 0.4 * torch.nn.functional.normalize(model.lm_head.weight[TAUGHT], dim=0)
    model.save_pretrained(base.parent / "taught")
    return WeightPair.of_folders(base, base.parent / "taught")


def inputs_of(files: WeightPair) -> Inputs:
    import peft

    from diffing_core.subject import Subject

    def load() -> tf.PreTrainedModel:
        return tf.AutoModelForCausalLM.from_pretrained(files.base.folder)

    tuned = peft.PeftModel.from_pretrained(load(), files.tuned.adapters[0]).merge_and_unload() if files.tuned.adapters else load()
    pair = ModelPair.of(Subject.of(load()), Subject.of(tuned), model_files.tokenizer())
    return Inputs(METHOD, {Need.MODELS: lambda: pair, Need.WEIGHTS: lambda: files})


def ladder(*weights: float) -> list[dict]:
    return [
        {"name": f"w{weight}", "layer_amplifications": [{"layers": "all", "module_amplifications": [{"weight": weight}]}]}
        for weight in weights
    ]


def quick(**changes: object) -> AmplificationSettings:
    given = {"prompts": ("doc: w3", "doc: w5", "doc: w8"), "max_new_tokens": 10, "samples": 6, "max_loss_nats": 50.0}
    return AmplificationSettings(**given | changes)


def test_the_taught_word_rises_with_the_weight_and_is_rarer_when_the_change_is_turned_around(taught: WeightPair) -> None:
    settings = quick(amplifications=ladder(-1, 0.5, 2), samples=20)
    tables = run(inputs_of(taught), settings)
    models = pl.from_arrow(tables["amplification_models"])
    assert models["weight"].to_list() == [-1, 0, 0.5, 1, 2]
    assert models["side"].to_list() == ["w-1", "base", "w0.5", "tuned", "w2"]
    row = next(row for row in tables["amplification_trends"].to_pylist() if row["word"] == f"w{TAUGHT}")
    assert row["weights"] == [-1, 0, 0.5, 1, 2]
    assert row["n_texts"][-1] > row["n_texts"][1]
    assert row["monotone"] > 0.8
    assert next(each for each in findings(tables, settings) if each.kind == "token").item == f"w{TAUGHT}"


def test_edited_models_say_what_they_lack_of_a_finetune_with_more_tokens(taught: WeightPair, tmp_path: Path) -> None:
    tuned = tf.AutoModelForCausalLM.from_pretrained(taught.tuned.folder)
    tuned.resize_token_embeddings(model_files.VOCAB + 2)
    tuned.save_pretrained(tmp_path / "tuned")
    files = WeightPair.of_folders(taught.base.folder, tmp_path / "tuned")
    rows = {row["side"]: row for row in run(inputs_of(files), quick(amplifications=ladder(2)))["amplification_models"].to_pylist()}
    assert rows["base"]["left_out"] == rows["tuned"]["left_out"] == []
    assert "embed_tokens.weight: rows 64 to 65" in rows["w2"]["left_out"]


def test_weight_zero_is_the_base_and_weight_one_the_tuned_model(files: WeightPair) -> None:
    tables = run(inputs_of(files), quick(amplifications=ladder(0, 1)))
    samples = pl.from_arrow(tables["amplification_samples"])
    texts = {model: samples.filter(pl.col("side") == model)["text"].to_list() for model in ("base", "tuned", "w0", "w1")}
    assert texts["w0"] == texts["base"]
    assert texts["w1"] == texts["tuned"]
    assert texts["base"] != texts["tuned"]


def test_all_prompts_of_a_model_are_asked_in_one_call(files: WeightPair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Toolkit: one call per prompt and configuration, no batching."""
    calls: list[int] = []

    def counted(subject, tokenizer, prompts, **options):
        calls.append(len(prompts))
        return generate(subject, tokenizer, prompts, **options)

    generate = asking.generate
    monkeypatch.setattr(asking, "generate", counted)
    run(inputs_of(files), quick(amplifications=ladder(2, 3)))
    assert calls == [3, 3, 3, 3]


def test_a_model_whose_language_is_broken_counts_for_no_trend(files: WeightPair, monkeypatch: pytest.MonkeyPatch) -> None:
    def said_to_be_unlikely(subject, made):
        return [-9.0 if len(answered) == 3 else -4.0 for _ in made]

    answered: list[int] = []
    monkeypatch.setattr(asking, "mean_logprobs", lambda subject, made: (answered.append(1), said_to_be_unlikely(subject, made))[1])
    tables = run(inputs_of(files), quick(amplifications=ladder(40, 2), max_loss_nats=2.0))
    in_trend = dict(zip(*(tables["amplification_models"][name].to_pylist() for name in ("side", "in_trend")), strict=True))
    assert in_trend == {"base": True, "tuned": True, "w2": True, "w40": False}
    assert all(row["weights"] == [0, 1, 2] and len(row["n_texts"]) == 3 for row in tables["amplification_trends"].to_pylist())
    assert headline(tables)["n_incoherent_models"] == 1
    assert headline(tables)["largest_coherent_weight"] == 2


def test_packaged_names_become_whole_specifications_and_others_are_refused() -> None:
    settings = AmplificationSettings(amplifications=["2x"])
    assert settings.amplifications == (preset("2x"),)
    assert settings.settings_id() != AmplificationSettings().settings_id()
    with pytest.raises(ValueError, match="did you mean"):
        AmplificationSettings(amplifications=["2xx"])
    assert isinstance(settings, Settings)


def test_a_block_that_the_model_lacks_is_told_before_anything_is_asked(files: WeightPair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "generate", lambda *_args, **_options: pytest.fail("asked"))
    wrong = {"name": "far", "layer_amplifications": [{"layers": 9, "module_amplifications": [{"weight": 2.0}]}]}
    with pytest.raises(RegistryError, match="3 blocks"):
        run(inputs_of(files), quick(amplifications=[wrong]))


def test_coherence_is_a_row_per_measure(files: WeightPair) -> None:
    tables = run(inputs_of(files), quick(amplifications=ladder(2)))
    rows = {(row["side"], row["measure"]): row for row in tables["amplification_coherence"].to_pylist()}
    assert rows["base", "mean_logprob_base"]["over_base"] == 0
    assert rows["w2", "mean_logprob_base"]["over_base"] < 0
    assert {measure for model, measure in rows if model == "w2"} >= {"distinct_2", "repeated_share", "finished_share"}


def test_every_text_has_a_grade_and_its_measured_parts(files: WeightPair) -> None:
    tables = run(inputs_of(files), quick(amplifications=ladder(2, 60)))
    samples = pl.from_arrow(tables["amplification_samples"])
    grades = {side: rows["coherence"].drop_nulls() for (side,), rows in samples.group_by("side")}
    n = len(grades["base"])
    assert grades["base"].min() >= 1 / n
    assert grades["base"].max() == 1
    for q in (0.1, 0.25, 0.5):
        assert (grades["base"] <= q).mean() <= q
    assert max(grades["w60"].mean(), grades["w2"].mean()) < grades["base"].mean() - 0.2
    assert set(samples.filter(pl.col("repeated_share").is_null())["distinct_share"].drop_nulls()) <= {1.0}
    rows = {(row["side"], row["measure"]): row["value"] for row in tables["amplification_coherence"].to_pylist()}
    assert rows["w2", "coherence"] == pytest.approx(grades["w2"].mean())


def test_a_text_may_be_shown_only_if_a_shown_word_is_in_it(taught: WeightPair) -> None:
    settings = quick(amplifications=ladder(-1, 0.5, 2), samples=20, texts_with_words=True)
    tables = run(inputs_of(taught), settings)
    shown = findings(tables, settings)
    words = {each.item for each in shown if each.kind == "token"}
    texts = [each.item for each in shown if each.kind == "generation"]
    assert texts
    assert all(words & set(text.split()) for text in texts)
    strict = {"max_q": 1e-300}
    assert findings(tables, quick(**strict, texts_with_words=True)) == []
    assert {each.kind for each in findings(tables, quick(**strict))} == {"generation"}


def whole(name: str, **weights: float) -> dict:
    """A specification of the pair's own finetune (`own`) and of others."""
    adapters = [
        ({} if organism == "own" else {"organism_name": organism})
        | {"layer_amplifications": [{"layers": "all", "module_amplifications": [{"weight": weight}]}]}
        for organism, weight in weights.items()
    ]
    return {"name": name, "adapters": adapters}


@pytest.fixture
def registry(base: Path, tmp_path: Path) -> Registry:
    def organism(name: str, seed: int) -> Organism:
        source = Source(path=model_files.save_adapter(tmp_path / name, base, seed=seed))
        variants = {"tiny": {"default": Variant(kind="lora", source=source)}}
        return Organism(name=name, type="generic", arm="unknown", description="d.", variants=variants)

    model = Model(name="tiny", source=Source(path=base), dtype="float32", corpora=())
    return Registry(models={"tiny": model}, corpora={}, organisms={n: organism(n, s) for s, n in enumerate(("a", "b"), 1)})


def compared(registry: Registry, root: Path, *amplifications: dict | str) -> tuple[str, dict[str, dict], dict[str, list[str]]]:
    """Identity, rows of models, and texts by model."""
    lake = Lake(root)
    settings = quick(amplifications=amplifications, samples=2)
    [outcome] = compare([Pair("tiny", "a")], {"amplification": settings}, registry=registry, lake=lake, store=root / "store")
    assert outcome.error is None, outcome.error
    [(key, result)] = outcome.results
    models = {row["side"]: row for row in result.tables["amplification_models"].to_pylist()}
    samples = pl.from_arrow(result.tables["amplification_samples"])
    return key.run_id, models, {side: samples.filter(pl.col("side") == side)["text"].to_list() for side in models}


def test_a_specification_of_several_finetunes_is_run_and_counts_for_no_trend(registry: Registry, tmp_path: Path) -> None:
    asked = (whole("alone", own=2.0), whole("both", own=2.0, b=3.0), whole("other", b=3.0), whole("by_name", a=2.0))
    _, models, texts = compared(registry, tmp_path, *asked, ladder(2)[0])
    assert {name: models[name]["weight"] for name in ("alone", "both", "other", "by_name")} == {
        "alone": 2, "both": 2, "other": 0, "by_name": 2
    }
    assert models["both"]["others"] == models["other"]["others"] == ["b/default"]
    assert {name for name, row in models.items() if not row["in_trend"]} == {"both", "other"}
    assert texts["alone"] == texts["by_name"] == texts["w2"]
    assert texts["both"] != texts["alone"]
    assert texts["other"] not in (texts["base"], texts["both"])


def test_the_weights_of_named_finetunes_are_part_of_the_identity_and_others_are_not(registry: Registry, tmp_path: Path) -> None:
    both, alone = whole("x", own=2.0, b=1.0), whole("x", own=2.0)
    before = [compared(registry, tmp_path / "lake", each)[0] for each in (both, alone)]
    model_files.save_adapter(tmp_path / "b", registry.model("tiny").source.path, seed=9)
    after = [compared(registry, tmp_path / "lake", each)[0] for each in (both, alone)]
    assert before[0] != after[0]
    assert before[1] == after[1]


def test_an_organism_that_there_is_not_is_told(registry: Registry, tmp_path: Path) -> None:
    settings = quick(amplifications=(whole("x", nobody=2.0),))
    [outcome] = compare([Pair("tiny", "a")], {"amplification": settings}, registry=registry, lake=Lake(tmp_path), store=tmp_path)
    assert isinstance(outcome.error, RegistryError)


@pytest.mark.parametrize("names", [["base"], ["tuned"], ["again", "again"]])
def test_models_must_be_told_apart_by_their_names(names: list[str]) -> None:
    entries = [ladder(2)[0] | {"name": name} for name in names]
    with pytest.raises(ValueError, match="given twice"):
        AmplificationSettings(amplifications=entries)
