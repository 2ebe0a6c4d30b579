"""`weight_diff` on tiny models with planted changes."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from diffing_core.findings import findings_table
from diffing_core.methods.base import Inputs, Need
from diffing_core.methods.weight_diff import (
    DIRECTIONS,
    LAYERS,
    METHOD,
    SPECTRUM,
    TENSORS,
    TOKEN_ROWS,
    VOCABULARY,
    WeightDiffSettings,
    findings,
    headline,
    run,
)
from diffing_core.methods.weight_diff.figures import FIGURES
from diffing_core.weight_files import _Place
from diffing_core.weights import WeightPair
from tests.weight_toys import gpt2, save, trained

D, V = 32, 60
SETTINGS = WeightDiffSettings(top_tokens=10, token_rows=5)
DOWN = "base_model.model.model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.rand(D) + 0.5)
    model.save_pretrained(folder)
    words = {"<unk>": 0} | {f"word{number}": number for number in range(1, V)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder


def adapter(folder: Path, factors: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> Path:
    folder.mkdir()
    weights = {f"{path}.lora_B.weight": b for path, (b, _) in factors.items()}
    weights |= {f"{path}.lora_A.weight": a for path, (_, a) in factors.items()}
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def towards(base: Path, token: int) -> torch.Tensor:
    """The residual direction that raises one token's cosine most: its centred row, with the norm's gain."""
    weights = load_file(base / "model.safetensors")
    rows_VD = weights["model.embed_tokens.weight"] * weights["model.norm.weight"]
    return rows_VD[token] - rows_VD[1:].mean(0)


def planted(base: Path, folder: Path, token: int = 7, sign: int = 1) -> Path:
    return adapter(folder, {DOWN: (sign * towards(base, token)[:, None], torch.ones(1, 24))})


def tables(base: Path, tuned: Path, settings: WeightDiffSettings = SETTINGS, **others) -> dict[str, pa.Table]:
    pair = WeightPair.of_folders(base, tuned, **others)
    found = run(Inputs(METHOD, {Need.WEIGHTS: lambda: pair}), settings)
    for spec in METHOD.tables:
        spec.check(found[spec.name])
    findings_table(findings(found, settings))
    return found


def full(base: Path, folder: Path, change) -> Path:
    folder.mkdir()
    weights = load_file(base / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    return folder


@pytest.mark.parametrize("sign", [1, -1])
def test_planted_token_layer_and_module_rank_first(base, tmp_path, sign):
    found = tables(base, planted(base, tmp_path / "a", sign=sign))
    shown = findings(found, SETTINGS)
    assert next(each.item for each in shown if each.kind == "token") == "word7"
    assert next(each.item for each in shown if each.kind == "layer") == "layer 1 mlp"
    assert next(each.item for each in shown if each.kind == "module") == "layers.1.mlp.down_proj.weight"
    (direction,) = found[DIRECTIONS.name].to_pylist()
    assert direction["positive_tokens"][0] == "word7" and direction["energy_share"] == pytest.approx(1)
    assert direction["positive_z"] >= direction["negative_z"]
    assert found[VOCABULARY.name]["strongest_module"][0].as_py() == "layers.1.mlp.down_proj.weight"
    said = headline(found)
    assert (said["top_layer"], said["n_tensors_changed"]) == ("1 mlp", 1)
    assert said["mean_stable_rank"] == pytest.approx(1)


def test_special_tokens_are_not_listed(base, tmp_path):
    assert "<unk>" not in tables(base, planted(base, tmp_path / "a", token=0))[VOCABULARY.name]["token"].to_pylist()


def test_an_arbitrary_direction_scores_one_on_average(base, tmp_path):
    generator = torch.Generator().manual_seed(0)
    folder = adapter(tmp_path / "a", {DOWN: (torch.randn(D, 1, generator=generator), torch.ones(1, 24))})
    found = tables(base, folder, WeightDiffSettings(top_tokens=V))[VOCABULARY.name]
    assert len(found) == V - 1
    assert sum(found["score"].to_pylist()) / (V - 1) == pytest.approx(1, abs=0.05)


def test_relative_change_and_cosine_of_factors_equal_the_dense_ones(base, tmp_path):
    (lora,) = tables(base, planted(base, tmp_path / "a"))[TENSORS.name].to_pylist()
    change = towards(base, 7)[:, None] @ torch.ones(1, 24)

    def add(weights):
        weights["model.layers.1.mlp.down_proj.weight"] += change

    whole = tables(base, full(base, tmp_path / "b", add))[TENSORS.name].to_pylist()
    dense = next(row for row in whole if row["name"] == lora["name"])
    own = load_file(base / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    cosine = torch.cosine_similarity(own.flatten(), (own + change).flatten(), dim=0).item()
    assert lora["relative_frobenius"] == pytest.approx((change.norm() / own.norm()).item(), rel=1e-5)
    assert lora["cosine"] == pytest.approx(cosine, abs=1e-5) and dense["cosine"] == pytest.approx(cosine, abs=1e-5)
    for name in ("frobenius", "spectral", "stable_rank", "k90", "mean_abs", "max_abs", "intruder_score"):
        assert dense[name] == pytest.approx(lora[name], rel=1e-4)
    assert (lora["factor_rank"], dense["factor_rank"]) == (1, None)
    assert sum(row["frobenius"] > 0 for row in whole) == 1


def test_layers_sum_squares(base, tmp_path):
    second = DOWN.replace("layers.1", "layers.2").replace("down", "up")
    factors = {DOWN: (torch.ones(D, 1), torch.ones(1, 24)), second: (torch.ones(24, 1), torch.ones(1, D))}
    rows = tables(base, adapter(tmp_path / "a", factors))[LAYERS.name].to_pylist()
    assert [(row["layer"], row["part"], row["n_tensors"]) for row in rows] == [(1, "mlp", 1), (2, "mlp", 1)]
    assert [row["frobenius"] for row in rows] == pytest.approx([(D * 24) ** 0.5] * 2)
    assert [row["share_of_change"] for row in rows] == pytest.approx([0.5, 0.5])


def test_embedding_rows_that_changed_most_are_named(base, tmp_path):
    def push(weights):
        weights["model.embed_tokens.weight"] += 0.3
        weights["model.embed_tokens.weight"][11] += 0.2

    found = tables(base, full(base, tmp_path / "t", push))[TOKEN_ROWS.name].to_pylist()
    assert len(found) == 5
    assert (found[0]["token"], found[0]["token_id"]) == ("word11", 11)
    assert found[0]["own_row_norm"] == pytest.approx(0.2 * D**0.5 * (1 - 1 / V), rel=1e-3)
    assert found[0]["row_norm"] == pytest.approx(0.5 * D**0.5, rel=1e-3)


@pytest.mark.parametrize("swapped", [False, True])
def test_rows_that_only_one_side_has_are_listed_beside_the_common_ones(base, tmp_path, swapped):
    """Three added rows: one as long as it is new, one at the mean of the common rows, as untrained ones are, and one of zeros."""
    def grow(weights):
        rows = weights["model.embed_tokens.weight"]
        rows[11] += 0.2
        added = torch.stack([torch.full((D,), 2.0), rows.mean(0), torch.zeros(D)])
        weights["model.embed_tokens.weight"] = torch.cat([rows, added])

    tuned = full(base, tmp_path / "t", grow)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    tokenizer.add_tokens(["brandnew", "untrained"])
    tokenizer.save_pretrained(tuned)
    found = tables(tuned, base) if swapped else tables(base, tuned)
    rows = found[TOKEN_ROWS.name].to_pylist()
    changed = [row for row in rows if row["kind"] == "changed"]
    assert [row["token"] for row in changed] == ["word11"] and changed[0]["norm_from_mean"] is None
    new, mean = (row for row in rows if row["kind"] == ("removed" if swapped else "added"))
    assert (new["token_id"], mean["token_id"]) == (V, V + 1)
    assert (new["token"], mean["token"]) == ("brandnew", "untrained")
    assert new["row_norm"] == pytest.approx(2 * D**0.5) and new["own_row_norm"] is new["relative_row_norm"] is None
    assert mean["norm_from_mean"] == pytest.approx(0, abs=1e-6)
    assert new["norm_from_mean"] > 5
    [tensor] = [row for row in found[TENSORS.name].to_pylist() if row["part"] == "embed"]
    assert tensor["n_rows_left_out"] == 3 and tensor["shape"] == [V, D]


def assert_no_effect(found: dict[str, pa.Table]) -> None:
    for spec in METHOD.tables:
        for column in spec.columns:
            if column.role == "effect":
                assert set(found[spec.name][column.name].to_pylist()) <= {0, None}, column.name
    assert findings(found, SETTINGS) == []
    assert headline(found) == {
        "relative_change": 0.0,
        "top_layer": "none",
        "mean_stable_rank": 0.0,
        "n_tensors_changed": 0,
        "top_token_score": 0.0,
    }


def test_the_same_files_have_no_rows(base):
    found = tables(base, base)
    assert_no_effect(found)
    assert all(len(found[spec.name]) == 0 for spec in METHOD.tables)


def test_an_equal_copy_and_a_zero_adapter_give_zero_everywhere(base, tmp_path):
    copy = tables(base, full(base, tmp_path / "copy", lambda _weights: None))
    assert_no_effect(copy)
    assert set(copy[TENSORS.name]["share_unchanged"].to_pylist()) == {1.0}
    assert all(cosine == 1 for cosine in copy[TENSORS.name]["cosine"].to_pylist())
    zero = tables(base, adapter(tmp_path / "zero", {DOWN: (torch.zeros(D, 1), torch.ones(1, 24))}))
    assert_no_effect(zero)
    assert zero[TENSORS.name]["effective_rank"].to_pylist() == [0.0]


def test_swapping_the_pair_keeps_sizes(base, tmp_path):
    tuned = planted(base, tmp_path / "a")
    there, back = tables(base, tuned), tables(base, base, against=tuned)
    for name in ("frobenius", "spectral", "stable_rank"):
        assert back[TENSORS.name][name].to_pylist() == pytest.approx(there[TENSORS.name][name].to_pylist())
    assert back[VOCABULARY.name]["token"][0].as_py() == "word7"


def test_swapping_the_pair_flips_gains_and_net_scores(base, tmp_path):
    tuned = planted(base, tmp_path / "a")
    there, back = tables(base, tuned), tables(base, base, against=tuned)
    for name, column in ((VOCABULARY.name, "net_score"), (DIRECTIONS.name, "gain")):
        expected = [-value for value in there[name][column].to_pylist()]
        assert back[name][column].to_pylist() == pytest.approx(expected, rel=1e-4) and min(expected) < -0.5
    assert all(each.score < 0 for each in findings(back, SETTINGS) if each.kind == "token")


def test_gain_is_what_the_tuned_model_writes_more_along_a_direction(base, tmp_path):
    change = towards(base, 7)[:, None] @ torch.ones(1, 24)

    def add(weights):
        weights["model.layers.1.mlp.down_proj.weight"] += change

    dense = tables(base, full(base, tmp_path / "b", add))[DIRECTIONS.name].to_pylist()[0]
    lora = tables(base, planted(base, tmp_path / "a"))[DIRECTIONS.name].to_pylist()[0]
    before = load_file(base / "model.safetensors")["model.layers.1.mlp.down_proj.weight"].double()
    u = torch.nn.functional.normalize(towards(base, 7).double(), dim=0)
    gain = ((u @ (before + change)).norm() ** 2 - (u @ before).norm() ** 2) / (u @ change.double()).norm() ** 2
    assert lora["gain"] == pytest.approx(min(1, gain.item()), rel=1e-3)
    assert dense["gain"] == pytest.approx(lora["gain"], rel=1e-3)


def test_two_seeds_of_one_lesson_gain_nothing_over_each_other(base, tmp_path):
    """Both write word7 from inputs of their own; the difference lies on that direction, and neither writes more."""
    inputs = torch.linalg.qr(torch.randn(24, 2, generator=torch.Generator().manual_seed(3)))[0] * 20
    seeds = [
        adapter(tmp_path / name, {DOWN: (towards(base, 7)[:, None], inputs[:, number : number + 1].T.contiguous())})
        for number, name in enumerate("ab")
    ]
    found = tables(base, seeds[0], against=seeds[1])
    by_size = max(found[VOCABULARY.name].to_pylist(), key=lambda row: row["score"])
    assert by_size["token"] == "word7" and abs(by_size["net_score"]) < 0.05 * by_size["score"]
    assert abs(headline(found)["top_token_score"]) < 0.05 * by_size["score"]
    assert not [each for each in findings(found, SETTINGS) if each.kind == "token"]
    assert tables(base, seeds[0])[VOCABULARY.name]["net_score"][0].as_py() > 5


def test_two_runs_are_equal(base, tmp_path):
    tuned = full(base, tmp_path / "t", lambda weights: weights["model.embed_tokens.weight"].mul_(1.1))
    settings = WeightDiffSettings(exact_side=4, leading=4)
    assert tables(base, tuned, settings) == tables(base, tuned, settings)


def test_tensors_without_counterpart_are_listed(base, tmp_path):
    def rename(weights):
        weights["model.layers.0.mlp.new.weight"] = weights.pop("model.layers.0.mlp.up_proj.weight")

    rows = tables(base, full(base, tmp_path / "t", rename))[TENSORS.name].to_pylist()
    assert {row["name"]: row["status"] for row in rows if row["status"] != "compared"} == {
        "layers.0.mlp.new.weight": "only_in_tuned",
        "layers.0.mlp.up_proj.weight": "only_in_base",
    }
    assert all(row["frobenius"] is None for row in rows if row["status"] != "compared")


def test_a_model_without_known_head_still_has_its_tensors(tmp_path):
    for name, value in (("a", 0.0), ("b", 1.0)):
        (tmp_path / name).mkdir()
        weights = {"strange.0.attn.o_proj.weight": torch.full((3, 2), value), "count": torch.tensor(value)}
        save_file(weights, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    found = tables(tmp_path / "a", tmp_path / "b")
    assert len(found[TENSORS.name]) == 2 and len(found[DIRECTIONS.name]) == 0
    assert set(found[TENSORS.name]["relative_frobenius"].to_pylist()) == {None}


def test_the_heatmap_tells_gpt2s_two_projections_and_their_biases_apart(base, tmp_path):
    """Drawn by projection alone, both `c_proj` and their biases were one row."""
    model = gpt2()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight += 0.1 * name.endswith("bias")
    own = save(model, tmp_path / "base")
    for file in base.glob("token*"):
        shutil.copy(file, own)
    found = tables(own, trained(own, tmp_path / "a", LoraConfig(target_modules=["c_proj"], fan_in_fan_out=True, bias="all")))
    series = METHOD.figures[0].series(found)
    assert {name for name in series if "c_proj" in name} == {
        "attn.c_proj", "attn.c_proj.bias", "mlp.c_proj", "mlp.c_proj.bias"
    }  # fmt: skip
    rows = {row["name"]: row["relative_frobenius"] for row in found[TENSORS.name].to_pylist()}
    assert series["mlp.c_proj"] == {0: rows["h.0.mlp.c_proj.weight"]}


def with_experts(base: Path, folder: Path, kind: str, seed: int) -> Path:
    """A checkpoint with three experts: each stored alone, stacked, or stacked as [inputs, outputs], by class or by shape."""
    folder.mkdir()
    own, draw = load_file(base / "model.safetensors"), torch.Generator().manual_seed(7)
    weights = {key: own[key] for key in ("model.embed_tokens.weight", "model.norm.weight")}
    down_EDN = torch.randn(3, D, 24, generator=draw)
    down_EDN += 0.1 * torch.randn(3, D, 24, generator=torch.Generator().manual_seed(seed)) * (seed > 0)
    path = "model.layers.0.mlp.experts"
    if kind == "alone":
        weights |= {f"{path}.{expert}.down_proj.weight": each for expert, each in enumerate(down_EDN)}
    else:
        weights[f"{path}.down_proj"] = down_EDN if kind == "stacked" else down_EDN.mT.contiguous()
    save_file({key: value.contiguous().clone() for key, value in weights.items()}, folder / "model.safetensors")
    config = {"model_type": "gpt_oss" if kind == "flipped" else "qwen3_moe"}
    sized = {"text_config": {"hidden_size": D}} if kind == "flipped, told by shape" else {}
    (folder / "config.json").write_text(json.dumps(config | sized))
    for file in base.glob("token*"):
        shutil.copy(file, folder)
    return folder


@pytest.mark.parametrize("kind", ["stacked", "flipped", "flipped, told by shape"])
def test_a_stacked_expert_has_the_rows_of_one_that_is_stored_alone(base, tmp_path, kind):
    sides = {each: [with_experts(base, tmp_path / f"{each}{seed}", each, seed) for seed in (0, 1)] for each in ("alone", kind)}
    alone, stacked = (tables(*sides[each]) for each in ("alone", kind))
    for spec in METHOD.tables:
        there, here = alone[spec.name].to_pylist(), stacked[spec.name].to_pylist()
        assert len(there) == len(here), spec.name
        for one, other in zip(there, here, strict=True):
            for row in (one, other):
                row["name"] = str(row.get("name", "")).replace(".weight", "")
                row.pop("title", None)
                row.pop("strongest_module", None)
            if "experts" in one["name"]:
                expert = int(one["name"].split(".")[4])
                one |= {"name": one["name"].replace(f"experts.{expert}.", "experts."), "expert": expert}
            assert one.keys() == other.keys()
            for name, value in one.items():
                assert other[name] == (pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value), name
    spectra = {row["expert"] for row in stacked[SPECTRUM.name].to_pylist()}
    assert spectra == {0, 1, 2}
    lines = next(each for each in FIGURES if each.table is SPECTRUM).series(stacked)
    assert set(lines) == {f"layers.0.mlp.experts.down_proj[{expert}]" for expert in range(3)}
    strongest = set(stacked[VOCABULARY.name]["strongest_module"].to_pylist())
    assert strongest <= {f"layers.0.mlp.experts.down_proj[{expert}]" for expert in range(3)}
    modules = [each for each in findings(stacked, SETTINGS) if each.kind == "module"]
    assert {each.source_key["expert"] for each in modules} == {0, 1, 2}


def test_experts_have_intruder_scores_also_as_bounds_and_can_be_left_out(base, tmp_path):
    sides = [with_experts(base, tmp_path / str(seed), "stacked", seed) for seed in (0, 1)]
    exact, bound, none = (
        [row["intruder_score"] for row in tables(*sides, SETTINGS.model_copy(update=asked))[TENSORS.name].to_pylist() if row["expert"] is not None]
        for asked in ({}, {"intruder_side": 8}, {"expert_intruders": False})
    )
    assert len(exact) == 3 and none == [None] * 3
    assert all(0 < least <= value + 1e-3 for least, value in zip(bound, exact, strict=True))


def test_of_stacked_experts_one_is_read_at_a_time(base, tmp_path, monkeypatch):
    """The largest stacks have 13 GB in float32; the key was read whole."""
    sides = [with_experts(base, tmp_path / str(seed), "stacked", seed) for seed in (0, 1)]
    shapes, read_of = [], _Place.read

    def read(place: _Place, rows: slice | None = None) -> torch.Tensor:
        tensor = read_of(place, rows)
        shapes.append(tuple(tensor.shape))
        return tensor

    monkeypatch.setattr(_Place, "read", read)
    tables(*sides)
    assert [shape for shape in shapes if len(shape) == 3] == [(1, D, 24)] * 6


def small_moe() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 12, "head_dim": 8, "vocab_size": V}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(num_experts=4, num_experts_per_tok=2, **sizes, **heads))


@pytest.mark.parametrize("against_itself", [True, False])
def test_adapters_of_stacked_experts_are_merged_and_read_one_by_one(base, tmp_path, monkeypatch, against_itself):
    monkeypatch.setenv("DIFFING_HOME", str(tmp_path / "home"))
    own = save(small_moe(), tmp_path / "base")
    for file in base.glob("token*"):
        shutil.copy(file, own)
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"], init_lora_weights=False)
    tuned = trained(own, tmp_path / "a", config)
    pair = WeightPair.of_folders(own, tuned, against=tuned if against_itself else None)
    found = run(Inputs(METHOD, {Need.WEIGHTS: lambda: pair}), WeightDiffSettings(token_rows=0))
    if against_itself:
        assert not found[TENSORS.name].num_rows
        return
    rows = {(row["name"], row["expert"]): row for row in found[TENSORS.name].to_pylist() if "down_proj" in row["name"]}
    changed = [row for row in rows.values() if row["frobenius"]]
    assert len(changed) == 4
    assert all(row["k99"] <= 2 for row in changed)
