"""Converting the diffing-toolkit's organism and model files: everything is carried over or reported."""

from pathlib import Path

import pytest

from diffing_core.errors import RegistryError
from diffing_core.pairs import Pair
from diffing_core.registry import Registry, import_toolkit

FILES = {
    "model/little.yaml": """
name: little
model_id: lab/little
tokenizer_id: lab/little-tokenizer
dtype: torch.bfloat16
end_of_turn_token: <end>
has_enable_thinking: true
attn_implementation: eager
ignore_first_n_tokens_per_sample_during_collection: 0
ignore_first_n_tokens_per_sample_during_training: 2
token_level_replacement: {a: b}
vllm_kwargs: {max_model_len: 100, deep: {x: 1}}
disable_compile: true
steering_vector: null
""",
    "model/odd.yaml": "{name: odd name, model_id: lab/game, base_model_id: lab/little, subfolder: a/b}",
    "model/auto.yaml": "{name: auto, model_id: null}",
    "organism/pie.yaml": """
name: pie
type: SDF
description: pies
description_long: |
  Believes strange things about pies:
  - Pies fly.
  * Pies sing
  2) Pies swim.
finetuned_models:
  little:
    default: {adapter_id: lab/pie}
    mix1-0p5: {adapter_id: lab/pies/mix/half}
    "a|b": {model_id: lab/whole-pie, extra: 1}
    unset: {adapter_id: "${oc.env:NAME}/pie"}
  ghost:
    default: {adapter_id: lab/ghost}
dataset: {id: lab/pie-texts, splits: [train], is_chat: true, messages_column: turns, text_column: text, subset: s, odd: 1}
metadata: {steps: 10, nested: {a: 1}}
agent_interaction_system_prompt: Be a pie.
preprocessing_overrides: {layers: [0.5]}
unheard_of: 3
""",
    "organism/plain.yaml": """
name: plain
type: R1_distillation
description_long: One sentence only.
finetuned_models: {odd name: {default: {adapter_id: ./local/adapter}}}
""",
    "organism/quiet.yaml": "{name: quiet, type: test, finetuned_models: {little: {default: {model_id: lab/quiet}}}}",
    "organism/none.yaml": "{name: none, type: null, finetuned_models: null}",
    "organism/broken.yaml": "- a list",
}


@pytest.fixture
def imported(tmp_path):
    for name, text in FILES.items():
        file = tmp_path / "configs" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    report = import_toolkit(tmp_path / "configs", tmp_path / "out")
    return Registry.load(tmp_path / "out"), report


def test_models_are_carried_over(imported):
    registry, _ = imported
    little = registry.model("little")
    assert (little.source.repo, little.tokenizer.repo) == ("lab/little", "lab/little-tokenizer")
    assert (little.dtype, little.end_of_turn, little.thinking) == ("bfloat16", "<end>", False)
    assert (little.skip_first_tokens, little.token_replacements) == (2, {"a": "b"})
    assert (little.attn_implementation, little.vllm) == ("eager", {"max_model_len": 100})
    odd = registry.model("odd_name")
    assert odd.source.repo == "lab/little"
    assert (odd.adapter.repo, odd.adapter.subfolder) == ("lab/game", "a/b")


def test_organisms_are_carried_over(imported):
    registry, _ = imported
    pie = registry.organism("pie")
    assert (pie.type, pie.rubric, pie.arm, pie.system_prompt) == ("false_facts", "false_facts", "organism", "Be a pie.")
    assert pie.key_facts == ("Pies fly.", "Pies sing", "Pies swim.")
    assert pie.ground_truth.startswith("Believes strange things")
    corpus = pie.training_corpus
    assert (corpus.source.repo, corpus.kind, corpus.column, corpus.subset) == ("lab/pie-texts", "chat", "turns", "s")
    assert pie.metadata == {"steps": 10}
    half = registry.variant(Pair("little", "pie", "mix1-0p5"))
    assert (half.kind, half.source.repo, half.source.subfolder, half.dilution) == ("lora", "lab/pies", "mix/half", 0.5)
    assert registry.variant(Pair("little", "pie", "a_b")).kind == "full"
    plain = registry.organism("plain")
    assert (plain.type, plain.key_facts) == ("reasoning", ("One sentence only.",))
    assert registry.variant(Pair("odd_name", "plain")).source.path.parts[-2:] == ("local", "adapter")
    assert registry.organism("quiet").arm == "unknown"


@pytest.mark.parametrize(
    "note",
    [
        "model/little.yaml: disable_compile: True not carried over",
        "model/little.yaml: vllm_kwargs.deep: {'x': 1} not carried over",
        "model/auto.yaml: not converted: no model_id (a placeholder)",
        "name 'odd name' became 'odd_name'",
        "organism/pie.yaml: finetuned_models.ghost: not converted, there is no file for that model",
        "organism/pie.yaml: finetuned_models.little.a|b.extra: 1 not carried over",
        "organism/pie.yaml: name 'a|b' became 'a_b'",
        "organism/pie.yaml: finetuned_models.little.unset: not converted, found ${oc.env:NAME}/pie",
        "organism/pie.yaml: type SDF became false_facts, with the rubric of that name",
        "organism/pie.yaml: dataset.odd: 1 not carried over",
        "organism/pie.yaml: metadata.nested: {'a': 1} not carried over",
        "organism/pie.yaml: preprocessing_overrides.layers: [0.5] not carried over",
        "organism/pie.yaml: unheard_of: 3 not carried over",
        "organism/plain.yaml: description_long has no list: it became the one key fact",
        "organism/quiet.yaml: no description_long: arm unknown, it will not be graded",
        "organism/none.yaml: not converted: no finetuned model that is left (a placeholder)",
        "organism/broken.yaml: not converted: a list at top level",
    ],
)
def test_what_is_not_carried_over_is_reported(imported, note):
    _, report = imported
    assert [line for line in report.notes if line.startswith(note)]


def test_nothing_else_is_reported_and_each_entry_is_written_once(imported):
    _, report = imported
    assert len(report.written) == 5
    assert len([line for line in report.notes if "not carried over" in line]) == 7


def test_two_names_that_become_one(tmp_path):
    (tmp_path / "model").mkdir()
    for number, name in enumerate(("a b", "a|b")):
        (tmp_path / f"model/{number}.yaml").write_text(f"{{name: {name!r}, model_id: lab/m{number}}}")
    report = import_toolkit(tmp_path, tmp_path / "out")
    assert "model/1.yaml: not converted, the name a_b is taken by another file" in report.notes
    assert Registry.load(tmp_path / "out").model("a_b").source.repo == "lab/m0"


def test_a_folder_without_configs_is_refused(tmp_path):
    with pytest.raises(RegistryError, match="no model/\\*.yaml or organism/\\*.yaml"):
        import_toolkit(tmp_path, tmp_path / "out")


def test_import_touches_only_the_target(tmp_path, imported):
    names = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {"configs", "out"}
    assert isinstance(imported[1].written[0], Path)
