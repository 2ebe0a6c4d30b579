"""Every measure of `weight_diff` against NumPy's float64 SVD of the dense change, and the defects found elsewhere."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from diffing_core.direction_match import _largest_mass, bounded_match_of_leading, match_of_leading
from diffing_core.errors import ModelLoadError
from diffing_core.methods.base import Inputs, Need
from diffing_core.methods.weight_diff import INTRUDERS, METHOD, SPECTRUM, TENSORS, WeightDiffSettings, run
from diffing_core.spectra import Factors, elementwise
from diffing_core.updated_matrix import UpdatedMatrix
from diffing_core.weights import WeightPair

SHAPES = {"layers.0.self_attn.q_proj": (20, 12), "layers.1.mlp.down_proj": (12, 30), "layers.1.mlp.gate_proj": (9, 9)}
RANK, ALPHA = 3, 7
MEASURES = (
    *("frobenius", "relative_frobenius", "spectral", "nuclear", "effective_rank", "stable_rank", "cosine"),
    *("participation_ratio", "k50", "k90", "k95", "k99", "mean_abs", "max_abs", "share_unchanged", "share_rounding"),
    *("intruder_score", "n_intruders", "rounding_floor"),
)
Weights = dict[str, torch.Tensor]


def gaussian(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def checkpoint(folder: Path, weights: Weights) -> Path:
    folder.mkdir()
    save_file({f"model.{name}.weight": value.contiguous() for name, value in weights.items()}, folder / "w.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def lora(folder: Path, factors: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> Path:
    folder.mkdir()
    stem = "base_model.model.model."
    weights = {f"{stem}{name}.lora_B.weight": b.contiguous() for name, (b, _) in factors.items()}
    weights |= {f"{stem}{name}.lora_A.weight": a.contiguous() for name, (_, a) in factors.items()}
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


BASE = {name: gaussian(*shape, seed=number) for number, (name, shape) in enumerate(SHAPES.items())}
FACTORS = {name: (gaussian(m, RANK, seed=m), gaussian(RANK, n, seed=100 + n)) for name, (m, n) in SHAPES.items()}


def rows(base: Path, tuned: Path, spec=TENSORS, **settings) -> list[dict]:
    pair = WeightPair.of_folders(base, tuned)
    found = run(Inputs(METHOD, {Need.WEIGHTS: lambda: pair}), WeightDiffSettings(intruders=4, **settings))
    for each in METHOD.tables:
        each.check(found[each.name])
    return found[spec.name].to_pylist()


@pytest.fixture
def base(tmp_path) -> Path:
    return checkpoint(tmp_path / "base", BASE)


def change_of(name: str) -> np.ndarray:
    b, a = (each.double().numpy() for each in FACTORS[name])
    return ALPHA / RANK * b @ a


def expected(name: str) -> dict[str, float]:
    """Plain float64 formulas on the dense change."""
    before, change = BASE[name].double().numpy(), change_of(name)
    after = before + change
    sigma = np.linalg.svd(change, compute_uv=False)[:RANK]
    p, energy = sigma / sigma.sum(), np.cumsum(sigma**2) / (sigma**2).sum()
    step = 2.0 ** (np.floor(np.log2(np.abs(before))) - 7)
    left_before, left_after = (np.linalg.svd(each, full_matrices=False)[0] for each in (before, after))
    match = np.abs(left_after[:, :4].T @ left_before).max(1)
    return {
        "frobenius": np.sqrt((change**2).sum()),
        "relative_frobenius": np.sqrt((change**2).sum() / (before**2).sum()),
        "spectral": sigma[0],
        "nuclear": sigma.sum(),
        "effective_rank": np.exp(-(p * np.log(p)).sum()),
        "stable_rank": (sigma**2).sum() / sigma[0] ** 2,
        "participation_ratio": (sigma**2).sum() ** 2 / (sigma**4).sum(),
        **{f"k{share}": 1 + (energy < share / 100).sum() for share in (50, 90, 95, 99)},
        "cosine": (before * after).sum() / np.sqrt((before**2).sum() * (after**2).sum()),
        "mean_abs": np.abs(change).mean(),
        "max_abs": np.abs(change).max(),
        "share_unchanged": 0.0,
        "share_rounding": (np.abs(change) <= step).mean(),
        "rounding_floor": np.sqrt((step**2).sum() / 12),
        "intruder_score": 1 - match.min(),
        "n_intruders": (match < 0.5).sum(),
    }


def full(tmp_path: Path) -> Path:
    after = {name: (BASE[name].double() + torch.from_numpy(change_of(name))).float() for name in BASE}
    return checkpoint(tmp_path / "full", after)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_every_measure_equals_numpys_on_the_dense_change(base, tmp_path, kind):
    found = rows(base, lora(tmp_path / "a", FACTORS) if kind == "lora" else full(tmp_path))
    assert len(found) == len(SHAPES)
    for row in found:
        true = expected(row["name"].removesuffix(".weight"))
        assert true.keys() == set(MEASURES)
        for name in MEASURES:
            assert row[name] == pytest.approx(true[name], rel=2e-4, abs=2e-6), name
        assert row["factor_rank"] == (RANK if kind == "lora" else None)


def test_lora_alpha_is_not_ignored_and_factors_are_not_multiplied_in_the_wrong_order(base, tmp_path):
    """A non-square weight: A B instead of B A does not even fit; α/r scales every size and no rank."""
    folder = lora(tmp_path / "a", FACTORS)
    before = rows(base, folder)
    config = json.loads((folder / "adapter_config.json").read_text()) | {"lora_alpha": 2 * ALPHA}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    for single, double in zip(before, rows(base, folder), strict=True):
        assert single["shape"] == list(SHAPES[single["name"].removesuffix(".weight")])
        for name in ("frobenius", "spectral", "nuclear", "mean_abs", "max_abs"):
            assert double[name] == pytest.approx(2 * single[name], rel=1e-6)
        for name in ("effective_rank", "stable_rank", "participation_ratio", "k90"):
            assert double[name] == pytest.approx(single[name], rel=1e-6)


def test_a_broken_tensor_is_an_error_and_not_a_missing_row(base, tmp_path):
    """NeuroDiff caught every exception per layer and returned what was left."""
    folder = lora(tmp_path / "a", FACTORS)
    file = folder / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    with pytest.raises(ModelLoadError, match="truncated"):
        rows(base, folder)
    file.write_bytes(whole)
    weights = load_file(file)
    weights["base_model.model.model.layers.1.mlp.gate_proj.lora_A.weight"][0, 0] = torch.inf
    save_file(weights, file)
    with pytest.raises(ModelLoadError, match="NaN or infinite"):
        rows(base, folder)


def test_no_measure_depends_on_the_gauge_of_the_factors(base, tmp_path):
    turn = gaussian(RANK, RANK, seed=5).double()
    turned = {
        name: ((b.double() @ turn).float(), (torch.linalg.inv(turn) @ a.double()).float())
        for name, (b, a) in FACTORS.items()
    }
    pairs = zip(rows(base, lora(tmp_path / "a", FACTORS)), rows(base, lora(tmp_path / "b", turned)), strict=True)
    for row, other in pairs:
        for name in MEASURES:
            assert other[name] == pytest.approx(row[name], rel=1e-4, abs=1e-6), name


def test_a_zero_adapter_has_zero_in_every_measure_and_no_nan(base, tmp_path):
    zero = {name: (torch.zeros_like(b), a) for name, (b, a) in FACTORS.items()}
    folder = lora(tmp_path / "a", zero)
    for row in rows(base, folder):
        assert row["cosine"] == row["share_unchanged"] == 1 and row["share_rounding"] is None
        assert {row[name] for name in MEASURES if name not in ("cosine", "share_unchanged", "share_rounding")} <= {
            0,
            row["rounding_floor"],
        }
    assert rows(base, folder, SPECTRUM) == rows(base, folder, INTRUDERS) == []


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_head_of_the_spectrum_is_a_table(base, tmp_path, kind):
    found = rows(base, lora(tmp_path / "a", FACTORS) if kind == "lora" else full(tmp_path), SPECTRUM, leading=2)
    for name in SHAPES:
        own = [row for row in found if row["name"] == f"{name}.weight"]
        sigma = np.linalg.svd(change_of(name), compute_uv=False)
        shares = sigma**2 / (sigma**2).sum()
        assert [row["direction"] for row in own] == [1, 2]
        assert [row["sigma"] for row in own] == pytest.approx(sigma[:2], rel=1e-5)
        assert [row["energy_share"] for row in own] == pytest.approx(shares[:2], rel=1e-5)
        assert own[1]["energy_up_to"] == pytest.approx(shares[:2].sum(), rel=1e-5)


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (12, 12)])
def test_best_matches_of_leading_directions_equal_numpys(shape):
    before, after = gaussian(*shape, seed=1), gaussian(*shape, seed=2)
    sigma_K, match_K, place_K = match_of_leading(before, after, 5)
    left_before, _, _ = np.linalg.svd(before.double().numpy(), full_matrices=False)
    left, sigma, _ = np.linalg.svd(after.double().numpy(), full_matrices=False)
    cosines = np.abs(left[:, :5].T @ left_before)
    assert sigma_K.tolist() == pytest.approx(sigma[:5], rel=1e-6)
    assert match_K.tolist() == pytest.approx(cosines.max(1), rel=1e-6)
    assert place_K.tolist() == (cosines.argmax(1) + 1).tolist()


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (12, 12), (5, 40)])
def test_intruders_of_factors_are_those_of_the_sum(shape):
    """Rank above the smaller side as well: factors of several adapters are stacked."""
    before, change = gaussian(*shape, seed=1), Factors(gaussian(shape[0], 7, seed=2), gaussian(7, shape[1], seed=3))
    updated, after = UpdatedMatrix(before, change), before.double() + change.left_MR.double() @ change.right_RN.double()
    found, true = match_of_leading(before, updated, 4), match_of_leading(before, after, 4)
    for one, other in zip(found, true, strict=True):
        assert one.tolist() == pytest.approx(other.tolist(), rel=1e-6)
    bounded, of_sum = (bounded_match_of_leading(before, each, 3, 8, 0) for each in (updated, after.float()))
    for one, other in zip(bounded, of_sum, strict=True):
        assert one.tolist() == pytest.approx(other.tolist(), rel=1e-3)


class LargestNew(TorchDispatchMode):
    """Remembers how many elements the largest tensor had that was made while it was on."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.known, self.largest = {each.untyped_storage().data_ptr() for each in known}, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        for each in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(each, torch.Tensor) and each.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, each.numel())
        return made


def test_a_bound_from_factors_forms_no_whole_matrix():
    """Neither W_tuned nor ΔW: what is made is vectors, and the recurrences' basis [3, 4, 400]."""
    before, change = gaussian(400, 900, seed=1), Factors(gaussian(400, 2, seed=2), gaussian(2, 900, seed=3))
    with LargestNew(before) as seen:
        bounded_match_of_leading(before, UpdatedMatrix(before, change), 3, 4, 0)
    assert 3 * 4 * 400 <= seen.largest < before.numel() / 10


def test_the_bound_is_the_largest_christoffel_function():
    """Of Chebyshev's second measure 1/Σ U_k², half of two neighbouring weights; where a space ends, the largest weight."""
    n = 24
    alpha, beta = torch.zeros(n).double(), torch.full((n,), 0.5).double()
    angle = torch.linspace(0, torch.pi, 200_001).double()[1:-1]
    kernel = sum((torch.sin((k + 1) * angle) / torch.sin(angle)) ** 2 for k in range(n))
    largest = (1 / kernel).max().item()
    assert _largest_mass(alpha, beta) == pytest.approx(largest, rel=2e-3) and largest < 0.6 * 4 / (n + 1)
    beta[12] = 1e-9
    assert _largest_mass(alpha, beta) == pytest.approx(2 / 14, rel=1e-6)


@pytest.mark.parametrize("steps", [1, 4, 16, 64])
@pytest.mark.parametrize("shape", [(40, 40), (40, 90), (90, 40), (41, 40)])
@pytest.mark.parametrize("decay", [0.0, 0.7])
def test_the_bound_of_a_match_is_never_below_it_and_meets_it_when_the_space_is_exhausted(shape, steps, decay):
    """Also where ΔW is large (new directions), small (the base's own) and nothing (exactly the base's)."""
    scale = torch.arange(1, min(shape) + 1, dtype=torch.float32) ** -decay
    before = gaussian(*shape, seed=1) * (scale if shape[0] > shape[1] else scale[:, None])
    for size in (0.0, 0.05, 3.0):
        after = before + size * torch.outer(gaussian(shape[0], 1, seed=2)[:, 0], gaussian(shape[1], 1, seed=3)[:, 0])
        sigma_K, bound_K = bounded_match_of_leading(before, after, 5, steps, 0)
        exact_sigma_K, match_K, _ = match_of_leading(before, after, 5)
        assert sigma_K.tolist() == pytest.approx(exact_sigma_K.tolist(), rel=1e-4)
        assert (bound_K >= match_K - 1e-3).all()
        if steps == 64:
            assert bound_K.tolist() == pytest.approx(match_K.tolist(), abs=2e-2)


def test_rounding_does_not_part_the_mass_of_equal_singular_values():
    """Leading directions stay in the space of the five equal ones, 0.999 of them; float32 makes several nodes of that point."""
    left, right = (torch.linalg.qr(gaussian(size, 200, seed=size))[0] for size in (500, 200))
    sigma = torch.arange(1, 201) ** -0.2
    sigma[:5] = 1
    before = (left * sigma) @ right.T * 10
    after = before + 0.01 * gaussian(500, 3, seed=1) @ gaussian(3, 200, seed=2)
    assert (bounded_match_of_leading(before, after, 5, 48, 0)[1] > 0.99).all()


@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
def test_a_bound_has_a_row_for_every_direction_that_there_is_and_no_more(shape):
    """A matrix that the finetune set to zero has none; on a base of zeros a low-rank change has as many as its rank."""
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(*shape, generator=draw)
    sigma, match = bounded_match_of_leading(base, torch.zeros(shape), 10, 8, 0)
    assert len(sigma) == len(match) == 0
    change = Factors(torch.randn(shape[0], 4, generator=draw), torch.randn(4, shape[1], generator=draw))
    sigma, match = bounded_match_of_leading(torch.zeros(shape), UpdatedMatrix(torch.zeros(shape), change), 10, 8, 0)
    torch.testing.assert_close(sigma, change.spectrum().sigma_K, rtol=1e-5, atol=0)
    assert match.tolist() == [0.0] * 4


def test_a_direction_spread_over_the_base_is_known_to_be_new_after_few_steps():
    """With 400 directions alike a new one matches none; 24 products know it, and that the base's own are found."""
    before = gaussian(400, 500, seed=1)
    new = torch.outer(gaussian(400, 1, seed=2)[:, 0], gaussian(500, 1, seed=3)[:, 0])
    _, bound_K = bounded_match_of_leading(before, before + 0.3 * new, 3, 24, 0)
    _, match_K, _ = match_of_leading(before, before + 0.3 * new, 3)
    assert match_K[0] < bound_K[0] < 0.5
    left, _, right = torch.linalg.svd(before)
    known = before + 60 * torch.outer(left[:, 0], right[0])
    assert bounded_match_of_leading(before, known, 1, 24, 0)[1].tolist() == pytest.approx([1.0], abs=1e-3)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_planted_intruder_dimension_is_found_with_its_value(base, tmp_path, kind):
    name = "layers.1.mlp.down_proj"
    left = np.linalg.svd(BASE[name].double().numpy())[0]
    new = torch.from_numpy(left.sum(1, keepdims=True)).float() / left.shape[0] ** 0.5
    factors = {name: (new * 100, torch.ones(1, SHAPES[name][1]))}
    if kind == "lora":
        tuned = lora(tmp_path / "a", factors)
    else:
        tuned = checkpoint(tmp_path / "t", BASE | {name: BASE[name] + ALPHA * factors[name][0] @ factors[name][1]})
    found = [row for row in rows(base, tuned, INTRUDERS) if row["name"] == f"{name}.weight"]
    assert [row["direction"] for row in found] == [1, 2, 3, 4]
    assert found[0]["match"] == pytest.approx(left.shape[0] ** -0.5, rel=0.02)
    assert all(row["novelty"] == pytest.approx(1 - row["match"]) for row in found)
    (tensor,) = (row for row in rows(base, tuned) if row["name"] == f"{name}.weight")
    assert tensor["n_intruders"] >= 1 and tensor["intruder_score"] == max(row["novelty"] for row in found)


def test_a_direction_outside_of_a_tall_bases_column_space_matches_nothing(monkeypatch):
    """Most of a new direction lies there; without taking it out, it is told from no small singular value. Rows come in pieces."""
    monkeypatch.setattr("diffing_core.direction_match.ROWS_AT_ONCE", 100)
    left, sigma, right = torch.linalg.svd(gaussian(450, 80, seed=1))
    before = left[:, :80] * sigma @ right
    outside = before + 200 * torch.outer(left[:, 80], right[0])
    half = before + 200 * torch.outer((left[:, 80] + left[:, 3]) / 2**0.5, right[0])
    sigma_K, bound_K = bounded_match_of_leading(before, outside, 2, 40, 0)
    exact_sigma_K, match_K, _ = match_of_leading(before, outside, 2)
    assert sigma_K.tolist() == pytest.approx(exact_sigma_K.tolist(), rel=1e-5)
    assert match_K[0] <= bound_K[0] + 1e-3 and bound_K[0] < 0.2
    assert bounded_match_of_leading(before, half, 1, 80, 0)[1].item() == pytest.approx(0.5**0.5, abs=0.06)
    dead = torch.cat([before, torch.zeros(450, 1)], 1)  # rank below the inputs: the bound holds there too
    changed = dead + 200 * torch.outer(left[:, 80], gaussian(81, 1, seed=4)[:, 0])
    assert (bounded_match_of_leading(dead, changed, 3, 8, 0)[1] >= match_of_leading(dead, changed, 3)[1] - 1e-3).all()


def test_scaling_a_weight_brings_no_intruder_and_large_matrices_say_bounds_or_null(base, tmp_path):
    tuned = checkpoint(tmp_path / "t", {name: weight * 1.5 for name, weight in BASE.items()})
    for row in rows(base, tuned):
        assert row["intruder_score"] < 1e-6 and row["n_intruders"] == 0
    for row in rows(base, tuned, intruder_side=8, intruder_steps=0):
        assert row["intruder_score"] is None and row["n_intruders"] is None
    assert rows(base, tuned, INTRUDERS, intruder_side=8, intruder_steps=0) == []
    bounded = {row["name"]: row["intruder_score"] for row in rows(base, tuned, intruder_side=8)}
    assert bounded.keys() == {f"{name}.weight" for name in SHAPES}
    assert all(score < 1e-2 for score in bounded.values())
    assert {row["is_bound"] for row in rows(base, tuned, INTRUDERS, intruder_side=8)} == {True}
    zero = checkpoint(tmp_path / "z", {name: torch.zeros_like(weight) for name, weight in BASE.items()})
    assert {row["intruder_score"] for row in rows(zero, base)} == {1.0}
    assert {row["base_direction"] for row in rows(zero, base, INTRUDERS)} == {None}


def test_a_matrix_of_one_row_is_matched_exactly_whatever_the_settings(tmp_path):
    sides = [checkpoint(tmp_path / str(seed), {"model.layers.0.mlp.gate_proj": gaussian(1, 8, seed=seed)}) for seed in (0, 1)]
    [row] = rows(*sides, INTRUDERS, intruder_side=0)
    assert not row["is_bound"] and row["match"] == pytest.approx(1.0)


def test_the_rounding_floor_is_what_rounding_to_bfloat16_leaves():
    base = gaussian(200, 300, seed=1)
    found = elementwise(base, base.bfloat16().float() - base)
    assert found["rounding_floor"] == pytest.approx((base.bfloat16().float() - base).norm().item(), rel=0.02)
    assert found["share_rounding"] == 1
    assert elementwise(torch.zeros(3), torch.full((3,), 1e-4))["share_rounding"] == 0
