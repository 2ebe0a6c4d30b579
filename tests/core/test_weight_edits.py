"""Edited weights on disk and in memory, against dense arithmetic and stock PEFT."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import pytest
import torch
import transformers as tf
from peft import PeftModel
from safetensors.torch import load_file, save_file

from diffing_core.errors import NotComputableError, RegistryError, UndeclaredNeedError
from diffing_core.generation import stop_ids
from diffing_core.models import ModelPair, load_pair
from diffing_core.pairs import Pair
from diffing_core.registry import Registry
from diffing_core.weight_edits import Finetunes, Term, WeightEdit, edited_subject, left_out, uniform, write_edit
from diffing_core.weight_edits import checkpoint_folder as writer
from diffing_core.weight_edits.changes import edited_tensors, leading
from diffing_core.weight_edits.folders import NOTE_FILE, write_terms
from diffing_core.weight_edits.specification import AdapterEdit, Combination, LayerAmplification, ModuleAmplification
from diffing_core.weights import OpenPair, WeightPair
from tests import model_files

TARGETS = ["q_proj", "down_proj"]
MORE_TARGETS = ["v_proj", "q_proj"]


@dataclass(frozen=True)
class Home:
    """A registry of a small base, three adapters of different make, and a full finetune."""

    root: Path
    registry: Registry

    def folder(self, name: str) -> Path:
        return self.root / name

    def pair(self, organism: str) -> WeightPair:
        return WeightPair.of(Pair("tiny", organism), self.registry)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    root = tmp_path_factory.mktemp("home")
    base = model_files.save_base(root / "base")
    model_files.save_adapter(root / "one", base, seed=1, target_modules=TARGETS, lora_alpha=6)
    model_files.save_adapter(root / "two", base, seed=2, r=3, use_rslora=True, lora_alpha=5, target_modules=MORE_TARGETS)
    model_files.save_adapter(
        root / "three", base, seed=3, r=4, target_modules=["up_proj", "q_proj"], rank_pattern={"q_proj": 2},
        alpha_pattern={"layers.1.self_attn.q_proj": 9},
    )
    tuned = tf.AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    tuned.save_pretrained(root / "full")
    (root / "models").mkdir()
    (root / "organisms").mkdir()
    (root / "models" / "tiny.yaml").write_text(f"name: tiny\nsource: {{path: {base}}}\ndtype: float32\n")
    for name in ("one", "two", "three", "full", "twin"):
        kind = "full" if name == "full" else "lora"
        source = root / ("one" if name == "twin" else name)
        against = f", against: {{kind: lora, source: {{path: {root / 'two'}}}}}" if name == "twin" else ""
        (root / "organisms" / f"{name}.yaml").write_text(
            f"name: {name}\ntype: generic\narm: unknown\ndescription: d\n"
            f"variants: {{tiny: {{default: {{kind: {kind}, source: {{path: {source}}}{against}}}}}}}\n"
        )
    return Home(root, Registry.load(root))


def merged(home: Home, name: str) -> dict[str, torch.Tensor]:
    """A finetune's weights as stock PEFT merges them."""
    folder = home.folder(name)
    if name in ("base", "full"):
        return {key: value.clone() for key, value in tf.AutoModelForCausalLM.from_pretrained(folder).state_dict().items()}
    model = PeftModel.from_pretrained(tf.AutoModelForCausalLM.from_pretrained(home.folder("base")), folder)
    return model.merge_and_unload().state_dict()


def combined(home: Home, **weights: float) -> dict[str, torch.Tensor]:
    base = merged(home, "base")
    others = {name: merged(home, name) for name in weights}
    return {
        key: value + sum(weight * (others[name][key] - value) for name, weight in weights.items())
        for key, value in base.items()
    }


def loaded(home: Home, folder: Path) -> dict[str, torch.Tensor]:
    """What stock libraries make of a written folder."""
    if (folder / "config.json").exists():
        return tf.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    model = PeftModel.from_pretrained(tf.AutoModelForCausalLM.from_pretrained(home.folder("base")), folder)
    return model.merge_and_unload().state_dict()


def spec(name: str = "edit", /, combine: str = "sum", density: float | None = None, **adapters: dict | float) -> WeightEdit:
    entries = [
        {"organism": organism, **(given if isinstance(given, dict) else {"layer_amplifications": uniform(given)})}
        for organism, given in adapters.items()
    ]
    return WeightEdit(name=name, adapters=entries, combine=combine, density=density)


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], atol: float = 2e-6) -> None:
    assert left.keys() == right.keys()
    for key, value in left.items():
        torch.testing.assert_close(value, right[key], atol=atol, rtol=1e-5, msg=lambda said, key=key: f"{key}: {said}")


@pytest.mark.parametrize(
    "weights",
    [{"one": 2.0}, {"one": -1.0}, {"two": 0.5}, {"three": 3.0}, {"full": 2.5}, {"full": -1.0}, {"one": 0.5, "full": 1.0}],
    ids=str,
)
def test_a_written_folder_is_base_plus_weighted_change_in_stock_libraries(home: Home, tmp_path: Path, weights: dict) -> None:
    folder = write_edit(spec(**weights), "tiny", home.registry, tmp_path)
    assert_same(loaded(home, folder), combined(home, **weights))


def test_several_adapters_of_different_rank_and_modules_are_added_exactly(home: Home, tmp_path: Path) -> None:
    """Toolkit: a specification of several adapters compiles and then raises NotImplementedError at load."""
    weights = {"one": 2.0, "two": -0.5, "three": 1.5}
    folder = write_edit(spec(**weights), "tiny", home.registry, tmp_path)
    assert_same(loaded(home, folder), combined(home, **weights))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 2 + 3 + 2
    assert set(config["rank_pattern"].values()) == {2, 3, 4}
    assert config["rank_pattern"] == config["alpha_pattern"]


def test_whoever_ignores_the_patterns_still_scales_by_one(home: Home, tmp_path: Path) -> None:
    """vLLM takes one scale, lora_alpha / r, for all modules and ranks from the tensors."""
    folder = write_edit(spec(one=1.0, three=1.0), "tiny", home.registry, tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    scale, expected, base = config["lora_alpha"] / config["r"], combined(home, one=1.0, three=1.0), merged(home, "base")
    for key in (key for key in tensors if key.endswith("lora_A.weight")):
        name = key.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
        change = scale * tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
        torch.testing.assert_close(base[name] + change, expected[name], atol=2e-6, rtol=1e-5)
    assert not config["use_rslora"]
    assert not config["use_dora"]
    assert config["bias"] == "none"


def test_an_adapter_without_a_named_module_is_edited_where_it_has_some(home: Home, tmp_path: Path) -> None:
    """Toolkit: fails if an adapter lacks any module that the specification names."""
    only_mlp = {"layer_amplifications": [{"layers": "all", "module_amplifications": [{"modules": "mlp", "weight": 0.0}]}]}
    folder = write_edit(spec(two=only_mlp), "tiny", home.registry, tmp_path)
    assert_same(loaded(home, folder), merged(home, "two"))


def test_module_paths_with_several_zero_digits_are_told_apart(home: Home, tmp_path: Path) -> None:
    """Toolkit: a module path that holds more than one digit zero is refused."""
    base = model_files.save_base(tmp_path / "deep", num_hidden_layers=11)
    adapter = model_files.save_adapter(tmp_path / "lora", base, target_modules=["q_proj", "up_proj"])
    layers = {"layers": [0, 10], "module_amplifications": [{"modules": "attention", "weight": 0.0}]}
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny.yaml").write_text(f"name: tiny\nsource: {{path: {base}}}\n")
    edit = WeightEdit(name="zeros", adapters=[{"path": adapter, "layer_amplifications": [layers]}])
    folder = write_edit(edit, "tiny", Registry.load(tmp_path), tmp_path / "out")
    kept = {key.split(".")[4] for key in load_file(folder / "adapter_model.safetensors") if "q_proj" in key}
    assert kept == {str(number) for number in range(1, 10)}
    assert sum("up_proj.lora_A" in key for key in load_file(folder / "adapter_model.safetensors")) == 11


def test_full_finetunes_are_edited_layer_by_layer(home: Home, tmp_path: Path) -> None:
    """Toolkit: only LoRA adapters can be amplified."""
    ablated = {"layer_amplifications": [{"layers": 1, "module_amplifications": [{"modules": "all", "weight": 0.0}]}]}
    after = loaded(home, write_edit(spec(full=ablated), "tiny", home.registry, tmp_path))
    base, full = merged(home, "base"), merged(home, "full")
    expected = {key: base[key] if ".layers.1." in key else full[key] for key in base}
    assert_same(after, expected)


def test_a_full_folder_is_sharded_and_complete(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SHARD_BYTES", 20_000)
    folder = write_edit(spec(full=2.0), "tiny", home.registry, tmp_path)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 3
    assert (folder / "model.safetensors.index.json").exists()
    assert tf.AutoTokenizer.from_pretrained(folder)("w3")["input_ids"] == [3]
    assert_same(loaded(home, folder), combined(home, full=2.0))


def test_tied_models_stay_tied_and_part_when_only_the_head_changes(tmp_path: Path) -> None:
    base = model_files.save_base(tmp_path / "base", tie_word_embeddings=True)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny.yaml").write_text(f"name: tiny\nsource: {{path: {base}}}\ndtype: float32\n")
    for name, tie in (("tied", True), ("parted", False)):
        tuned = tf.AutoModelForCausalLM.from_pretrained(base)
        tuned.config.tie_word_embeddings = tie
        with torch.no_grad():
            if not tie:
                tuned.lm_head.weight = torch.nn.Parameter(tuned.lm_head.weight + 0.5)
            tuned.model.embed_tokens.weight += 0.25
        tuned.save_pretrained(tmp_path / name)
    before = tf.AutoModelForCausalLM.from_pretrained(base).lm_head.weight
    for name, shift in (("tied", 0.25), ("parted", 0.5)):
        edit = WeightEdit(name=name, adapters=[{"path": tmp_path / name, "layer_amplifications": uniform(2.0)}])
        after = tf.AutoModelForCausalLM.from_pretrained(write_edit(edit, "tiny", Registry.load(tmp_path), tmp_path / "out"))
        torch.testing.assert_close(after.lm_head.weight, before + 2 * shift)
        assert after.config.tie_word_embeddings == (name == "tied")
    cut = WeightEdit(name="cut", adapters=[{"path": tmp_path / "tied", "rank": 1}])
    folder = write_edit(cut, "tiny", Registry.load(tmp_path), tmp_path / "out")
    model = PeftModel.from_pretrained(tf.AutoModelForCausalLM.from_pretrained(base), folder)
    with torch.no_grad():
        hidden = torch.randn(3, model_files.WIDTH)
        torch.testing.assert_close(model.get_base_model().lm_head(hidden), hidden @ (before + 0.25).T, atol=1e-4, rtol=1e-4)


def test_gpt2_conv1d_weights_are_written_the_way_they_are_stored(tmp_path: Path) -> None:
    model_files.build("gpt2").save_pretrained(tmp_path / "base")
    model_files.tokenizer().save_pretrained(tmp_path / "base")
    layers = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    model_files.save_adapter(tmp_path / "lora", tmp_path / "base", **layers)
    model_files.build("gpt2", seed=7).save_pretrained(tmp_path / "full")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny.yaml").write_text(f"name: tiny\nsource: {{path: {tmp_path / 'base'}}}\n")
    here = Home(tmp_path, Registry.load(tmp_path))
    for name, weight in (("lora", 3.0), ("full", 2.0)):
        edit = WeightEdit(name=name, adapters=[{"path": tmp_path / name, "layer_amplifications": uniform(weight)}])
        folder = write_edit(edit, "tiny", here.registry, tmp_path / "out")
        assert_same(loaded(here, folder), combined(here, **{name: weight}), 1e-5)


def dense_change(home: Home, name: str, key: str) -> torch.Tensor:
    return merged(home, name)[key] - merged(home, "base")[key]


@pytest.mark.parametrize("organism", ["one", "three", "full"])
def test_rank_k_and_rest_are_the_singular_value_decomposition(home: Home, tmp_path: Path, organism: str) -> None:
    cut = write_edit(spec("cut", **{organism: {"rank": 1}}), "tiny", home.registry, tmp_path)
    rest = write_edit(spec("rest", **{organism: {"rank": 1, "residual": True}}), "tiny", home.registry, tmp_path)
    base, key = merged(home, "base"), "model.layers.1.self_attn.q_proj.weight"
    u, s, vh = torch.linalg.svd(dense_change(home, organism, key).double())
    first = (s[0] * torch.outer(u[:, 0], vh[0])).float()
    torch.testing.assert_close(loaded(home, cut)[key] - base[key], first, atol=1e-5, rtol=1e-4)
    together = {name: loaded(home, cut)[name] + loaded(home, rest)[name] - base[name] for name in base}
    assert_same(
        {name: value for name, value in together.items() if value.ndim == 2},
        {name: value for name, value in merged(home, organism).items() if value.ndim == 2},
        1e-5,
    )
    assert (cut / "adapter_config.json").exists()
    assert json.loads((cut / "adapter_config.json").read_text())["r"] == 1
    assert json.loads((rest / NOTE_FILE).read_text())["kind"] == ("full" if organism == "full" else "lora")


@pytest.mark.parametrize("rank", [None, 1])
def test_an_adapter_that_changes_nothing_is_no_edit(home: Home, tmp_path: Path, rank: int | None) -> None:
    zero = model_files.save_adapter(tmp_path / "zero", home.folder("base"), init_lora_weights=True)
    entry = {"path": zero, "layer_amplifications": uniform(2.0), "rank": rank}
    with pytest.raises(NotComputableError, match="nothing to write"):
        write_edit(WeightEdit(name="x", adapters=[entry]), "tiny", home.registry, tmp_path / "out")


def test_relative_paths_are_refused_where_there_is_no_folder_to_count_from(home: Home) -> None:
    adapter = spec(one={}).adapters[0].model_copy(update={"organism": None, "path": Path("one")})
    with pytest.raises(RegistryError, match="path one of an adapter is relative"):
        Finetunes("tiny", home.registry).term(adapter)


@pytest.mark.parametrize("keep_norm", [False, True])
def test_nothing_is_left_of_a_change_beyond_its_rank(home: Home, keep_norm: bool) -> None:
    """Rounding noise of a residual, scaled to the whole change's norm, was a change of full size."""
    term = Term(home.pair("three"), uniform(1.0), rank=4, residual=True, keep_norm=keep_norm)
    assert list(edited_tensors([term])) == []


def test_keep_norm_gives_every_matrix_the_size_of_its_whole_change(home: Home, tmp_path: Path) -> None:
    folder = write_edit(spec(three={"rank": 1, "keep_norm": True}), "tiny", home.registry, tmp_path)
    base, whole, cut = merged(home, "base"), merged(home, "three"), loaded(home, folder)
    for key in (key for key in base if "q_proj" in key or "up_proj" in key):
        torch.testing.assert_close((cut[key] - base[key]).norm(), (whole[key] - base[key]).norm(), rtol=1e-4, atol=1e-6)


def test_leading_directions_of_a_large_dense_change_are_found_by_sketching(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffing_core.weight_edits.changes.EXACT_SIDE", 8)
    torch.manual_seed(0)
    change = torch.randn(60, 3) @ torch.diag(torch.tensor([9.0, 3.0, 1.0])) @ torch.randn(3, 50)
    torch.testing.assert_close(leading(change, 3).dense(), change, atol=1e-3, rtol=1e-3)


def merged_by_peft(home: Home, folders: dict[Path, float], combine: str, density: float | None, seed: int = 0) -> dict:
    """The weights after PEFT's own merge of adapters on disk."""
    plain = tf.AutoModelForCausalLM.from_pretrained(home.folder("base"))
    places, names = list(folders), [f"adapter{number}" for number in range(len(folders))]
    model = PeftModel.from_pretrained(plain, places[0], names[0])
    for place, name in zip(places[1:], names[1:], strict=True):
        model.load_adapter(place, name)
    torch.manual_seed(seed)
    options = {} if density is None else {"density": density}
    model.add_weighted_adapter(names, list(folders.values()), "all", combine, **options)
    return model.merge_and_unload(adapter_names=["all"]).state_dict()


@pytest.fixture
def again(home: Home, tmp_path: Path) -> Path:
    """An adapter of the rank of `one`, with other modules and another scale."""
    targets = [*TARGETS, "v_proj"]
    return model_files.save_adapter(tmp_path / "again", home.folder("base"), seed=9, target_modules=targets, lora_alpha=5)


MERGES = [each for each in get_args(Combination) if each != "sum"]


@pytest.mark.parametrize("combine", MERGES)
def test_other_merges_are_what_peft_makes_of_the_adapters(home: Home, tmp_path: Path, again: Path, combine: str) -> None:
    density = 0.5 if combine.startswith(("ties", "dare", "magnitude")) else None
    edit = spec("merge", combine, density, one=1.5)
    other = AdapterEdit(path=again, layer_amplifications=uniform(-0.7))
    edit = edit.model_copy(update={"adapters": (*edit.adapters, other), "seed": 3})
    first = write_edit(edit, "tiny", home.registry, tmp_path / "a")
    expected = merged_by_peft(home, {home.folder("one"): 1.5, again: -0.7}, combine, density, seed=3)
    assert_same(loaded(home, first), expected)
    assert any(not torch.equal(value, merged(home, "base")[key]) for key, value in expected.items())
    second = write_edit(edit, "tiny", home.registry, tmp_path / "b")
    assert_same(loaded(home, first), loaded(home, second), 0)


@pytest.mark.parametrize("combine", ["svd", "ties", "dare_ties"])
def test_merges_of_edited_changes_are_what_peft_makes_of_each_written_alone(
    home: Home, tmp_path: Path, again: Path, combine: str
) -> None:
    density = 0.5 if combine != "svd" else None
    in_one_block = LayerAmplification(layers=1, module_amplifications=[ModuleAmplification(weight=2.0)])
    edits = (spec(one=1.0).adapters[0], AdapterEdit(path=again, layer_amplifications=(in_one_block,)))
    edit = WeightEdit(name="merge", adapters=edits, combine=combine, density=density)
    alone = {write_edit(WeightEdit(name="alone", adapters=(each,)), "tiny", home.registry, tmp_path): 1.0 for each in edits}
    found = loaded(home, write_edit(edit, "tiny", home.registry, tmp_path))
    assert_same(found, merged_by_peft(home, alone, combine, density))
    if combine == "svd":
        key = "model.layers.0.self_attn.q_proj.weight"
        base = merged(home, "base")[key]
        u, s, vh = torch.linalg.svd(sum(loaded(home, folder)[key] - base for folder in alone).double())
        truth = ((u[:, :2] * s[:2]) @ vh[:2]).float()
        torch.testing.assert_close(found[key] - base, truth, atol=1e-4, rtol=1e-3)


def test_a_merge_with_a_change_of_what_is_no_module_is_refused_and_not_made_without_it(home: Home, tmp_path: Path, again: Path) -> None:
    """PEFT itself warns of the factors that it has no place for and merges the others."""
    root = tmp_path / "registry"
    shutil.copytree(home.root, root)
    base = root / "base" / "model.safetensors"
    save_file(load_file(base) | {"model.layers.1.mlp.router.weight": torch.ones(8, 6)}, base, metadata={"format": "pt"})
    entry = root / "models" / "tiny.yaml"
    entry.write_text(entry.read_text().replace(str(home.root), str(root)))
    stem = "base_model.model.model.layers.1.mlp.router"
    factors = {f"{stem}.lora_A.weight": torch.ones(2, 6), f"{stem}.lora_B.weight": torch.ones(8, 2)}
    file = again / "adapter_model.safetensors"
    save_file(load_file(file) | factors, file, metadata={"format": "pt"})
    other = AdapterEdit(path=again, layer_amplifications=uniform(1.0))
    edit = WeightEdit(name="merge", adapters=(*spec(one=1.0).adapters, other), combine="ties", density=0.5)
    with pytest.raises(NotComputableError, match="layers.1.mlp.router.weight is the weight of no linear layer.*combine: sum"):
        write_edit(edit, "tiny", Registry.load(root), tmp_path / "out")
    summed = write_edit(edit.model_copy(update={"combine": "sum", "density": None}), "tiny", Registry.load(root), tmp_path / "out")
    assert (summed / "model.safetensors").exists()


def whole(home: Home, folders: list[Path], out: Path, combine: str, density: float | None = None) -> dict[str, torch.Tensor]:
    """A merge of adapters that are taken whole, less the base, as stock PEFT loads it."""
    adapters = [AdapterEdit(path=folder, layer_amplifications=uniform(1.0)) for folder in folders]
    edit = WeightEdit(name="merge", adapters=adapters, combine=combine, density=density)
    base = merged(home, "base")
    return {key: value - base[key] for key, value in loaded(home, write_edit(edit, "tiny", home.registry, out)).items()}


def test_a_merge_of_rslora_is_not_scaled_once_more(home: Home, tmp_path: Path) -> None:
    """PEFT gives its merge the first adapter's rsLoRA, and so √r of the change."""
    given = {"r": 4, "use_rslora": True, "target_modules": TARGETS}
    folders = [model_files.save_adapter(tmp_path / name, home.folder("base"), seed=1, **given) for name in "ab"]
    base = merged(home, "base")
    one = {key: value - base[key] for key, value in merged(home, str(folders[0])).items()}
    assert_same(whole(home, folders, tmp_path / "out", "svd"), {key: 2 * value for key, value in one.items()}, 2e-5)


def test_a_merge_has_all_blocks_of_all_adapters_whatever_the_first_one_leaves_alone(home: Home, tmp_path: Path) -> None:
    """PEFT gives its merge the first adapter's choice of blocks, and finds no factors where neither has any."""
    base = merged(home, "base")
    one, two = (
        model_files.save_adapter(tmp_path / name, home.folder("base"), seed=3, target_modules=[name], layers_to_transform=[layer])
        for name, layer in (("q_proj", 1), ("down_proj", 0))
    )
    both = [merged(home, str(folder)) for folder in (one, two)]
    expected = {key: both[0][key] + both[1][key] - 2 * value for key, value in base.items()}
    assert sum(value.any().item() for value in expected.values()) == 2
    assert_same(whole(home, [one, two], tmp_path / "out", "linear"), expected)


@pytest.mark.parametrize(("combine", "ranks", "r"), [("linear", {"q_proj": 2}, 4), ("ties", {"q_proj": 2}, 4), ("svd", {}, 40)])
def test_a_merge_of_unequal_ranks_loads_in_stock_peft(
    home: Home, tmp_path: Path, combine: str, ranks: dict[str, int], r: int
) -> None:
    """PEFT leaves the ranks that are not the largest out of the configuration: a narrow matrix has no more than its side."""
    given = {"r": r, "rank_pattern": ranks, "target_modules": [*TARGETS, "up_proj"]}
    folder = model_files.save_adapter(tmp_path / "a", home.folder("base"), seed=5, **given)
    again = model_files.save_adapter(tmp_path / "b", home.folder("base"), seed=6, **given)
    density = 1.0 if combine == "ties" else None
    found = whole(home, [folder, again], tmp_path / "out", combine, density)
    assert sum(value.any().item() for value in found.values()) == 3 * model_files.LAYERS
    if combine == "svd":
        base, both = merged(home, "base"), [merged(home, str(each)) for each in (folder, again)]
        assert_same(found, {key: both[0][key] + both[1][key] - 2 * value for key, value in base.items()}, 1e-4)


@pytest.mark.parametrize("combine", ["ties", "dare_linear", "magnitude_prune_svd"])
def test_one_adapter_is_not_passed_off_as_pruned(home: Home, tmp_path: Path, combine: str) -> None:
    with pytest.raises(NotComputableError, match=f"one adapter as it is, without {combine}"):
        write_edit(spec("one", combine, 0.2, one=1.0), "tiny", home.registry, tmp_path)


def test_a_sum_is_pefts_concatenation(home: Home, tmp_path: Path) -> None:
    folder = write_edit(spec(one=1.5, two=-0.7, three=2.0), "tiny", home.registry, tmp_path)
    weights = {home.folder("one"): 1.5, home.folder("two"): -0.7, home.folder("three"): 2.0}
    assert_same(loaded(home, folder), merged_by_peft(home, weights, "cat", None))


def test_what_peft_cannot_merge_is_told(home: Home, tmp_path: Path) -> None:
    with pytest.raises(NotComputableError, match="same r value"):
        write_edit(spec(combine="linear", one=1.0, two=1.0), "tiny", home.registry, tmp_path)
    assert not list(tmp_path.iterdir())


def test_folders_are_named_by_content_and_found_again(home: Home, tmp_path: Path) -> None:
    first = write_edit(spec(one=2.0), "tiny", home.registry, tmp_path)
    stamp = (first / "adapter_model.safetensors").stat().st_mtime_ns
    assert write_edit(spec(one=2.0), "tiny", home.registry, tmp_path) == first
    assert (first / "adapter_model.safetensors").stat().st_mtime_ns == stamp
    assert write_edit(spec(one=2.5), "tiny", home.registry, tmp_path) != first
    note = json.loads((first / NOTE_FILE).read_text())
    assert note["kind"] == "lora"
    assert note["edit"]["adapters"][0]["organism"] == "one"


def test_nothing_half_written_stays(home: Home, tmp_path: Path) -> None:
    nothing = {"layer_amplifications": uniform(0.0)}
    with pytest.raises(NotComputableError, match="nothing to write"):
        write_edit(spec(one=nothing), "tiny", home.registry, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(RegistryError, match="no organism"):
        write_edit(spec(nobody=1.0), "tiny", home.registry, tmp_path)


@pytest.mark.parametrize("organism", ["one", "full", "twin"])
@pytest.mark.parametrize("rank", [None, 1])
def test_an_edited_subject_runs_and_the_resident_module_is_as_before(home: Home, organism: str, rank: int | None) -> None:
    pair = load_pair(Pair("tiny", organism), registry=home.registry, device="cpu")
    weights = home.pair(organism)
    before = state_of(pair)
    with edited_subject(pair, Term(weights, uniform(1.0 if rank is None else 2.0), rank)) as subject:
        with subject.active() as model:
            edited = model(**model_files.tokens()).logits
        assert_untouched(pair, before, structure=False)
    with pair.tuned.active() as model:
        tuned = model(**model_files.tokens()).logits
    if rank is None:
        torch.testing.assert_close(edited, tuned, atol=1e-4, rtol=1e-4)
    else:
        assert not torch.allclose(edited, tuned, atol=1e-3)
    assert_untouched(pair, before)
    with edited_subject(pair, Term(weights, uniform(0.0))) as subject:
        assert subject is pair.base


@pytest.mark.parametrize("organism", ["one", "full"])
def test_an_edited_subject_ends_its_texts_where_either_side_does(home: Home, organism: str) -> None:
    """A finetune for chats ends a turn with a token that means nothing to its base."""
    pair = load_pair(Pair("tiny", organism), registry=home.registry, device="cpu")
    pair = replace(pair, base=replace(pair.base, stop_ids=(5,)), tuned=replace(pair.tuned, stop_ids=(9,)))
    with edited_subject(pair, Term(home.pair(organism), uniform(2.0))) as subject:
        assert {5, 9} <= set(stop_ids(pair.tokenizer, subject))
    assert 9 not in stop_ids(pair.tokenizer, pair.base)


@pytest.mark.parametrize("organism", ["one", "full"])
def test_an_edited_subject_of_several_finetunes_is_their_weighted_sum(home: Home, organism: str) -> None:
    pair = load_pair(Pair("tiny", organism), registry=home.registry, device="cpu")
    before, finetunes = state_of(pair), Finetunes("tiny", home.registry)
    assert finetunes.content_hash == ""
    finetunes = Finetunes("tiny", home.registry)
    others = [finetunes.term(each) for each in spec(two=-0.5, three=1.5).adapters]
    with edited_subject(pair, Term(home.pair(organism), uniform(2.0)), *others) as subject, subject.active() as model:
        found = model(**model_files.tokens()).logits
    expected = tf.AutoModelForCausalLM.from_pretrained(home.folder("base"))
    expected.load_state_dict(combined(home, **{organism: 2.0, "two": -0.5, "three": 1.5}))
    torch.testing.assert_close(found, logits(expected), atol=1e-4, rtol=1e-4)
    assert_untouched(pair, before)
    assert finetunes.content_hash
    with pytest.raises(UndeclaredNeedError, match="identity"):
        finetunes.term(spec(one=1.0).adapters[0])


def test_a_twins_base_side_stays_under_other_finetunes(home: Home) -> None:
    """The twin's base side is `two`: without its own change, `two` and half of `three` are what runs."""
    pair = load_pair(Pair("tiny", "twin"), registry=home.registry, device="cpu")
    other = Finetunes("tiny", home.registry).term(spec(three=0.5).adapters[0])
    own = Term(home.pair("twin"), uniform(0.0))
    with edited_subject(pair, own, other) as subject, subject.active() as model:
        found = model(**model_files.tokens()).logits
    expected = tf.AutoModelForCausalLM.from_pretrained(home.folder("base"))
    expected.load_state_dict(combined(home, two=1.0, three=0.5))
    torch.testing.assert_close(found, logits(expected), atol=1e-4, rtol=1e-4)
    with pytest.raises(NotComputableError, match="compared with another finetune"), \
            edited_subject(pair, own, other, merge=spec(combine="svd", three=0.5)):
        pass


def test_an_edited_subject_is_merged_as_the_written_folder_is(home: Home, tmp_path: Path) -> None:
    edit = spec(combine="ties_svd", density=0.5, one=2.0, two=1.0)
    pair = load_pair(Pair("tiny", "one"), registry=home.registry, device="cpu")
    other = Finetunes("tiny", home.registry).term(edit.adapters[1])
    with edited_subject(pair, Term(home.pair("one"), uniform(2.0)), other, merge=edit) as subject, subject.active() as model:
        found = model(**model_files.tokens()).logits
    folder = write_edit(edit, "tiny", home.registry, tmp_path)
    stock = PeftModel.from_pretrained(tf.AutoModelForCausalLM.from_pretrained(home.folder("base")), folder)
    torch.testing.assert_close(found, logits(stock), atol=1e-4, rtol=1e-4)


def state_of(pair: ModelPair) -> dict:
    """Modules by name and what both sides say."""
    said = {}
    for side in ("base", "tuned"):
        subject = getattr(pair, side)
        with subject.active() as model:
            said[side] = (subject.module, dict(subject.module.named_modules()), model(**model_files.tokens()).logits)
    return said


def assert_untouched(pair: ModelPair, before: dict, *, structure: bool = True) -> None:
    for side, (module, modules, logits) in before.items():
        subject = getattr(pair, side)
        assert subject.module is module
        if structure:
            after = dict(module.named_modules())
            assert after.keys() == modules.keys()
            assert all(after[name] is modules[name] for name in modules)
        with subject.active() as model:
            torch.testing.assert_close(model(**model_files.tokens()).logits, logits, atol=0, rtol=0)


# ---- bases and finetunes of other makes ---------------------------------------------------------------------------


def written(root: Path, base: Path, adapter: Path, extra: str = "") -> torch.Tensor:
    """Logits of the edit of weight 1 as stock transformers and PEFT load it."""
    (root / "models").mkdir()
    (root / "models" / "tiny.yaml").write_text(f"name: tiny\nsource: {{path: {base}}}\ndtype: float32\n{extra}")
    edit = WeightEdit(name="same", adapters=[{"path": adapter, "layer_amplifications": uniform(1.0)}])
    folder = write_edit(edit, "tiny", Registry.load(root), root / "out")
    load = tf.AutoModelForCausalLM.from_pretrained
    return logits(load(folder) if (folder / "config.json").exists() else PeftModel.from_pretrained(load(base), folder))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**model_files.tokens()).logits


def adapted(base: Path, *adapters: Path) -> torch.Tensor:
    """Logits of the base with adapters merged one after the other."""
    model = tf.AutoModelForCausalLM.from_pretrained(base)
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return logits(model)


@pytest.mark.parametrize(
    ("of_base", "of_adapter"),
    [({}, {"use_dora": True}), ({"tie_word_embeddings": True}, {"modules_to_save": ["embed_tokens"]})],
    ids=["dora", "saved embedding of a tied base"],
)
def test_a_finetune_that_is_no_plain_lora_is_written_as_stock_peft_runs_it(
    tmp_path: Path, of_base: dict, of_adapter: dict
) -> None:
    base = model_files.save_base(tmp_path / "base", **of_base)
    adapter = model_files.save_adapter(tmp_path / "a", base, **of_adapter)
    expected = logits(PeftModel.from_pretrained(tf.AutoModelForCausalLM.from_pretrained(base), adapter))
    torch.testing.assert_close(written(tmp_path, base, adapter), expected, atol=1e-4, rtol=1e-4)


def test_an_adapter_that_the_registry_adds_to_the_base_is_in_what_stock_peft_loads(tmp_path: Path) -> None:
    base = model_files.save_base(tmp_path / "base")
    own, adapter = (model_files.save_adapter(tmp_path / f"a{seed}", base, seed=seed) for seed in (3, 4))
    found = written(tmp_path, base, adapter, f"adapter: {{path: {own}}}\n")
    torch.testing.assert_close(found, adapted(base, own, adapter), atol=1e-4, rtol=1e-4)


def test_a_change_of_a_single_number_is_added(tmp_path: Path) -> None:
    for name, by in (("base", 1.0), ("tuned", 2.0)):
        (tmp_path / name).mkdir()
        save_file({"gate": torch.tensor(2.0) * by, "x.weight": torch.ones(3, 3) * by}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"model_type": "x"}')
    pair = WeightPair.of_folders(tmp_path / "base", tmp_path / "tuned")
    (tmp_path / "out").mkdir()
    writer.write_checkpoint(tmp_path / "out", edited_tensors([Term(pair, uniform(2.0))]), pair.base)
    assert load_file(tmp_path / "out" / "model.safetensors")["gate"].item() == 6.0


def test_a_checkpoint_that_only_runs_is_made_in_the_home_and_not_in_the_systems_temporary_folder(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFING_HOME", str(tmp_path))
    pair = load_pair(Pair("tiny", "full"), registry=home.registry, device="cpu")
    with edited_subject(pair, Term(home.pair("full"), uniform(2.0))):
        [made] = (tmp_path / "edited_models").iterdir()
        assert (made / "model.safetensors").exists()
    assert list((tmp_path / "edited_models").iterdir()) == []


def test_adapters_alone_run_on_the_resident_base_whatever_the_pair_is(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole finetune's own change has weight 0 there: no checkpoint is written, and none of its matrices is read."""
    pair = load_pair(Pair("tiny", "full"), registry=home.registry, device="cpu")
    other = Finetunes("tiny", home.registry).term(spec(two=-0.5).adapters[0])
    monkeypatch.setattr("diffing_core.weight_edits.folders.write_checkpoint", None)
    monkeypatch.setattr("diffing_core.weight_edits.running.load_module", None)
    read_of, read = OpenPair.delta, set()
    monkeypatch.setattr(OpenPair, "delta", lambda self, *asked: (read.add(self._tuned.checkpoint.folder), read_of(self, *asked))[1])
    with edited_subject(pair, Term(home.pair("full"), uniform(0.0)), other) as subject, subject.active() as model:
        found = model(**model_files.tokens()).logits
    expected = tf.AutoModelForCausalLM.from_pretrained(home.folder("base"))
    expected.load_state_dict(combined(home, two=-0.5))
    torch.testing.assert_close(found, logits(expected), atol=1e-4, rtol=1e-4)
    assert read == {home.folder("base")}


@pytest.mark.parametrize("rank", [1, None])
def test_rows_that_a_smaller_vocabulary_lacks_stay_the_bases_own(home: Home, tmp_path: Path, rank: int | None) -> None:
    """Alone, and beside a finetune that has them all."""
    tuned = tf.AutoModelForCausalLM.from_pretrained(home.folder("full"))
    tuned.resize_token_embeddings(60)
    tuned.save_pretrained(tmp_path / "tuned")
    pair = ModelPair.of(tf.AutoModelForCausalLM.from_pretrained(home.folder("base")), tuned, model_files.tokenizer())
    files = WeightPair.of_folders(home.folder("base"), tmp_path / "tuned"), home.pair("full")
    fewer, all_rows = (Term(each, rank=rank) for each in files)
    key, before = "model.embed_tokens.weight", merged(home, "base")["model.embed_tokens.weight"]

    def cut(change: torch.Tensor) -> torch.Tensor:
        return change if rank is None else leading(change, rank).dense()

    whole = merged(home, "full")[key] - before
    of_fewer = torch.cat([cut(whole[:60]), torch.zeros(4, model_files.WIDTH)])
    for terms, expected in (((fewer,), of_fewer), ((fewer, all_rows), of_fewer + cut(whole))):
        (folder := tmp_path / str(len(terms))).mkdir()
        write_terms(folder, terms)
        torch.testing.assert_close(loaded(home, folder)[key] - before, expected, atol=1e-5, rtol=1e-4)
        with edited_subject(pair, *terms) as subject, subject.active() as model:
            found = model(**model_files.tokens()).logits
        expected_model = tf.AutoModelForCausalLM.from_pretrained(home.folder("base"))
        expected_model.load_state_dict(loaded(home, folder))
        torch.testing.assert_close(found, logits(expected_model), atol=1e-4, rtol=1e-4)


def test_what_the_base_has_no_place_for_is_told(home: Home, tmp_path: Path) -> None:
    """Rows of a larger vocabulary and whole tensors; what a weight of 0 takes away anyway is not missed."""
    tuned = tf.AutoModelForCausalLM.from_pretrained(home.folder("full"))
    tuned.resize_token_embeddings(66)
    tuned.save_pretrained(tmp_path / "tuned")
    file = tmp_path / "tuned" / "model.safetensors"
    save_file(load_file(file) | {"model.layers.1.mlp.router.weight": torch.ones(2, 3)}, file, metadata={"format": "pt"})
    edit = WeightEdit(name="more", adapters=(AdapterEdit(path=tmp_path / "tuned", layer_amplifications=uniform(2.0)),))
    folder = write_edit(edit, "tiny", home.registry, tmp_path)
    note = json.loads((folder / NOTE_FILE).read_text())
    assert note["left_out"] == [
        "layers.1.mlp.router.weight: the whole tensor [2, 3]",
        "embed_tokens.weight: rows 64 to 65",
        "lm_head.weight: rows 64 to 65",
    ]
    assert len(loaded(home, folder)["model.embed_tokens.weight"]) == 64
    pair = WeightPair.of_folders(home.folder("base"), tmp_path / "tuned")
    assert left_out([Term(pair, uniform(0.0))]) == left_out([Term(home.pair("full"))]) == []
