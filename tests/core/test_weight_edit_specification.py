"""The specification of weight edits: which blocks, which weights, and what is refused."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from diffing_core.errors import RegistryError
from diffing_core.weight_edits import preset, presets, read_specification, resolve, uniform
from diffing_core.weight_edits.specification import LayerAmplification, LayerWeights, WeightEdit


def amplification(layers, *modules: tuple[str, float], relative: bool = False) -> LayerAmplification:
    return LayerAmplification(
        layers=layers,
        is_relative=relative,
        module_amplifications=[{"modules": name, "weight": weight} for name, weight in modules],
    )


@pytest.mark.parametrize(
    ("layers", "relative", "expected"),
    [
        (2, False, (2,)),
        ([3, 0], False, (3, 0)),
        ({"start": 1, "end": 3}, False, (1, 2, 3)),
        ({"type": "range", "start": 0, "end": 0}, False, (0,)),
        ("all", False, (0, 1, 2, 3, 4)),
        (1.0, True, (4,)),
        (1, True, (4,)),
        (0.5, True, (2,)),
        ([0.0, 0.49, 0.3], True, (0, 2, 1)),
        ({"start": 0.2, "end": 0.7}, True, (1, 2, 3)),
        ({"start": 0.0, "end": 0.8}, True, (0, 1, 2, 3)),
    ],
)
def test_layers_may_be_a_block_a_fraction_a_list_a_range_with_both_ends_or_all(layers, relative, expected) -> None:
    assert amplification(layers, ("all", 2.0), relative=relative).blocks(5) == expected


def test_inside_a_naming_modules_default_to_one_and_later_namings_hold() -> None:
    weights = resolve((amplification("all", ("all", 3.0)), amplification([1], ("attention", 2.0))), 3)
    assert weights.layers == (LayerWeights(3, 3, 3), LayerWeights(2, 1, 1), LayerWeights(3, 3, 3))
    later = resolve((amplification([1], ("attention", 2.0)), amplification([1], ("mlp", 0.0))), 2)
    assert later.layers == (LayerWeights(), LayerWeights(1, 0, 1))


def test_module_all_is_overridden_by_a_later_module_of_the_same_naming() -> None:
    assert resolve((amplification(0, ("all", 2.0), ("mlp", 5.0)),), 1).layers == (LayerWeights(2, 5, 2),)


def test_what_lies_in_no_block_follows_only_all_modules_of_all_layers() -> None:
    assert resolve(uniform(-1.0), 2).outside == -1
    assert resolve((amplification({"start": 0, "end": 1}, ("all", 2.0)),), 2).outside == 1
    assert resolve((amplification("all", ("mlp", 2.0)),), 2).outside == 1
    assert resolve(uniform(2.0), 2).of(None, "embed") == 2
    assert resolve(uniform(2.0), 2).of(1, "norm") == 2
    assert resolve((amplification("all", ("attention", 4.0)),), 2).of(1, "attn") == 4


def test_presets_amplify_the_first_four_fifths_and_negate_everything() -> None:
    assert set(presets()) == {"1.5x", "2x", "2.5x", "3x", "negative_1x"}
    for name, weight in (("2x", 2.0), ("2.5x", 2.5), ("3x", 3.0)):
        weights = resolve(preset(name).layer_amplifications, 11)
        assert [each.mlp for each in weights.layers] == [weight] * 9 + [1.0] * 2
        assert weights.outside == 1
        assert weights.mean == pytest.approx((9 * weight + 2) / 11)
    for n_layers, n_amplified in ((2, 2), (3, 3), (4, 3), (12, 10), (28, 23)):  # round(0.8 · (n − 1)) is the last one
        amplified = [each.mlp == 2 for each in resolve(preset("2x").layer_amplifications, n_layers).layers]
        assert amplified == [True] * n_amplified + [False] * (n_layers - n_amplified)
    negative = resolve(preset("negative_1x").layer_amplifications, 2)
    assert negative == resolve(uniform(-1.0), 2)
    with pytest.raises(RegistryError, match="did you mean '3x'"):
        preset("3xx")


def adapter(organism: str, *amplifications: LayerAmplification, **more) -> dict:
    return {"organism": organism, "layer_amplifications": amplifications, **more}


def test_an_adapter_named_twice_counts_once_and_one_without_anything_to_do_is_left_out() -> None:
    first, second = amplification(0, ("all", 2.0)), amplification(1, ("all", 3.0))
    edit = WeightEdit(
        name="x", adapters=[adapter("a", first), adapter("idle"), adapter("b", first), adapter("a", second)]
    )
    assert [(each.organism, each.layer_amplifications) for each in edit.effective()] == [
        ("a", (first, second)),
        ("b", (first,)),
    ]
    other = WeightEdit(name="x", adapters=[adapter("a", first), adapter("a", second, variant="strong")])
    assert len(other.effective()) == 2
    repo = {"source": {"repo": "a/strong"}, "layer_amplifications": (first,)}
    folder = {"path": "a/strong", "layer_amplifications": (first,)}
    alike = WeightEdit(name="x", adapters=[adapter("a", first, variant="strong"), repo, folder])
    assert len(alike.effective()) == 3


def test_nothing_to_do_and_two_ranks_of_one_adapter_are_told() -> None:
    with pytest.raises(RegistryError, match="nothing to write"):
        WeightEdit(name="x", adapters=[adapter("a")]).effective()
    with pytest.raises(RegistryError, match="two ranks"):
        WeightEdit(name="x", adapters=[adapter("a", rank=1), adapter("a", rank=2)]).effective()
    with pytest.raises(RegistryError, match="two ranks"):
        WeightEdit(name="x", adapters=[adapter("a", rank=1), adapter("a", rank=1, residual=True)]).effective()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"layers": 0.5}, "is_relative: true"),
        ({"layers": -1}, "no block number"),
        ({"layers": 1.5, "is_relative": True}, "no fraction"),
        ({"layers": {"start": 3, "end": 1}}, "before its start"),
        ({"layers": []}, "empty list"),
        ({"layers": "some"}, "all"),
        ({"module_amplifications": [{"modules": "heads", "weight": 1.0}]}, "attention"),
        ({"module_amplifications": [{"modules": "mlp", "weight": float("nan")}]}, "finite"),
        ({"layer": 1}, "layer"),
    ],
)
def test_wrong_numbers_and_unknown_keys_are_refused(wrong: dict, told: str) -> None:
    entry = {"layers": 0, "module_amplifications": [{"modules": "all", "weight": 2.0}], **wrong}
    with pytest.raises(ValidationError, match=told):
        LayerAmplification.model_validate(entry)


def test_a_block_that_the_model_lacks_is_told() -> None:
    with pytest.raises(RegistryError, match="4 blocks"):
        resolve((amplification(7, ("all", 2.0)),), 4)


TOOLKIT_FILE = """
name: default_2x
description: 2x amplification on layers 0-80%, all modules
adapters:
  - {organism_name: persona, variant: strong, layer_amplifications: &twice [
      {layers: {type: range, start: 0.0, end: 0.8}, is_relative: true, module_amplifications: [{modules: all, weight: 2.0}]}]}
  - {organism_name: custom, variant: null, layer_amplifications: *twice}
  - {organism_name: custom, variant: owner/name/step-100, layer_amplifications: *twice}
  - {organism_name: custom, variant: ./mine, layer_amplifications: *twice}
"""


def test_a_file_of_the_toolkit_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(TOOLKIT_FILE)
    edit = read_specification(tmp_path / "x.yaml")
    named, own, repo, folder = edit.adapters
    assert [each.place for each in (named, own)] == ["persona/strong", ""]
    assert (repo.source.repo, repo.source.subfolder) == ("owner/name", "step-100")
    assert folder.path == tmp_path / "mine"
    assert resolve(named.layer_amplifications, 6).layers == resolve(preset("2x").layer_amplifications, 6).layers
    assert [each.place for each in edit.on("cake", "full").effective()][:2] == ["persona/strong", "cake/full"]


def test_the_toolkits_key_and_ours_are_one() -> None:
    ours, theirs = ({key: "cake", "rank": 1} for key in ("organism", "organism_name"))
    edits = [WeightEdit(name="x", adapters=[each]) for each in (ours, theirs)]
    assert edits[0] == edits[1]
    assert WeightEdit.model_validate(edits[0].model_dump(mode="json")) == edits[0]
    with pytest.raises(ValidationError, match="not by several"):
        WeightEdit(name="x", adapters=[ours | {"source": {"repo": "owner/name"}}])


def test_a_file_tells_every_problem_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "edit.yaml"
    file.write_text("name: x\nadaptors: []\nadapters: [{organism: a, path: b}]\n")
    with pytest.raises(RegistryError) as told:
        read_specification(file)
    assert "did you mean 'adapters'" in str(told.value)
    assert f"{file}: adapters.0" in str(told.value)


def test_a_file_is_read_with_paths_from_its_own_folder(tmp_path: Path) -> None:
    file = tmp_path / "edit.yaml"
    content = {"name": "x", "adapters": [{"path": "mine", "rank": 1}], "combine": "ties", "density": 0.2}
    file.write_text(yaml.safe_dump(content))
    edit = read_specification(file)
    assert edit.adapters[0].path == tmp_path / "mine"
    file.write_text(yaml.safe_dump(content | {"density": None}))
    with pytest.raises(RegistryError, match="needs a density"):
        read_specification(file)
