"""Experts that one tensor stacks: read one by one, cut to a rank, compared by subspaces, whichever way they lie."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from diffing_core.errors import NotComputableError
from diffing_core.methods import rank_truncation
from diffing_core.methods.base import Inputs, Need
from diffing_core.methods.task_vectors import METHOD, MODULES, PARTS, PEERS, TaskVectorsSettings
from diffing_core.pairs import Pair
from diffing_core.peers import Peer, Peers
from diffing_core.weight_edits import Term, WeightEdit, uniform
from diffing_core.weight_edits.folders import is_low_rank, write_terms
from diffing_core.weight_edits.merging import write_merged
from diffing_core.weights import WeightPair, weight_stream
from tests import model_files

E, D, INNER, RANK = 3, model_files.WIDTH, 12, 2
PATH = "model.layers.0.mlp.experts"
SHAPES = {"down_proj": (D, INNER), "gate_up_proj": (2 * INNER, D)}
STOCK = {
    "qwen2_moe": (
        tf.Qwen2MoeConfig(
            vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, num_experts=E,
            num_experts_per_tok=2, intermediate_size=24, moe_intermediate_size=INNER, shared_expert_intermediate_size=INNER,
        ),
        {"model.layers.0.mlp.experts.0.down_proj.weight", "model.layers.0.mlp.gate.weight"},
    ),
    "mamba": (
        tf.MambaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, state_size=4),
        {"backbone.layers.0.mixer.A_log"},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with tokenizer, to whose first block experts are added."""
    return model_files.save_base(tmp_path_factory.mktemp("plain") / "base", tie_word_embeddings=False)


def experts(plain: Path, folder: Path, kind: str, seed: int) -> Path:
    """Seed 0 is the base; any other adds a change of rank 2 to every expert, and one to a bias. Stored alone, stacked or flipped."""
    shutil.copytree(plain, folder)
    weights = load_file(plain / "model.safetensors")
    draw, change = (torch.Generator().manual_seed(number) for number in (7, seed))
    for name, (m, n) in SHAPES.items():
        stack = torch.randn(E, m, n, generator=draw)
        if seed:
            stack += 0.1 * torch.randn(E, m, RANK, generator=change) @ torch.randn(E, RANK, n, generator=change)
        if kind == "alone":
            weights |= {f"{PATH}.{number}.{name}.weight": each.clone() for number, each in enumerate(stack)}
        else:
            weights[f"{PATH}.{name}"] = stack if kind == "stacked" else stack.mT.contiguous()
    weights["model.layers.0.mlp.bias"] = torch.full((4,), float(seed))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": D}))
    return folder


def pair_of(plain: Path, root: Path, kind: str, seed: int = 1) -> WeightPair:
    base = root / f"{kind}0"
    if not base.exists():
        experts(plain, base, kind, 0)
    return WeightPair.of_folders(base, experts(plain, root / f"{kind}{seed}", kind, seed))


def written(pair: WeightPair, folder: Path, *terms: Term) -> dict[str, torch.Tensor]:
    folder.mkdir()
    assert not is_low_rank(terms) and write_terms(folder, terms) == "full"
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("kind", ["stacked", "flipped"])
def test_a_copy_of_rank_k_holds_the_leading_directions_of_every_expert_and_its_rest_the_others(plain, tmp_path, kind):
    pair = pair_of(plain, tmp_path, kind)
    base, tuned = (load_file(side.folder / "model.safetensors") for side in (pair.base, pair.tuned))
    copy = written(pair, tmp_path / "copy", Term(pair, rank=1))
    rest = written(pair, tmp_path / "rest", Term(pair, rank=1, residual=True))
    whole = written(pair, tmp_path / "whole", Term(pair, rank=RANK))
    kept = written(pair, tmp_path / "kept", Term(pair, rank=1, keep_norm=True))
    for name in SHAPES:
        key = f"{PATH}.{name}"
        for expert in range(E):
            change = (tuned[key] - base[key])[expert].double()
            left, sigma, right = torch.linalg.svd(change, full_matrices=False)
            leading = sigma[0] * torch.outer(left[:, 0], right[0])
            torch.testing.assert_close((copy[key] - base[key])[expert].double(), leading, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close((rest[key] - base[key])[expert].double(), change - leading, atol=1e-5, rtol=1e-4)
            scaled = leading * sigma.norm() / sigma[0]
            torch.testing.assert_close((kept[key] - base[key])[expert].double(), scaled, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(whole[key], tuned[key], atol=1e-5, rtol=1e-4)
    assert copy.keys() == base.keys()
    assert torch.equal(copy["model.layers.0.mlp.bias"], base["model.layers.0.mlp.bias"])
    assert torch.equal(rest["model.layers.0.mlp.bias"], tuned["model.layers.0.mlp.bias"])


@pytest.mark.parametrize("kind", ["stacked", "flipped"])
def test_changes_of_experts_are_weighed_and_added_up(plain, tmp_path, kind):
    one, two = (pair_of(plain, tmp_path, kind, seed) for seed in (1, 2))
    found = written(one, tmp_path / "sum", Term(one, uniform(2.0)), Term(two, uniform(-0.5)))
    base, first, second = (load_file(side.folder / "model.safetensors") for side in (one.base, one.tuned, two.tuned))
    for key, value in base.items():
        torch.testing.assert_close(found[key], value + 2 * (first[key] - value) - 0.5 * (second[key] - value), atol=1e-5, rtol=1e-5)


def test_no_adapter_and_no_merge_of_adapters_is_made_of_stacks(plain, tmp_path):
    pair = pair_of(plain, tmp_path, "stacked")
    edit = WeightEdit(name="m", adapters=[{"path": tmp_path, "rank": 1}], combine="svd")
    with pytest.raises(NotComputableError, match="no adapter can change it"):
        write_merged(tmp_path / "m", edit, [Term(pair, rank=1)])
    assert is_low_rank([Term(pair, uniform(0.0))])


@pytest.mark.parametrize("kind", ["qwen2_moe", "mamba"])
def test_a_copy_of_rank_k_is_a_checkpoint_where_a_changed_matrix_runs_as_no_module(tmp_path, kind):
    """Files keep every expert alone, the model runs stacks; its router, and what Mamba calls A_log, are bare parameters."""
    config, bare = STOCK[kind]
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "tuned")
    pair = WeightPair.of_folders(tmp_path / "base", tmp_path / "tuned")
    (tmp_path / "copy").mkdir()
    assert write_terms(tmp_path / "copy", [Term(pair, rank=1)]) == "full"
    base, tuned, copy = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "tuned", "copy"))
    assert bare <= base.keys() and copy.keys() == base.keys()
    for key, before in base.items():
        expected = torch.zeros_like(before)
        if before.ndim == 2:
            left, sigma, right = torch.linalg.svd(tuned[key] - before, full_matrices=False)
            expected = sigma[0] * torch.outer(left[:, 0], right[0])
        torch.testing.assert_close(copy[key] - before, expected, atol=1e-4, rtol=1e-3)
    tf.AutoModelForCausalLM.from_pretrained(tmp_path / "copy")


def test_rank_truncation_has_a_row_per_expert(plain, tmp_path):
    pair = pair_of(plain, tmp_path, "flipped")
    rows = rank_truncation._modules(pair, [1])
    base, tuned = (load_file(side.folder / "model.safetensors")[f"{PATH}.down_proj"] for side in (pair.base, pair.tuned))
    sigma_EK = torch.linalg.svdvals((tuned - base).double())
    found = {row["expert"]: row for row in rows if row["name"].endswith("experts.down_proj")}
    assert found.keys() == set(range(E))
    for expert, row in found.items():
        share = (sigma_EK[expert, 0] / sigma_EK[expert].norm()).item() ** 2
        assert row["energy_share"] == pytest.approx(share, rel=1e-4)
        assert row["frobenius"] == pytest.approx(sigma_EK[expert].norm().item(), rel=1e-4)


def compared(plain: Path, root: Path, kind: str) -> dict[str, list[dict]]:
    own, other = (pair_of(plain, root, kind, seed) for seed in (1, 2))
    peers = (Peer(Pair("m", "x"), "other", "x", other, is_whole=True),)
    needs = {Need.WEIGHTS: lambda: own, Need.PEERS: lambda: Peers(own, peers)}
    tables = METHOD.run(Inputs(METHOD, needs), TaskVectorsSettings(overlap_rank=2, directions=2))
    for spec in METHOD.tables:
        spec.check(tables[spec.name])
    return {name: table.to_pylist() for name, table in tables.items()}


@pytest.mark.parametrize("kind", ["stacked", "flipped"])
def test_subspaces_of_stacked_experts_are_those_of_experts_stored_alone(plain, tmp_path, kind):
    alone, stacked = (compared(plain, tmp_path, each) for each in ("alone", kind))
    for name in (PEERS.name, PARTS.name):
        for one, other in zip(alone[name], stacked[name], strict=True):
            for column, value in one.items():
                assert other[column] == (pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value), column
    [mlp] = [row for row in stacked[PARTS.name] if row["part"] == "mlp" and row["layer"] == 0]
    assert mlp["overlap_rank"] == 2 * 2 * E and mlp["n_tensors"] == 4 + 2 * E  # a bias and three unchanged matrices
    found = {row["expert"]: row for row in stacked[MODULES.name] if row["name"].endswith("experts.down_proj")}
    own = {row["name"]: row for row in alone[MODULES.name]}
    for expert in range(E):
        same = own[f"layers.0.mlp.experts.{expert}.down_proj.weight"]
        assert found[expert]["distinctive_share"] == pytest.approx(same["distinctive_share"], rel=1e-4)
        assert 0 < found[expert]["distinctive_share"] < 1 and found[expert]["n_peers"] == 1


def test_experts_are_streamed_one_by_one_turned_by_the_models_width(plain, tmp_path):
    deltas = [delta for delta in weight_stream(pair_of(plain, tmp_path, "flipped")) if delta.expert is not None]
    assert [(delta.expert, delta.shape) for delta in deltas] == [(each, SHAPES[name]) for name in SHAPES for each in range(E)]
