"""The in-place LoRA forward against PEFT's own and against merged weights in float64."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from diffing_core.lora_forward import add_in_place
from tests import model_files

TOKENS = torch.arange(2, 26).view(2, 12)


def adapted(**options) -> torch.nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=12, init_lora_weights=False, **{"target_modules": "all-linear"} | options)
    return get_peft_model(model_files.build(), config, adapter_name="one").eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 1}}])
def test_logits_are_those_of_stock_peft(options: dict) -> None:
    stock = adapted(**options)
    fast = copy.deepcopy(stock)
    assert add_in_place(fast, "one") == 7 * model_files.LAYERS
    torch.testing.assert_close(logits(fast), logits(stock), atol=2e-5, rtol=1e-4)
    with stock.disable_adapter(), fast.disable_adapter():
        assert torch.equal(logits(fast), logits(stock))


def test_only_the_active_adapter_is_added() -> None:
    stock = adapted()
    stock.add_adapter("two", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    fast = copy.deepcopy(stock)
    assert [add_in_place(fast, name) for name in ("one", "two")] == [7 * model_files.LAYERS, model_files.LAYERS]
    for name in ("two", "one"):
        stock.set_adapter(name), fast.set_adapter(name)
        torch.testing.assert_close(logits(fast), logits(stock), atol=2e-5, rtol=1e-4)


def test_bf16_is_at_least_as_exact_as_peft() -> None:
    exact = logits(adapted().double())
    stock = adapted().bfloat16()
    fast = copy.deepcopy(stock)
    assert add_in_place(fast, "one")
    errors = [(logits(model).double() - exact).abs().mean() for model in (fast, stock)]
    assert errors[0] <= 1.05 * errors[1]


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_what_is_not_plain_lora_is_left_to_peft(options: dict) -> None:
    assert add_in_place(adapted(**options), "one") == 0


def test_an_adapter_in_another_dtype_than_its_base_is_left_to_peft() -> None:
    model = adapted()
    model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.to(torch.bfloat16)
    assert add_in_place(model, "one") == 7 * model_files.LAYERS - 1


@pytest.mark.parametrize("safe", [True, False])
def test_merging_and_unmerging_still_work(safe: bool) -> None:
    stock = adapted()
    fast = copy.deepcopy(stock)
    add_in_place(fast, "one")
    whole = logits(stock)
    fast.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(logits(fast), whole, atol=2e-5, rtol=1e-4)
    fast.unmerge_adapter()
    torch.testing.assert_close(logits(fast), whole, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(logits(fast.merge_and_unload(safe_merge=safe)), whole, atol=2e-5, rtol=1e-4)
