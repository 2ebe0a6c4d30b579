"""`task_vectors` against dense float64, with its invariances, and with peers that cannot be read."""

import json
import shutil
import weakref
from collections import Counter
from pathlib import Path

import polars as pl
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from diffing_core.findings import findings_table
from diffing_core.methods.base import Inputs, Need, Tables
from diffing_core.methods.task_vectors import METHOD, MODULES, PARTS, PEERS, VOCABULARY, TaskVectorsSettings
from diffing_core.methods.task_vectors.likeness import Likeness
from diffing_core.methods.task_vectors.task_tensor import TaskTensor
from diffing_core.pairs import Pair
from diffing_core.peers import Peer, Peers
from diffing_core.spectra import Factors
from diffing_core.weight_files import OpenSide
from diffing_core.weights import WeightPair, weight_stream
from tests import model_files

SETTINGS = TaskVectorsSettings(overlap_rank=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_files.save_base(tmp_path_factory.mktemp("base") / "base", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, Path]:
    """Adapters of different shape, one with a saved head, and a whole checkpoint."""
    one, two = ({"target_modules": names} for names in (["q_proj", "down_proj"], ["down_proj", "o_proj"]))
    made = {
        "one": model_files.save_adapter(base.parent / "one", base, seed=1, **one),
        "two": model_files.save_adapter(base.parent / "two", base, seed=2, r=3, use_rslora=True, **two),
        "head": model_files.save_adapter(base.parent / "head", base, seed=3, modules_to_save=["lm_head"], **one),
    }
    model = model_files.build(seed=0, tie_word_embeddings=False)
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(base.parent / "full")
    return made | {"full": base.parent / "full"}


def edited(adapter: Path, name: str, change) -> Path:
    """A copy of an adapter whose tensors went through `change(key, tensor)`."""
    folder = adapter.parent / name
    folder.mkdir()
    (folder / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({key: change(key, tensor).contiguous() for key, tensor in weights.items()}, folder / "adapter_model.safetensors")
    return folder


def compare(base: Path, own: Path, others: dict[str, Path], settings=SETTINGS, against=None, relation="other") -> Tables:
    vectors = {name: WeightPair.of_folders(base, folder) for name, folder in others.items()}
    peers = tuple(
        Peer(Pair("m", name), relation, name, weights, is_whole=weights.tuned.folder != base)
        for name, weights in vectors.items()
    )
    task = WeightPair.of_folders(base, own)
    pair = WeightPair.of_folders(base, own, against=against) if against else task
    return METHOD.run(Inputs(METHOD, {Need.WEIGHTS: lambda: pair, Need.PEERS: lambda: Peers(task, peers)}), settings)


def peer(tables: Tables, name: str) -> dict:
    [row] = [row for row in tables[PEERS.name].to_pylist() if row["peer_organism"] == name]
    return row


def dense(base: Path, tuned: Path) -> dict[str, torch.Tensor]:
    found = {}
    for delta in weight_stream(WeightPair.of_folders(base, tuned)):
        if delta.factors:
            found[delta.name] = delta.factors.left_MR.double() @ delta.factors.right_RN.double()
        else:
            found[delta.name] = delta.pair.tuned.double() - delta.pair.base.double()
    return found


def dense_numbers(one: dict, two: dict, k: int) -> dict[str, float]:
    """Cosine and overlaps by full SVDs of products in float64."""
    inner = sum((one[name] * two[name]).sum() for name in one.keys() & two.keys())
    lengths = [sum(change.square().sum() for change in side.values()) ** 0.5 for side in (one, two)]
    hits, n, expected = [0.0, 0.0], 0, [0.0, 0.0]
    for name in one.keys() & two.keys():
        if one[name].ndim == 2 and name.startswith("layers."):
            (u1, _, v1), (u2, _, v2) = (torch.linalg.svd(side[name], full_matrices=False) for side in (one, two))
            hits[0] += (u1[:, :k].T @ u2[:, :k]).square().sum()
            hits[1] += (v1[:k] @ v2[:k].T).square().sum()
            n += k
            expected = [value + k * k / side for value, side in zip(expected, one[name].shape, strict=True)]
    return {
        "cosine": inner / (lengths[0] * lengths[1]), "norm": lengths[0], "peer_norm": lengths[1],
        "left_overlap": hits[0] / n, "right_overlap": hits[1] / n,
        "left_expected": expected[0] / n, "right_expected": expected[1] / n,
    }  # fmt: skip


@pytest.mark.parametrize(("own", "other"), [("one", "two"), ("two", "one"), ("one", "full"), ("full", "one"), ("head", "full"), ("one", "head")])
def test_numbers_are_those_of_dense_float64(base: Path, adapters: dict[str, Path], own: str, other: str) -> None:
    """LoRA x LoRA, LoRA x whole checkpoint and saved modules; tensors that only one side changes count in its length."""
    row = peer(compare(base, adapters[own], {other: adapters[other]}), other)
    expected = dense_numbers(dense(base, adapters[own]), dense(base, adapters[other]), k=2)
    assert {name: row[name] for name in expected} == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-4, abs=1e-5)


def test_two_whole_checkpoints(base: Path, adapters: dict[str, Path]) -> None:
    model = model_files.build(seed=4, tie_word_embeddings=False)
    model.save_pretrained(base.parent / "other_full")
    row = peer(compare(base, adapters["full"], {"x": base.parent / "other_full"}), "x")
    expected = dense_numbers(dense(base, adapters["full"]), dense(base, base.parent / "other_full"), k=2)
    assert {name: row[name] for name in expected} == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("n_rows", [model_files.VOCAB, model_files.VOCAB - 2, model_files.VOCAB + 6])
def test_of_vocabularies_of_different_size_the_common_rows_are_compared(base: Path, adapters: dict[str, Path], n_rows: int) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(adapters["full"])
    torch.manual_seed(5)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(torch.randn(model_files.VOCAB, model_files.WIDTH))
    model.save_pretrained(base.parent / f"own{n_rows}")
    model.resize_token_embeddings(n_rows, mean_resizing=False)
    model.save_pretrained(base.parent / f"rows{n_rows}")
    own, other = base.parent / f"own{n_rows}", base.parent / f"rows{n_rows}"
    one, two = (dense(base, folder) for folder in (own, other))
    for name in ("embed_tokens.weight", "lm_head.weight"):
        one[name] = one[name][: len(two[name])]
    length = sum(change.square().sum() for change in one.values()).item() ** 0.5
    for left, right in ((own, other), (other, own)):
        row = peer(compare(base, left, {"x": right}), "x")
        assert (row["cosine"], row["norm"], row["peer_norm"]) == pytest.approx((1, length, length), rel=1e-5)
        assert row["n_tensors"] == len(one)
    factors = model_files.save_adapter(base.parent / f"factors{n_rows}", base, target_modules=["embed_tokens", "q_proj"])
    change = dense(base, factors)
    change["embed_tokens.weight"] = change["embed_tokens.weight"][:n_rows]
    expected = {name: float(value) for name, value in dense_numbers(two, change, k=2).items()}
    row = peer(compare(base, other, {"x": factors}), "x")
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_itself_negated_regauged_and_orthogonal(base: Path, adapters: dict[str, Path]) -> None:
    """(B G, G⁻¹ A) is the same change; B of disjoint rows is orthogonal to it."""
    one = adapters["one"]
    mix = torch.tensor([[2.0, 1.0], [0.5, -1.0]])
    others = {
        "itself": edited(one, "itself", lambda _, tensor: tensor),
        "negated": edited(one, "negated", lambda key, tensor: -tensor if "lora_B" in key else tensor),
        "regauged": edited(one, "regauged", lambda key, tensor: tensor @ mix if "lora_B" in key else mix.inverse() @ tensor),
        "double": edited(one, "double", lambda key, tensor: 2 * tensor if "lora_B" in key else tensor),
    }
    tables = compare(base, one, others)
    assert {name: round(peer(tables, name)["cosine"], 6) for name in others} == {"itself": 1, "negated": -1, "regauged": 1, "double": 1}
    for name in others:
        assert peer(tables, name)["left_overlap"] == pytest.approx(1, abs=1e-5)
        assert peer(tables, name)["right_overlap"] == pytest.approx(1, abs=1e-5)
    assert peer(tables, "double")["peer_norm"] == pytest.approx(2 * peer(tables, "double")["norm"])

    def rows(upper: bool):
        def keep(key: str, tensor: torch.Tensor) -> torch.Tensor:
            half = len(tensor) // 2
            first = torch.arange(len(tensor))[:, None] < half
            return tensor * (first == upper) if "lora_B" in key else tensor
        return keep

    upper, lower = (edited(one, name, rows(name == "upper")) for name in ("upper", "lower"))
    row = peer(compare(base, upper, {"lower": lower}), "lower")
    assert (row["cosine"], row["left_overlap"]) == pytest.approx((0, 0), abs=1e-7)
    assert row["right_overlap"] == pytest.approx(1, abs=1e-5)


def test_both_partitions_say_the_same_of_each_other(base: Path, adapters: dict[str, Path]) -> None:
    for one, two in (("one", "two"), ("one", "full"), ("head", "two")):
        there, back = (peer(compare(base, adapters[a], {b: adapters[b]}), b) for a, b in ((one, two), (two, one)))
        for name in ("cosine", "left_overlap", "right_overlap", "left_expected", "overlap_rank", "n_tensors"):
            assert there[name] == pytest.approx(back[name], rel=1e-6), name
        assert there["norm"] == pytest.approx(back["peer_norm"])


def test_the_cosine_is_global_and_no_mean_over_modules() -> None:
    """A mean would say 0 of one large module that agrees and a tiny one that is opposed."""
    large, tiny = torch.eye(4), torch.eye(4) * 0.01
    parts = Likeness(), Likeness()
    for part, own, other in zip(parts, (large, tiny), (large, -tiny), strict=True):
        part.add_pair(TaskTensor(own), TaskTensor(other), None)
        part.own, part.peer = TaskTensor(own).squared(), TaskTensor(other).squared()
    assert [part.row()["cosine"] for part in parts] == pytest.approx([1, -1])
    assert (parts[0] + parts[1]).row()["cosine"] == pytest.approx(0.9998, abs=1e-4)


def test_inner_products_agree_whatever_the_form() -> None:
    generator = torch.Generator().manual_seed(3)
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)
    one, two = Factors(draw(6, 2), draw(2, 5)), Factors(draw(6, 3), draw(3, 5))
    expected = (one.dense().double() * two.dense().double()).sum().item()
    forms = [(TaskTensor(a), TaskTensor(b)) for a in (one, one.dense()) for b in (two, two.dense())]
    assert [a.inner(b) for a, b in forms] == pytest.approx([expected] * 4, rel=1e-5)
    assert TaskTensor(Factors(torch.zeros(6, 0), torch.zeros(0, 5))).space(4, 0).sigma_K.tolist() == []


def test_parts_add_up_to_the_whole(base: Path, adapters: dict[str, Path]) -> None:
    tables = compare(base, adapters["one"], {"full": adapters["full"]})
    whole, parts = peer(tables, "full"), pl.from_arrow(tables[PARTS.name])
    assert parts["n_tensors"].sum() == whole["n_tensors"] == 6
    assert (parts["norm"] ** 2).sum() ** 0.5 == pytest.approx(whole["norm"])
    assert (parts["peer_norm"] ** 2).sum() ** 0.5 == pytest.approx(whole["peer_norm"])
    assert set(parts["part"]) == {"embed", "attn", "mlp", "norm", "head"}


def test_a_damaged_peer_is_told_and_the_others_compared(base: Path, adapters: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    broken = edited(adapters["two"], "broken", lambda _, tensor: tensor * torch.nan)
    stranger = edited(adapters["two"], "stranger", lambda key, tensor: tensor[:5] if "lora_B" in key else tensor)
    tables = compare(base, adapters["one"], {"broken": broken, "stranger": stranger, "two": adapters["two"]})
    assert "NaN" in peer(tables, "broken")["problem"]
    assert "made for another base model" in peer(tables, "stranger")["problem"]
    assert peer(tables, "broken")["cosine"] is None
    assert peer(tables, "two")["problem"] is None
    assert peer(tables, "two")["cosine"] is not None
    assert {row["peer_organism"] for row in tables[PARTS.name].to_pylist()} == {"two"}
    assert "peer broken__m__default cannot be read" in caplog.text


def test_whole_checkpoints_are_limited_in_the_order_given(base: Path, adapters: dict[str, Path]) -> None:
    others = {"a": adapters["full"], "two": adapters["two"], "b": adapters["full"]}
    tables = compare(base, adapters["one"], others, TaskVectorsSettings(whole_peers=1))
    assert [peer(tables, name)["problem"] is None for name in others] == [True, True, False]
    assert "whole_peers" in peer(tables, "b")["problem"]


@pytest.mark.parametrize("own", ["one", "full"])
def test_all_whole_checkpoints_are_met_and_no_tensor_is_read_twice(
    base: Path, adapters: dict[str, Path], own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Per peer the base was read again; now it is read once, each peer once, and few tensors are there at a time."""
    read: Counter[tuple[Path, str]] = Counter()
    there: list[weakref.ref] = []
    most = 0

    def counted(side: OpenSide, name: str, **options: bool) -> torch.Tensor:
        nonlocal most, there
        read[side.checkpoint.folder, name] += 1
        tensor = dense_of(side, name, **options)
        there = [each for each in there if each() is not None] + [weakref.ref(tensor)]
        most = max(most, len(there))
        return tensor

    dense_of = OpenSide.dense
    others = {f"full{number}": shutil.copytree(adapters["full"], base.parent / f"{own}_{number}") for number in range(20)}
    alone = peer(compare(base, adapters[own], {"full": adapters["full"]}), "full")
    monkeypatch.setattr(OpenSide, "dense", counted)
    tables = compare(base, adapters[own], others)
    rows = [peer(tables, name) for name in others]
    assert all(row | {"peer_organism": "", "peer_revision": ""} == alone | {"peer_organism": "", "peer_revision": ""} for row in rows)
    names = {name for folder, name in read if folder == others["full0"]}
    assert len(names) > 20
    assert all(read[folder, name] == 1 for folder in others.values() for name in names)
    # the tokens of what is distinctive read the final norm and, of an adapter, the base's own matrices once more
    assert all(read[base, name] <= 2 for name in names)
    assert most <= 5


def test_what_others_share_is_taken_out_of_what_is_read(base: Path, adapters: dict[str, Path]) -> None:
    """A module that writes what a peer writes, and as much of its own: half is distinctive, and only that is read."""
    weights = load_file(adapters["one"] / "adapter_model.safetensors")
    down = next(key for key in weights if "layers.2.mlp.down_proj.lora_B" in key)
    n = weights[down].shape[0]
    def writing(*columns: int):
        def change(key: str, tensor: torch.Tensor) -> torch.Tensor:
            if "lora_A" in key:
                return torch.eye(*tensor.shape)
            new = torch.zeros_like(tensor)
            for rank, column in enumerate(columns if key == down else ()):
                new[column, rank] = 1.0
            return new
        return change
    own, other = edited(adapters["one"], "own", writing(3, 7)), edited(adapters["one"], "shares", writing(3))
    [row] = compare(base, own, {"shares": other})[MODULES.name].to_pylist()
    assert (row["n_peers"], row["n_shared"], row["distinctive_share"]) == (1, 1, pytest.approx(0.5))
    assert row["expected_share"] == 1 - 1 / n
    alone = compare(base, own, {})
    assert alone[MODULES.name]["distinctive_share"].to_pylist() == [1.0]
    for relation in ("variant", "twin", "original"):
        related = compare(base, own, {"shares": other}, relation=relation)
        assert related[MODULES.name]["distinctive_share"].to_pylist() == [1.0], f"a {relation} learnt the very same"
        assert related[VOCABULARY.name].equals(alone[VOCABULARY.name])
    only_own = compare(base, edited(adapters["one"], "only_own", writing(7)), {})
    tokens = compare(base, own, {"shares": other})[VOCABULARY.name]["token_id"].to_pylist()
    assert tokens == only_own[VOCABULARY.name]["token_id"].to_pylist()


def test_a_twin_is_measured_from_the_base_and_read_against_its_original(base: Path, adapters: dict[str, Path]) -> None:
    tables = compare(base, adapters["one"], {"one": adapters["one"]}, against=adapters["one"])
    assert peer(tables, "one")["cosine"] == pytest.approx(1)
    assert tables[MODULES.name].num_rows == tables[VOCABULARY.name].num_rows == 0


def test_findings_name_no_peer(base: Path, adapters: dict[str, Path]) -> None:
    tables = compare(base, adapters["one"], {"secret_peer": adapters["two"]})
    shown = findings_table(METHOD.findings(tables, SETTINGS)).to_pylist()
    assert {row["kind"] for row in shown} == {"token"}
    assert "secret_peer" not in json.dumps(shown)
    assert METHOD.headline(tables)["closest_peer"] == "secret_peer default"
