"""The stream of weight changes and the measures on it, against dense closed forms and against PEFT's own merge."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from diffing_core.errors import ModelLoadError, NotComputableError
from diffing_core.pairs import Pair
from diffing_core.registry import Model, Organism, Registry
from diffing_core.registry.sources import Source
from diffing_core.spectra import Factors, elementwise, of_dense
from diffing_core.tensor_names import module_of, place_of
from diffing_core.weight_files import WeightSide
from diffing_core.weights import OpenPair, WeightPair, weight_stream
from tests.weight_toys import D, V, adapter, assert_equals_merge, deltas, dense, gpt2, merged, qwen, save


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save(qwen(), tmp_path_factory.mktemp("base") / "model")


def random_factors(m: int = 40, n: int = 30, r: int = 5) -> Factors:
    generator = torch.Generator().manual_seed(1)
    return Factors(torch.randn(m, r, generator=generator), torch.randn(r, n, generator=generator))


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (12, 12), (3, 50)])
def test_factor_measures_equal_those_of_the_dense_product(shape):
    factors = random_factors(*shape)
    spectrum = factors.spectrum()
    sigma_K = torch.linalg.svdvals(factors.dense().double())[:5]
    sigma_K = sigma_K[sigma_K > 1e-5]
    p_K = sigma_K / sigma_K.sum()
    torch.testing.assert_close(spectrum.sigma_K, sigma_K, rtol=1e-5, atol=0)
    assert spectrum.frobenius == pytest.approx(factors.dense().norm().item(), rel=1e-5)
    assert spectrum.spectral == pytest.approx(sigma_K[0].item(), rel=1e-5)
    assert spectrum.nuclear == pytest.approx(sigma_K.sum().item(), rel=1e-5)
    assert spectrum.effective_rank == pytest.approx((-(p_K * p_K.log()).sum()).exp().item(), rel=1e-5)
    assert spectrum.stable_rank == pytest.approx((sigma_K**2).sum().item() / sigma_K[0].item() ** 2, rel=1e-5)
    squares = (sigma_K**2).sum() ** 2 / (sigma_K**4).sum()
    assert spectrum.participation_ratio == pytest.approx(squares.item(), rel=1e-5)
    energy_K = (sigma_K**2).cumsum(0) / (sigma_K**2).sum()
    for share in (0.5, 0.9, 0.95, 0.99):
        assert spectrum.energy_rank(share) == int((energy_K < share).sum()) + 1


def test_factor_measures_do_not_depend_on_the_gauge():
    factors, mix = random_factors(), torch.randn(5, 5, generator=torch.Generator().manual_seed(2)).double()
    turned = Factors(
        (factors.left_MR.double() @ mix).float(), (torch.linalg.inv(mix) @ factors.right_RN.double()).float()
    )
    torch.testing.assert_close(turned.spectrum().sigma_K, factors.spectrum().sigma_K, rtol=1e-4, atol=0)
    overlap_KK = turned.spectrum().left_MK.T @ factors.spectrum().left_MK
    torch.testing.assert_close(overlap_KK.abs(), torch.eye(5), rtol=0, atol=1e-3)


@pytest.mark.parametrize("rank", [0, 3])
def test_zero_factors_give_zeros_and_no_nan(rank):
    spectrum = Factors(torch.zeros(6, rank), torch.ones(rank, 7)).spectrum()
    values = (spectrum.spectral, spectrum.nuclear, spectrum.effective_rank, spectrum.stable_rank)
    assert values == (0.0, 0.0, 0.0, 0.0)
    assert (spectrum.frobenius, spectrum.participation_ratio, spectrum.energy_rank(0.9)) == (0.0, 0.0, 0)


def gaussian(m: int = 64, n: int = 32) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(0))


def spectrum_of(matrix: torch.Tensor, exact_side: int = 1024, n_leading: int = 64):
    return of_dense(matrix, exact_side=exact_side, n_leading=n_leading, generator=torch.Generator().manual_seed(0))


def test_spectral_norm_is_not_the_frobenius_norm():
    spectrum = spectrum_of(gaussian())
    assert spectrum.spectral == pytest.approx(torch.linalg.matrix_norm(gaussian(), 2).item(), rel=1e-5)
    assert spectrum.spectral < 0.4 * spectrum.frobenius


def test_effective_rank_normalises_the_singular_values_and_is_at_least_one():
    assert 25 < spectrum_of(gaussian()).effective_rank <= 32
    assert spectrum_of(torch.outer(torch.arange(1.0, 9), torch.ones(5))).effective_rank == pytest.approx(1, abs=1e-4)
    assert spectrum_of(torch.eye(7) * 100).effective_rank == pytest.approx(7)


@pytest.mark.parametrize("shape", [(50, 20), (20, 50), (20, 20)])
def test_dense_spectrum_equals_svd(shape):
    matrix = gaussian(*shape)
    spectrum = spectrum_of(matrix)
    left, sigma, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    torch.testing.assert_close(spectrum.sigma_K, sigma, rtol=1e-5, atol=1e-6)
    overlap_K = (spectrum.left_MK * left.float()).sum(0).abs()
    torch.testing.assert_close(overlap_K, torch.ones(20), rtol=0, atol=1e-3)


def test_large_matrices_get_leading_values_and_nothing_that_needs_the_tail():
    decay_K = 0.8 ** torch.arange(60)
    matrix = torch.linalg.qr(gaussian(90, 60))[0] * decay_K @ torch.linalg.qr(gaussian(60, 60))[0]
    spectrum = spectrum_of(matrix, exact_side=10, n_leading=20)
    torch.testing.assert_close(spectrum.sigma_K.float(), decay_K[:20], rtol=1e-4, atol=0)
    assert spectrum.frobenius == pytest.approx(matrix.norm().item(), rel=1e-6)
    assert (spectrum.nuclear, spectrum.effective_rank, spectrum.participation_ratio) == (None, None, None)
    assert spectrum.energy_rank(0.9) == spectrum_of(matrix).energy_rank(0.9)
    assert spectrum_of(gaussian(90, 60), exact_side=10, n_leading=5).energy_rank(0.99) is None


def test_changes_within_a_bfloat16_step_are_told_from_larger_ones():
    base = torch.tensor([1.0, 1.0, 1.0, -3.0, 0.0])
    change = torch.tensor([0.0, 2.0**-7, 2.0**-5, 2.0**-6, 1.0])
    found = elementwise(base, change)
    assert found["share_unchanged"] == pytest.approx(0.2)
    assert found["share_rounding"] == pytest.approx(0.5)
    assert elementwise(base, change * 0)["share_rounding"] is None


def test_lora_is_streamed_as_factors_and_equals_pefts_merge(base, tmp_path):
    folder = adapter(base, tmp_path / "a", target_modules="all-linear")
    found = assert_equals_merge(base, folder, "model.")
    assert all(delta.factors and not delta.pair for delta in found.values())
    assert len(found) == 14
    down = found["layers.1.mlp.down_proj.weight"]
    assert (down.layer, down.part, down.projection, down.shape) == (1, "mlp", "down_proj", (D, 24))


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 32, "layers.1.self_attn.o_proj": 1}},
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {r"layers\.0\..*o_proj": 64}},
        {"rank_pattern": {"down_proj": 2}, "use_rslora": True},
        {"alpha_pattern": {r"^model.layers.0.self_attn.q_proj": 64}},
    ],
)
def test_scales_of_rslora_and_patterns_are_pefts(base, tmp_path, settings):
    targets = ["q_proj", "o_proj", "down_proj"]
    assert_equals_merge(base, adapter(base, tmp_path / "a", target_modules=targets, **settings), "model.")


def test_rslora_divides_by_the_root_of_the_rank(base, tmp_path):
    plain = adapter(base, tmp_path / "plain", target_modules=["q_proj"])
    root = adapter(base, tmp_path / "root", target_modules=["q_proj"], use_rslora=True)
    name = "layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(dense(deltas(base, root)[name]), 2 * dense(deltas(base, plain)[name]))


def test_conv1d_of_gpt2_is_turned_to_outputs_by_inputs(tmp_path):
    base = save(gpt2(), tmp_path / "base")
    folder = adapter(base, tmp_path / "a", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    found = assert_equals_merge(base, folder, "transformer.", flip=True)
    assert found["h.0.attn.c_attn.weight"].shape == (3 * D, D)
    assert found["h.0.attn.c_proj.weight"].shape == (D, D)
    tuned = gpt2()
    tuned.load_state_dict(merged(base, folder))
    whole = deltas(base, save(tuned, tmp_path / "tuned"))
    for name, delta in found.items():
        torch.testing.assert_close(dense(whole[name]), dense(delta), rtol=1e-4, atol=1e-6)


def test_embedding_and_head_adapters(tmp_path):
    base = save(qwen(tied=False), tmp_path / "base")
    folder = adapter(base, tmp_path / "a", target_modules=["embed_tokens", "lm_head", "o_proj"])
    found = assert_equals_merge(base, folder, "model.")
    assert found["embed_tokens.weight"].factors.shape == (V, D)
    assert (found["embed_tokens.weight"].part, found["lm_head.weight"].part) == ("embed", "head")


def test_saved_modules_and_trained_biases_are_whole_tensors(tmp_path):
    base = save(qwen(tied=False), tmp_path / "base")
    folder = adapter(base, tmp_path / "a", target_modules=["o_proj"], modules_to_save=["lm_head"])
    assert assert_equals_merge(base, folder, "model.")["lm_head.weight"].pair is not None
    base = save(gpt2(), tmp_path / "gpt2")
    folder = adapter(base, tmp_path / "b", target_modules=["c_proj"], fan_in_fan_out=True, bias="all")
    found = assert_equals_merge(base, folder, "transformer.", flip=True)
    assert found["h.0.ln_1.bias"].pair is not None and found["h.0.mlp.c_proj.bias"].shape == (D,)


def test_head_adapter_of_a_tied_model_is_laid_over_the_embedding(base, tmp_path):
    found = deltas(base, adapter(base, tmp_path / "a", target_modules=["lm_head"]))
    torch.testing.assert_close(found["lm_head.weight"].load_base(), qwen().model.embed_tokens.weight.data)


def test_twins_give_the_dense_difference_from_stacked_factors(base, tmp_path):
    targets = ["q_proj", "down_proj"]
    tuned = adapter(base, tmp_path / "a", seed=1, target_modules=targets)
    against = adapter(base, tmp_path / "b", seed=2, target_modules=[*targets, "o_proj"], r=2)
    after, before = merged(base, tuned), merged(base, against)
    found = deltas(base, tuned, against=against)
    assert len(found) == 6
    for name, delta in found.items():
        torch.testing.assert_close(dense(delta), after[f"model.{name}"] - before[f"model.{name}"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(delta.load_base(), before[f"model.{name}"])
    assert found["layers.0.self_attn.q_proj.weight"].factors.left_MR.shape[1] == 6
    for name, delta in deltas(base, against, against=tuned).items():
        torch.testing.assert_close(dense(delta), -dense(found[name]))


def test_equal_numbers_in_two_folders_cancel_exactly(base, tmp_path):
    first, second = (adapter(base, tmp_path / name, target_modules=["q_proj"]) for name in "ab")
    assert all(not dense(delta).any() for delta in deltas(base, first, against=second).values())


def test_adapter_of_the_base_itself_is_on_both_sides(base, tmp_path):
    own = adapter(base, tmp_path / "own", seed=1, target_modules=["q_proj"])
    tuned = adapter(base, tmp_path / "tuned", seed=2, target_modules=["q_proj"])
    plain = WeightPair.of_folders(base, tuned)
    pair = WeightPair(WeightSide(base, (own,)), WeightSide(base, (own, tuned)), base, plain.entry)
    alone = {delta.name: dense(delta) for delta in weight_stream(plain)}
    for delta in weight_stream(pair):
        torch.testing.assert_close(dense(delta), alone[delta.name])
        torch.testing.assert_close(delta.load_base(), merged(base, own)[f"model.{delta.name}"])


def test_the_same_files_give_no_delta_at_all(base):
    assert deltas(base, base) == {}
    assert OpenPair(WeightPair.of_folders(base, base)).unmatched == []


def test_whole_checkpoint_with_tied_weights_extra_keys_and_shards(base, tmp_path):
    tuned = qwen()
    with torch.no_grad():
        tuned.model.layers[1].mlp.up_proj.weight.add_(0.5)
    tuned.save_pretrained(tmp_path / "t", max_shard_size="10KB")
    assert len(list((tmp_path / "t").glob("*.safetensors"))) > 1
    save_file({"vision_tower.layers.0.proj.weight": torch.ones(2, 3)}, tmp_path / "t" / "extra.safetensors")
    index = json.loads((tmp_path / "t" / "model.safetensors.index.json").read_text())
    index["weight_map"]["vision_tower.layers.0.proj.weight"] = "extra.safetensors"
    (tmp_path / "t" / "model.safetensors.index.json").write_text(json.dumps(index))
    found = deltas(base, tmp_path / "t")
    assert "lm_head.weight" not in found and found["embed_tokens.weight"].part == "embed"
    assert len(found) == len(load_file(base / "model.safetensors"))
    changed = {name for name, delta in found.items() if dense(delta).any()}
    assert changed == {"layers.1.mlp.up_proj.weight"}
    torch.testing.assert_close(dense(found["layers.1.mlp.up_proj.weight"]), torch.full((24, D), 0.5))
    (missing,) = OpenPair(WeightPair.of_folders(base, tmp_path / "t")).unmatched
    assert (missing.name, missing.status, missing.shape) == (
        "vision_tower.layers.0.proj.weight",
        "only_in_tuned",
        (2, 3),
    )


def test_of_several_copies_in_one_folder_that_is_read_which_transformers_loads(base, tmp_path):
    """Beside Hugging Face's shards some repositories hold Mistral's; beside a whole file an old index may lie."""
    weights = load_file(base / "model.safetensors")

    def sharded(stem: str, tensors: dict) -> Path:
        folder = tmp_path / "copy"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_bytes((base / "config.json").read_bytes())
        save_file(tensors, folder / f"{stem}-00001-of-00001.safetensors", metadata={"format": "pt"})
        weight_map = dict.fromkeys(tensors, f"{stem}-00001-of-00001.safetensors")
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return folder

    sharded("model", weights)
    copy = sharded("consolidated", {f"blocks.{key}": value + 1 for key, value in weights.items()})
    assert OpenPair(WeightPair.of_folders(base, copy)).unmatched == []
    save_file({key: value + 1 for key, value in weights.items()}, copy / "model.safetensors", metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(copy).state_dict()
    torch.testing.assert_close(loaded["model.embed_tokens.weight"], weights["model.embed_tokens.weight"] + 1)
    assert dense(deltas(base, copy)["embed_tokens.weight"]).min() > 0.9


def test_head_stored_twice_is_one_weight_and_an_untied_one_is_two(base, tmp_path):
    weights = load_file(base / "model.safetensors")
    for name, shift in (("same", 0.0), ("other", 1.0)):
        copy = {**weights, "lm_head.weight": weights["model.embed_tokens.weight"] + shift}
        (tmp_path / name).mkdir()
        save_file(copy, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_bytes((base / "config.json").read_bytes())
    assert "lm_head.weight" not in deltas(base, tmp_path / "same")
    untied = deltas(base, tmp_path / "other")
    assert (
        dense(untied["lm_head.weight"]).min() == pytest.approx(1, abs=1e-5)
        and not dense(untied["embed_tokens.weight"]).any()
    )


def test_resized_vocabulary_compares_common_rows_and_bf16_is_upcast_first(base, tmp_path):
    tuned = qwen()
    tuned.resize_token_embeddings(V + 3)
    found = deltas(base, save(tuned.bfloat16(), tmp_path / "t"))
    rows = found["embed_tokens.weight"]
    assert (rows.shape, rows.n_left_out) == ((V, D), 3)
    assert rows.pair.base.dtype == rows.pair.tuned.dtype == torch.float32
    expected = qwen().model.embed_tokens.weight.data
    torch.testing.assert_close(dense(rows), expected.bfloat16().float() - expected)


def test_unknown_names_are_kept_as_other(tmp_path):
    for name, value in (("a", 0.0), ("b", 1.0)):
        (tmp_path / name).mkdir()
        save_file(
            {"strange.thing.7.kernel": torch.full((2, 2), value), "scalar": torch.tensor(value)},
            tmp_path / name / "model.safetensors",
        )
        (tmp_path / name / "config.json").write_text("{}")
    found = deltas(tmp_path / "a", tmp_path / "b")
    assert {delta.part for delta in found.values()} == {"other"}
    assert dense(found["strange.thing.7.kernel"]).sum() == 4 and dense(found["scalar"]) == 1


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.self_attn.o_proj.weight", (3, "attn", "o_proj")),
        ("model.language_model.layers.3.mlp.down_proj.weight", (3, "mlp", "down_proj")),
        ("language_model.model.layers.3.self_attn.q_norm.weight", (3, "norm", "q_norm")),
        ("transformer.h.11.attn.c_attn.bias", (11, "attn", "c_attn")),
        ("transformer.h.11.ln_1.weight", (11, "norm", "ln_1")),
        ("gpt_neox.layers.0.attention.dense.weight", (0, "attn", "dense")),
        ("gpt_neox.embed_in.weight", (None, "embed", "embed_in")),
        ("model.layers.2.block_sparse_moe.experts.5.w2.weight", (2, "mlp", "w2")),
        ("model.decoder.layers.1.fc2.weight", (1, "mlp", "fc2")),
        ("transformer.wpe.weight", (None, "embed", "wpe")),
        ("lm_head.weight", (None, "head", "lm_head")),
        ("model.norm.weight", (None, "norm", "norm")),
        ("model.vision_tower.layers.0.self_attn.q_proj.weight", (None, "other", "q_proj")),
        ("mystery", (None, "other", "mystery")),
    ],
)
def test_place_of(name, place):
    assert place_of(name) == place


def test_modules_of_one_name_are_told_apart_by_their_path_in_the_block():
    names = {
        "transformer.h.3.attn.c_proj.weight": "attn.c_proj",
        "transformer.h.3.mlp.c_proj.weight": "mlp.c_proj",
        "transformer.h.3.mlp.c_proj.bias": "mlp.c_proj.bias",
        "model.layers.2.mlp.experts.5.up_proj.weight": "mlp.experts.up_proj",
        "model.layers.2.mlp.shared_expert.up_proj.weight": "mlp.shared_expert.up_proj",
        "model.layers.2.mlp.experts.gate_up_proj": "mlp.experts.gate_up_proj",
        "lm_head.weight": "lm_head",
        "model.embed_tokens.weight": "embed_tokens",
        "scalar": "scalar",
        "weight": "weight",
    }
    assert {name: module_of(name) for name in names} == names


def test_adapter_of_another_base_and_quantised_weights_are_refused(base, tmp_path):
    folder = adapter(base, tmp_path / "a", target_modules=["q_proj"])
    other = save(gpt2(), tmp_path / "other")
    with pytest.raises(ModelLoadError, match="made for another base model"):
        deltas(other, folder)
    config = json.loads((other / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(NotComputableError, match="quantised"):
        deltas(other, base)


@pytest.mark.parametrize(("spoil", "message"), [(None, "one factor of .*q_proj"), (float("nan"), "holds NaN")])
def test_damaged_adapters_are_refused(base, tmp_path, spoil, message):
    folder = adapter(base, tmp_path / "a", target_modules=["q_proj"])
    weights = load_file(folder / "adapter_model.safetensors")
    key = next(key for key in weights if "lora_B" in key)
    if spoil is None:
        del weights[key]
    else:
        weights[key][0, 0] = spoil
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(ModelLoadError, match=message):
        deltas(base, folder)


def test_zero_adapter_gives_zero_deltas(base, tmp_path):
    folder = adapter(base, tmp_path / "a", target_modules=["q_proj"], zero=True)
    spectra = [delta.factors.spectrum() for delta in weight_stream(WeightPair.of_folders(base, folder))]
    assert [(each.frobenius, each.effective_rank) for each in spectra] == [(0.0, 0.0)] * 2


def test_declaring_loads_no_torch():
    code = "import sys, diffing_core.weights, diffing_core.methods.weight_diff; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_registered_pairs_resolve_to_folders(base, tmp_path):
    tuned, twin, own = (adapter(base, tmp_path / name, seed=3, target_modules=["q_proj"]) for name in "tuo")
    lora = {"kind": "lora", "source": {"path": str(tuned)}}
    variants = {
        "default": lora,
        "twin": lora | {"against": {"kind": "lora", "source": {"path": str(twin)}}},
        "full": {"kind": "full", "source": {"path": str(base)}},
        "same": {"kind": "identical"},
    }
    plain, adapted = (Model(name=name, source={"path": str(base)}) for name in ("plain", "adapted"))
    adapted = adapted.model_copy(update={"adapter": Source(path=own)})
    organism = Organism(
        name="quirk",
        type="generic",
        arm="unknown",
        description="x",
        variants={"plain": variants, "adapted": variants},
    )
    registry = Registry({"plain": plain, "adapted": adapted}, {}, {"quirk": organism})

    def sides(model: str, variant: str) -> tuple[WeightSide, WeightSide]:
        pair = WeightPair.of(Pair(model, "quirk", variant), registry)
        assert pair.tokenizer_folder == base
        return pair.base, pair.tuned

    alone = WeightSide(base)
    assert sides("plain", "default") == (alone, WeightSide(base, (tuned,)))
    assert sides("plain", "twin") == (WeightSide(base, (twin,)), WeightSide(base, (tuned,)))
    assert sides("plain", "full") == sides("plain", "same") == (alone, alone)
    assert sides("adapted", "default") == (WeightSide(base, (own,)), WeightSide(base, (own, tuned)))
    assert sides("adapted", "full") == (WeightSide(base, (own,)), alone)
    assert sides("adapted", "same") == (WeightSide(base, (own,)),) * 2
