"""Adapters that are more than B A: DoRA tensor by tensor, every other kind merged, each against PEFT's own merge."""

import json
from pathlib import Path

import peft
import pytest
import torch
from peft import LoHaConfig, PromptTuningConfig
from safetensors.torch import load_file, save_file

from diffing_core.adapters import is_switchable
from diffing_core.errors import ModelLoadError, NotComputableError
from tests.weight_toys import adapter, assert_equals_merge, deltas, dense, gpt2, merged, qwen, save, trained


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DIFFING_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "merged_adapters"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save(qwen(tied=False), tmp_path_factory.mktemp("base") / "model")


def edited(folder: Path, **changes) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["embed_tokens", "lm_head"]])
def test_dora_is_read_tensor_by_tensor_and_equals_pefts_merge(base, tmp_path, home, targets):
    folder = adapter(base, tmp_path / "a", target_modules=targets, use_dora=True, use_rslora=True)
    found = assert_equals_merge(base, folder, "model.")
    assert all(delta.pair and dense(delta).any() for delta in found.values())
    assert not home.exists()


def test_dora_on_conv1d_scales_outputs(tmp_path):
    base = save(gpt2(), tmp_path / "base")
    folder = adapter(base, tmp_path / "a", target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True)
    own, after = gpt2().state_dict(), merged(base, folder)
    delta = deltas(base, folder)["h.0.attn.c_attn.weight"]
    name = "transformer.h.0.attn.c_attn.weight"
    torch.testing.assert_close(dense(delta), (after[name] - own[name]).T, rtol=1e-4, atol=1e-6)


def test_untrained_dora_changes_nothing_and_dora_against_itself_is_zero(base, tmp_path):
    folder = adapter(base, tmp_path / "a", target_modules=["q_proj"], use_dora=True, init_lora_weights=False)
    weights = load_file(folder / "adapter_model.safetensors")
    own = load_file(base / "model.safetensors")
    for key in weights:
        if "lora_B" in key:
            weights[key].zero_()
        if "magnitude" in key:
            path = key.removeprefix("base_model.model.").removesuffix(".lora_magnitude_vector")
            weights[key] = own[f"{path}.weight"].norm(dim=1)
    copy = adapter(base, tmp_path / "b", target_modules=["q_proj"], use_dora=True, init_lora_weights=False)
    assert all(not dense(delta).any() for delta in deltas(base, folder, against=copy).values())
    save_file(weights, folder / "adapter_model.safetensors")
    for delta in deltas(base, folder).values():
        assert dense(delta).abs().max() < 1e-7


TARGETS = {"target_modules": ["q_proj", "down_proj"]}


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(**TARGETS, feedforward_modules=["down_proj"], init_ia3_weights=False),
        peft.LoHaConfig(**TARGETS, r=2, init_weights=False),
        peft.LoKrConfig(**TARGETS, r=2, init_weights=False),
        peft.VeraConfig(**TARGETS, r=4, init_weights=False),
        peft.VBLoRAConfig(**TARGETS, r=2, num_vectors=10, vector_length=8, topk=2),
        peft.RandLoraConfig(**TARGETS, r=2),
        peft.AdaLoraConfig(**TARGETS, init_r=3, target_r=2, total_step=10),
        peft.OFTConfig(**TARGETS, oft_block_size=4, r=0, init_weights=False),
        peft.BOFTConfig(**TARGETS, boft_block_size=4, init_weights=False),
        peft.HRAConfig(**TARGETS, r=2, init_weights=False),
        peft.C3AConfig(**TARGETS, block_size=8),
        peft.FourierFTConfig(**TARGETS, n_frequency=20),
        peft.WaveFTConfig(**TARGETS, n_frequency=20),
        peft.ShiraConfig(**TARGETS, r=2),
        peft.MissConfig(**TARGETS, r=2),
        peft.RoadConfig(**TARGETS, group_size=8),
        peft.DeloraConfig(**TARGETS, r=2),
        peft.GraloraConfig(**TARGETS, r=4),
        peft.HiraConfig(**TARGETS, r=2),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_other_kinds_are_merged_once_and_equal_pefts_merge(base, tmp_path, home, config):
    folder = trained(base, tmp_path / "a", config)
    found = assert_equals_merge(base, folder, "model.")
    changed = {name for name, delta in found.items() if dense(delta).any()}
    assert changed == {
        f"layers.{layer}.{name}.weight" for layer in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")
    }
    (made,) = home.iterdir()
    written = made.stat().st_mtime_ns
    deltas(base, folder)
    assert [each.stat().st_mtime_ns for each in home.iterdir()] == [written]


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (peft.LNTuningConfig(target_modules=["post_attention_layernorm"]), "layers.1.post_attention_layernorm.weight"),
        (peft.TrainableTokensConfig(token_indices=[1, 2], target_modules=["embed_tokens"]), "embed_tokens.weight"),
    ],
    ids=lambda each: each.peft_type.value if isinstance(each, peft.PeftConfig) else "",
)
def test_kinds_that_train_no_matrix_are_merged_too(base, tmp_path, config, name):
    found = assert_equals_merge(base, trained(base, tmp_path / "a", config), "model.")
    assert dense(found[name]).any() and not dense(found["layers.0.mlp.up_proj.weight"]).any()


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"trainable_token_indices": [1, 2]},
    ],
    ids=lambda settings: "_".join(settings),
)
def test_loras_that_also_change_the_base_are_merged_and_not_read_as_plain_factors(base, tmp_path, home, settings):
    assert_equals_merge(base, adapter(base, tmp_path / "a", target_modules=["o_proj"], **settings), "model.")
    assert len(list(home.iterdir())) == 1


def test_lora_bias_needs_a_bias_in_the_base(base, tmp_path):
    biased = save(gpt2(), tmp_path / "gpt2")
    own = {"target_modules": ["c_fc"], "fan_in_fan_out": True, "lora_bias": True}
    folder = adapter(biased, tmp_path / "a", **own)
    found, after = deltas(biased, folder), merged(biased, folder)
    change = after["transformer.h.0.mlp.c_fc.bias"] - gpt2().state_dict()["transformer.h.0.mlp.c_fc.bias"]
    assert change.any()
    torch.testing.assert_close(dense(found["h.0.mlp.c_fc.bias"]), change)
    with pytest.raises(NotComputableError, match="cannot merge.*has no bias"):
        deltas(base, adapter(base, tmp_path / "b", target_modules=["q_proj"], lora_bias=True))


def test_another_adapter_or_base_gets_another_folder(base, tmp_path, home):
    config = LoHaConfig(**TARGETS, r=2, init_weights=False)
    first, second = (trained(base, tmp_path / str(seed), config, seed) for seed in (1, 2))
    there, back = deltas(base, first, against=second), deltas(base, second, against=first)
    assert len(list(home.iterdir())) == 2
    for name, delta in there.items():
        torch.testing.assert_close(dense(delta), -dense(back[name]))


def test_kinds_that_change_no_weight_or_start_from_data_are_refused(base, tmp_path, home):
    prompt = trained(base, tmp_path / "p", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(NotComputableError, match="changes no weight"):
        deltas(base, prompt)
    plain = adapter(base, tmp_path / "plain", target_modules=["q_proj"])
    with pytest.raises(NotComputableError, match="begun with corda.*merge it where it was trained"):
        deltas(base, edited(plain, init_lora_weights="corda"))
    with pytest.raises((ModelLoadError, NotComputableError), match="plain"):
        deltas(base, edited(plain, peft_type="LOHA", init_lora_weights=True))
    assert not home.exists() or not list(home.iterdir())


def test_replicated_layers_are_not_put_into_the_resident_base(base, tmp_path, home):
    folder = adapter(base, tmp_path / "a", target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]])
    assert not is_switchable(folder)
    with pytest.raises(NotComputableError, match="repeats blocks"):
        deltas(base, folder)


def test_an_activated_lora_is_refused_before_any_weights_are_read_and_is_an_ordinary_one_without_its_tokens(
    base, tmp_path, home, monkeypatch
):
    """On the resident base PEFT leaves it off everywhere: tuned model and base would be the same."""
    folder = adapter(base, tmp_path / "a", target_modules=["q_proj"], alora_invocation_tokens=[3, 4])
    assert not is_switchable(folder)
    monkeypatch.setattr("diffing_core.merged_adapters.load_module", None)
    monkeypatch.setattr("diffing_core.merged_adapters.content_hash", None)
    with pytest.raises(NotComputableError, match="activated LoRA.*take alora_invocation_tokens out"):
        deltas(base, folder)
    copy = edited(folder, alora_invocation_tokens=None)
    assert is_switchable(copy) and all(dense(delta).any() for delta in assert_equals_merge(base, copy, "model.").values())


def test_an_adapter_of_another_base_is_not_merged_in_part(base, tmp_path, home):
    folder = trained(base, tmp_path / "a", LoHaConfig(**TARGETS, r=2, init_weights=False))
    other = save(gpt2(), tmp_path / "other")
    with pytest.raises((ModelLoadError, NotComputableError)):
        deltas(other, folder)
