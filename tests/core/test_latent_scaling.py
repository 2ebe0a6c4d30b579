"""Latent Scaling: least squares for all latents at once, ratios of planted worlds, intervals over documents, controls."""

import numpy as np
import pytest
import torch

from diffing_core.document_blocks import block_of
from diffing_core.latent_scaling import (
    LatentScaling,
    jackknifed_ratio,
    permuted_directions,
    random_directions,
)
from diffing_core.sparse_code import SparseCode

N, F, D = 240, 6, 8


def world(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A sparse code, decoder directions, and activations that hold them and much else."""
    draw = torch.Generator().manual_seed(seed)
    code_NF = torch.rand(N, F, generator=draw) * (torch.rand(N, F, generator=draw) < 0.3)
    direction_FD = torch.randn(F, D, generator=draw)
    return code_NF, direction_FD, code_NF @ direction_FD + 0.5 * torch.randn(N, D, generator=draw)


def least_squares(code_N: torch.Tensor, direction_D: torch.Tensor, target_ND: torch.Tensor) -> float:
    """argmin_β Σ ‖Y − β f d‖², by NumPy's solver over all N·D numbers."""
    column = (code_N[:, None] * direction_D).double().numpy().reshape(-1, 1)
    return float(np.linalg.lstsq(column, target_ND.double().numpy().reshape(-1), rcond=None)[0][0])


def scaling(code_NF: torch.Tensor, directions: dict, targets: dict, n_blocks: int = 4) -> LatentScaling:
    """All tokens, block by block."""
    found = LatentScaling(directions, tuple(targets), n_blocks)
    for block in range(n_blocks):
        rows = slice(block, None, n_blocks)
        found.add(SparseCode.of(code_NF[rows]), {name: target_ND[rows] for name, target_ND in targets.items()}, block)
    return found


def test_beta_is_least_squares_for_every_latent_and_target() -> None:
    code_NF, direction_FD, activation_ND = world()
    rebuilt_ND = code_NF @ (0.8 * direction_FD)
    found = scaling(code_NF, {"d": direction_FD}, {"error": activation_ND - rebuilt_ND, "raw": activation_ND})
    own_FD = 0.8 * direction_FD
    for j in range(F):
        with_own_ND = activation_ND - (rebuilt_ND - code_NF[:, j : j + 1] * own_FD[j])
        assert found.beta("error", "d", own_FD)[j] == pytest.approx(least_squares(code_NF[:, j], direction_FD[j], with_own_ND), abs=1e-6)
        assert found.beta("raw", "d")[j] == pytest.approx(least_squares(code_NF[:, j], direction_FD[j], activation_ND), abs=1e-6)
    assert found.n_active_F.tolist() == (code_NF > 0).sum(0).tolist()
    np.testing.assert_allclose(found.squares_F, code_NF.double().square().sum(0).numpy(), rtol=1e-6)


def test_a_direction_of_one_model_has_ratio_zero_and_a_common_one_ratio_one() -> None:
    code_NF, direction_FD, _ = world()
    direction_FD = torch.linalg.qr(direction_FD.T).Q.T
    activation_ND = code_NF @ direction_FD
    only_tuned = torch.arange(F) < 2
    base_ND = activation_ND - code_NF[:, only_tuned] @ direction_FD[only_tuned]
    found = scaling(code_NF, {"d": direction_FD}, {"base": base_ND, "tuned": activation_ND})
    nu_F = found.ratio(("base", None), ("tuned", None), "d").value_F
    assert (np.abs(nu_F[:2]) < 0.2).all(), nu_F
    assert (nu_F[2:] > 0.7).all(), nu_F


def test_roles_exchanged_give_the_inverse_ratio_along_the_same_direction() -> None:
    code_NF, direction_FD, activation_ND = world()
    found = scaling(code_NF, {"d": direction_FD}, {"base": 0.5 * activation_ND, "tuned": activation_ND})
    np.testing.assert_allclose(found.ratio(("base", None), ("tuned", None), "d").value_F, 0.5, rtol=1e-5)
    np.testing.assert_allclose(found.ratio(("tuned", None), ("base", None), "d").value_F, 2.0, rtol=1e-5)


def test_interval_is_that_of_leaving_out_one_block_at_a_time() -> None:
    draw = np.random.default_rng(0)
    above_BF, below_BF = draw.normal(1, 0.2, (5, 3)), draw.normal(2, 0.2, (5, 3))
    found = jackknifed_ratio(above_BF, below_BF, np.ones(5, bool))
    for j in range(3):
        left_out = [np.delete(above_BF[:, j], b).sum() / np.delete(below_BF[:, j], b).sum() for b in range(5)]
        error = np.sqrt(4 / 5 * np.square(left_out - np.mean(left_out)).sum())
        assert found.value_F[j] == pytest.approx(above_BF[:, j].sum() / below_BF[:, j].sum())
        assert (found.high_F - found.low_F)[j] / 2 == pytest.approx(2.776445 * error, rel=1e-5)  # t of 4 degrees of freedom


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    draw = np.random.default_rng(1)
    below_BF = draw.gamma(20, 1, (20, 2000))
    above_BF = 0.3 * below_BF + draw.normal(0, 1, (20, 2000))
    found = jackknifed_ratio(above_BF, below_BF, np.ones(20, bool))
    covered = np.mean((found.low_F <= 0.3) & (found.high_F >= 0.3))
    assert 0.93 <= covered <= 0.97


def test_one_block_with_anything_gives_a_ratio_without_interval() -> None:
    """Blocks in which a latent was silent say nothing of its spread: they must not narrow the interval."""
    above_BF, below_BF = np.zeros((20, 1)), np.zeros((20, 1))
    above_BF[3], below_BF[3] = 1.0, 2.0
    found = jackknifed_ratio(above_BF, below_BF, np.ones(20, bool))
    assert found.value_F.tolist() == [0.5]
    assert np.isnan(found.low_F).all() and np.isnan(found.high_F).all()


def test_silent_latents_and_those_without_a_direction_have_no_beta() -> None:
    code_NF, direction_FD, activation_ND = world()
    code_NF[:, 0] = 0
    direction_FD[1] = 0
    found = scaling(code_NF, {"d": direction_FD}, {"raw": activation_ND})
    assert np.isnan(found.beta("raw", "d")).tolist() == [True, True, False, False, False, False]
    assert np.isnan(found.ratio(("raw", None), ("raw", None), "d").value_F).tolist() == [True, True, False, False, False, False]


def test_controls_have_no_scale_where_latents_do() -> None:
    draw = torch.Generator().manual_seed(0)
    code_NF = torch.rand(4000, 20, generator=draw) * (torch.rand(4000, 20, generator=draw) < 0.1)
    direction_FD = torch.randn(20, 256, generator=draw)
    control = {"d": direction_FD, "random": random_directions(direction_FD, 0), "permuted": permuted_directions(direction_FD)}
    found = scaling(code_NF, control, {"raw": code_NF @ direction_FD})
    assert np.abs(found.beta("raw", "d") - 1).max() < 0.3
    for name in ("random", "permuted"):
        assert np.abs(found.beta("raw", name)).mean() < 0.1
        torch.testing.assert_close(control[name].norm(dim=1).sort().values, direction_FD.norm(dim=1).sort().values)


def test_random_directions_are_not_those_that_a_dictionary_begins_with() -> None:
    """Defect of our first draft: one seed for both, so that the control lay along the decoders."""
    like_FD = torch.ones(50, 64)
    start_FD = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    cosine_F = torch.nn.functional.cosine_similarity(random_directions(like_FD, 0), start_FD)
    assert cosine_F.abs().mean() < 0.2


def test_documents_are_whole_and_spread_over_all_blocks() -> None:
    block_S = block_of(np.arange(2000))
    assert np.array_equal(block_of(np.repeat(np.arange(2000), 3)), np.repeat(block_S, 3))
    assert np.bincount(block_S, minlength=20).min() > 60


def test_sums_are_the_same_however_many_latents_are_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    code_NF, direction_FD, activation_ND = world()
    directions = {"own": direction_FD, "random": random_directions(direction_FD, 0)}
    targets = {"raw": activation_ND, "half": 0.5 * activation_ND + 1}
    at_once = scaling(code_NF, directions, targets)
    monkeypatch.setattr("diffing_core.latent_scaling.VALUES_TOGETHER", 4 * 2 * D)  # 4 of 6 latents, then 2
    in_parts = scaling(code_NF, directions, targets)
    for direction in directions:
        for target in targets:
            np.testing.assert_allclose(in_parts.beta(target, direction), at_once.beta(target, direction), rtol=1e-5, atol=1e-7)
            each = [
                least_squares(code_NF[:, j], directions[direction][j], targets[target]) for j in range(F)
            ]
            np.testing.assert_allclose(in_parts.beta(target, direction), each, rtol=1e-4, atol=1e-6)
