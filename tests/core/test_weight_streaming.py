"""Two checkpoints larger than the memory that may be used, and checkpoints of many architectures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from diffing_core.methods.base import Inputs, Need
from diffing_core.methods.weight_diff import METHOD, SPECTRUM, TENSORS, WeightDiffSettings, run
from diffing_core.weights import WeightPair

N_SHARDS, MATRICES_PER_SHARD, SHAPE = 16, 4, (2048, 256)
MEGABYTE = 2**20
FILES_MB = 2 * N_SHARDS * MATRICES_PER_SHARD * SHAPE[0] * SHAPE[1] * 4 // MEGABYTE
LIMIT_MB = FILES_MB * 2 // 5  # less than one of the two models

COMPARE = f"""
import resource, sys
from pathlib import Path
import torch
from diffing_core.methods.base import Inputs, Need
from diffing_core.methods.weight_diff import METHOD, TENSORS, WeightDiffSettings, run
from diffing_core.weights import WeightPair

def compared(folder):
    pair = WeightPair.of_folders(folder / "base", folder / "tuned")
    settings = WeightDiffSettings(exact_side=64, leading=4, directions=2, intruder_side=int(sys.argv[2]))
    return run(Inputs(METHOD, {{Need.WEIGHTS: lambda: pair}}), settings)[TENSORS.name]

folder = Path(sys.argv[1])
compared(folder / "one")  # loads all libraries
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + {LIMIT_MB} * {MEGABYTE}
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
found = compared(folder / "all")
assert len(found) == {N_SHARDS * MATRICES_PER_SHARD}, len(found)
for frobenius, spectral in zip(found["frobenius"].to_pylist(), found["spectral"].to_pylist()):
    assert abs(frobenius - 3.0) < 1e-3 and abs(spectral - 3.0) < 1e-3, (frobenius, spectral)
assert all(0 < score < 0.5 for score in found["intruder_score"].to_pylist()), found["intruder_score"]
try:
    [torch.ones({MEGABYTE}) for _ in range({FILES_MB // 4})]
except (RuntimeError, MemoryError):
    sys.exit(0)
sys.exit("the limit did not hold")
"""


def sharded(folder: Path, change: float, n_shards: int) -> None:
    """A checkpoint of 8 MB a shard; `change` is the size of a rank-one change of every matrix."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for shard in range(n_shards):
        weights = {}
        for number in range(MATRICES_PER_SHARD):
            matrix = torch.randn(SHAPE, generator=generator)
            matrix += change * torch.nn.functional.normalize(torch.ones(SHAPE), dim=None, p=2)
            kind = ("up_proj", "down_proj")[number % 2]  # of what writes into the residual stream, directions are kept
            weights[f"model.layers.{shard}.mlp.experts.{number}.{kind}.weight"] = matrix
        file = f"model-{shard:05}.safetensors"
        save_file(weights, folder / file)
        weight_map |= dict.fromkeys(weights, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text("{}")


@pytest.mark.parametrize("intruder_side", [64, 1024])
def test_checkpoints_larger_than_the_memory_limit_are_compared_key_by_key(tmp_path, intruder_side):
    """All measures, intruders as a bound and exactly."""
    for name, n_shards in (("one", 1), ("all", N_SHARDS)):
        sharded(tmp_path / name / "base", 0.0, n_shards), sharded(tmp_path / name / "tuned", 3.0, n_shards)
    assert sum(file.stat().st_size for file in tmp_path.glob("all/*/*.safetensors")) > 2.4 * LIMIT_MB * MEGABYTE
    one_thread = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1048576"}
    command = [sys.executable, "-c", COMPARE, tmp_path, str(intruder_side)]
    done = subprocess.run(command, env=one_thread, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 40,
}
GPT2_SMALL = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 40}
ARCHITECTURES = {
    "gpt2": GPT2_SMALL,
    "gptj": GPT2_SMALL | {"rotary_dim": 4},
    "llama": SMALL,
    "qwen2": SMALL,
    "gemma2": SMALL | {"head_dim": 8},
    "gpt_neox": SMALL,
    "phi": SMALL | {"num_key_value_heads": 2},
    "olmo2": SMALL,
    "mixtral": SMALL | {"num_local_experts": 2},
    "opt": {"hidden_size": 16, "ffn_dim": 24, "word_embed_proj_dim": 16, "num_hidden_layers": 2}
    | {"num_attention_heads": 2, "vocab_size": 40, "max_position_embeddings": 32},
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40},
    "falcon": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40},
    "mamba": {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "vocab_size": 40},
}


def compared(base: Path, tuned: Path, **settings) -> dict[str, list[dict]]:
    pair = WeightPair.of_folders(base, tuned)
    found = run(Inputs(METHOD, {Need.WEIGHTS: lambda: pair}), WeightDiffSettings(token_rows=0, **settings))
    for spec in METHOD.tables:
        spec.check(found[spec.name])
    return {name: table.to_pylist() for name, table in found.items()}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_no_stock_architecture_gives_an_empty_result(tmp_path, kind, monkeypatch):
    """NeuroDiff asked for Llama's projections inside GPT-2's container: nothing, or a crash, on every stock model."""
    monkeypatch.setattr("diffing_core.methods.weight_diff.measuring.read_directions", lambda *_: ([], []))
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **ARCHITECTURES[kind], pad_token_id=0, bos_token_id=1, eos_token_id=1)
    model = AutoModelForCausalLM.from_config(config).float()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight))
    model.save_pretrained(tmp_path / "tuned")
    rows = {row["name"]: row for row in compared(tmp_path / "base", tmp_path / "tuned")[TENSORS.name]}
    stored = {}
    for name, before in load_file(tmp_path / "base" / "model.safetensors").items():
        change = load_file(tmp_path / "tuned" / "model.safetensors")[name].double() - before.double()
        stored[name] = change.norm().item()
    assert sorted(row["frobenius"] for row in rows.values()) == pytest.approx(sorted(stored.values()), rel=1e-5)
    for row in rows.values():
        assert row["status"] == "compared"
        if len(row["shape"]) == 2:
            assert 0 < row["spectral"] <= row["nuclear"] and row["effective_rank"] >= 1
    parts = {row["part"] for row in rows.values()}
    assert {"attn", "norm", "embed"} <= parts and "other" not in parts
    assert kind == "mamba" or "mlp" in parts
    assert {row["layer"] for row in rows.values()} == {None, 0, 1}


def test_an_unknown_architecture_is_compared_whole(tmp_path):
    generator = torch.Generator().manual_seed(0)
    weights = {
        "strange.3.thing.kernel": torch.randn(6, 5, generator=generator),
        "strange.conv.weight": torch.randn(4, 3, 2, generator=generator),
        "gate": torch.tensor(2.0),
        "shift": torch.zeros(7),
    }
    for name, scale in (("base", 1.0), ("tuned", 1.5)):
        (tmp_path / name).mkdir()
        changed = {key: value * scale + (scale - 1) for key, value in weights.items()}
        save_file(changed, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "never_heard_of"}))
    found = compared(tmp_path / "base", tmp_path / "tuned")
    rows = {row["name"]: row for row in found[TENSORS.name]}
    assert rows.keys() == weights.keys() and {row["part"] for row in rows.values()} == {"other"}
    for name, before in weights.items():
        assert rows[name]["frobenius"] == pytest.approx((before * 0.5 + 0.5).norm().item(), rel=1e-5)
    assert {row["name"] for row in found[SPECTRUM.name]} == {"strange.3.thing.kernel"}
