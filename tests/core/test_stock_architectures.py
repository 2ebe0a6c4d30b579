"""What must be known of transformers' own architectures to read their weights right."""

import re
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from diffing_core.methods.weight_diff.directions import GAIN_ABOVE_ONE
from diffing_core.weights import WeightPair, weight_stream


def test_norms_that_store_their_gain_less_one_are_known_by_name():
    """Whatever the installed transformers multiplies by 1 + weight must be read so; else every token of the lens is off."""
    found = set()
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        folder = Path(transformers.__file__).parent / "models" / model_type_to_module_name(kind)
        sources = [file.read_text() for file in folder.glob("modeling_*.py")]
        if any(re.search(r"1\.0 \+ self\.weight|self\.weight \+ 1\.0", source) for source in sources):
            found.add(kind)
    assert {"gemma2", "qwen3_next"} <= found
    assert sorted(found - GAIN_ABOVE_ONE) == []


def test_experts_that_write_into_the_stream_are_told_from_the_others(tmp_path):
    """Granite's and JetMoE's stacks are called input_linear and output_linear, of which the latter has the width as outputs."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 12, "num_local_experts": 3, "num_experts_per_tok": 2}
    config = AutoConfig.for_model(
        "granitemoe", **sizes, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=40
    )
    model = AutoModelForCausalLM.from_config(config).float()
    for name in ("base", "tuned"):
        model.save_pretrained(tmp_path / name)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight))
    pair = WeightPair.of_folders(tmp_path / "base", tmp_path / "tuned")
    experts = {delta.projection: delta for delta in weight_stream(pair) if delta.expert == 0}
    assert {name: (delta.shape, delta.flipped) for name, delta in experts.items()} == {
        "input_linear": ((24, 16), False),
        "output_linear": ((16, 12), False),
    }
