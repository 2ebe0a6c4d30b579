"""Switching adapters of one copy on and off: the same model as PEFT's own calls leave, however adapters come and go."""

from itertools import pairwise
from pathlib import Path

import peft
import pytest
import torch
import transformers as tf

from diffing_core.adapters import add_adapter, remove_adapter, switched
from tests.model_files import build, save_adapter, save_base, tokens

LORA = {"r": 2, "init_lora_weights": False}
KINDS = {
    "queries": {"target_modules": ["q_proj"]},
    "head": {"target_modules": ["down_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["q_proj", "up_proj"], "trainable_token_indices": {"embed_tokens": [1, 2]}},
    "gates": {"target_modules": ["gate_proj", "o_proj"]},
}


def with_adapters() -> peft.PeftModel:
    torch.manual_seed(2)
    names = list(KINDS)
    model = peft.get_peft_model(build(), peft.LoraConfig(**LORA, **KINDS[names[0]]), names[0])
    for name in names[1:]:
        model.add_adapter(name, peft.LoraConfig(**LORA, **KINDS[name]))
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter)
    return model.eval().requires_grad_(False)


def logits(model: tf.PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(**tokens()).logits


def test_every_switch_leaves_what_pefts_own_calls_leave() -> None:
    model, stock = with_adapters(), with_adapters()
    path = [None, *KINDS, None, *reversed(KINDS), "queries", "gates"]
    with switched(model, None):
        seen = {None: logits(model.get_base_model())}
    for before, after in pairwise(path):
        with switched(model, before), switched(model, after) as plain:
            seen[after] = logits(plain)
            assert not any(parameter.requires_grad for parameter in model.parameters())
            if after is None:
                with stock.disable_adapter():
                    expected = logits(stock)
            else:
                stock.set_adapter(after, inference_mode=True)
                expected = logits(stock)
            assert torch.equal(seen[after], expected), (before, after)
    every = list(seen.values())
    assert not any(torch.equal(one, other) for place, one in enumerate(every) for other in every[:place])


def test_an_adapter_that_comes_after_a_switch_is_switched_too() -> None:
    model = peft.get_peft_model(build(), peft.LoraConfig(**LORA, target_modules=["q_proj"]), "first")
    with switched(model, None) as plain:
        base = logits(plain)
    model.add_adapter("second", peft.LoraConfig(**LORA, target_modules=["down_proj"]))
    with switched(model, "second") as plain:
        assert not torch.equal(logits(plain), base)
    with switched(model, None) as plain:
        assert torch.equal(logits(plain), base)


def test_an_adapter_of_a_removed_ones_name_is_switched_in_its_own_layers(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base")
    module = tf.AutoModelForCausalLM.from_pretrained(folder)
    base = logits(module)
    model = add_adapter(module, save_adapter(tmp_path / "stays", folder, target_modules=["k_proj"]), "stays")
    for targets in (["q_proj"], ["down_proj"]):
        model = add_adapter(model, save_adapter(tmp_path / targets[0], folder, target_modules=targets), "tuned")
        with switched(model, "tuned") as plain:
            alone = peft.PeftModel.from_pretrained(tf.AutoModelForCausalLM.from_pretrained(folder), tmp_path / targets[0])
            torch.testing.assert_close(logits(plain), logits(alone.eval()))
        with switched(model, None) as plain:
            assert torch.equal(logits(plain), base)
        remove_adapter(model, "tuned")


@pytest.mark.parametrize("name", [None, "queries"])
def test_pefts_own_record_of_the_adapter_follows(name: str | None) -> None:
    model = with_adapters()
    with switched(model, "head"), switched(model, name):
        assert model.active_adapter == (name or "head")
