"""Tiny models and adapters on disk, and the weight stream over them."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

from diffing_core.weights import WeightPair, weight_stream

D, V = 16, 64


def qwen(*, tied: bool = True) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=tied,
    )
    return Qwen3ForCausalLM(config)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=D, n_layer=1, n_head=2, n_positions=32, **ends))


def save(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def adapter(base: Path, folder: Path, seed: int = 0, *, zero: bool = False, **settings) -> Path:
    """A LoRA adapter on the model in `base`, with random numbers in every trained tensor."""
    return trained(base, folder, LoraConfig(**({"r": 4, "lora_alpha": 8} | settings)), seed, zero=zero)


def trained(base: Path, folder: Path, config: PeftConfig, seed: int = 0, *, zero: bool = False) -> Path:
    """An adapter of any kind."""
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(seed)
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if weight.requires_grad and not (zero and "lora_B" in name):
                weight.add_(torch.randn_like(weight) * 0.1)
    wrapped.save_pretrained(folder)
    return folder


def merged(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    return model.merge_and_unload().state_dict()


def deltas(base: Path, tuned: Path, **others):
    return {delta.name: delta for delta in weight_stream(WeightPair.of_folders(base, tuned, **others))}


def dense(delta) -> torch.Tensor:
    return delta.factors.dense() if delta.factors else delta.pair.tuned - delta.pair.base


def assert_equals_merge(base: Path, folder: Path, prefix: str, *, flip: bool = False) -> dict:
    """The stream says what PEFT's merge does, for every tensor that it lists, and lists all that changed."""
    own, after = AutoModelForCausalLM.from_pretrained(base).state_dict(), merged(base, folder)
    found = deltas(base, folder)
    full = {name: name if name in own else f"{prefix}{name}" for name in found}
    for name, delta in found.items():
        expected = after[full[name]] - own[full[name]]
        expected = expected.T if flip and delta.factors else expected
        torch.testing.assert_close(dense(delta), expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(delta.load_base(), own[full[name]].T if flip and delta.factors else own[full[name]])
    changed = {name for name in own if not torch.equal(own[name], after[name])}
    assert changed <= set(full.values())
    return found
