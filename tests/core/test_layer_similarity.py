"""Similarity of layers: closed forms of CKA, and which layer of a second seed is which."""

import numpy as np
import pytest
import torch

from diffing_core.itda_dictionary import Construction, jaccard, saturated, unit
from diffing_core.layer_similarity import Centred, linear_cka, matched_share
from diffing_core.pursuit import Pursuit


def rows(n_rows: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(n_rows, width, generator=torch.Generator().manual_seed(seed))


def rotation(width: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(rows(width, width, seed))[0]


def test_cka_is_one_up_to_rotation_scale_and_shift() -> None:
    left_ND = rows(50, 8, 0)
    assert linear_cka(left_ND, 3 * left_ND @ rotation(8, 1) + 5) == pytest.approx(1, abs=1e-6)
    assert linear_cka(left_ND, left_ND) == pytest.approx(1, abs=1e-12)


def test_cka_by_hand() -> None:
    """Centred X = (1, 0), (−1, 0), (0, 0) and Y = (1), (0), (−1): ‖YᵀX‖² = 1, ‖XᵀX‖ = 2, ‖YᵀY‖ = 2."""
    left_ND, right_NE = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]), torch.tensor([[1.0], [0.0], [-1.0]])
    assert linear_cka(left_ND, right_NE) == pytest.approx(0.25)
    orthogonal_NE = torch.tensor([[1.0], [1.0], [-2.0]])
    assert linear_cka(left_ND, orthogonal_NE) == pytest.approx(0, abs=1e-12)
    assert linear_cka(left_ND, torch.ones(3, 4)) == 0


def test_cka_through_either_product_is_the_same() -> None:
    left_ND, right_NE = rows(30, 20, 2), rows(30, 40, 3)
    direct = linear_cka(torch.cat([left_ND, left_ND]), torch.cat([right_NE, right_NE]))  # 60 tokens: the other way
    assert linear_cka(left_ND, right_NE) == pytest.approx(direct, abs=1e-9)


@pytest.mark.parametrize("n_rows", [30, 60])
def test_products_made_once_give_the_same_numbers(n_rows: int) -> None:
    """Widths on both sides of the number of tokens; the definition written out."""
    sets = [rows(n_rows, width, width) for width in (8, 20, 40)]
    kept = [Centred(each) for each in sets]
    for one, left_ND in zip(kept, sets, strict=True):
        for other, right_NE in zip(kept, sets, strict=True):
            left, right = (each.double() - each.double().mean(0) for each in (left_ND, right_NE))
            expected = (left.T @ right).norm() ** 2 / ((left.T @ left).norm() * (right.T @ right).norm())
            assert linear_cka(one, other) == linear_cka(left_ND, right_NE) == pytest.approx(float(expected), abs=1e-12)


def test_matched_share_counts_rows_whose_largest_entry_is_their_own() -> None:
    assert matched_share(np.array([[3, 1, 0], [2, 1, 0], [0, 0, 1]])) == pytest.approx(2 / 3)


def test_layers_of_two_seeds_are_matched_by_dictionary_overlap_and_by_cka() -> None:
    """Six layers drift by new features; each seed sees them in a basis of its own and with noise. Widths differ."""
    draw = np.random.default_rng(0)
    n_tokens, n_features, n_layers = 1000, 60, 6
    feature_LNF = draw.exponential(size=(n_layers, n_tokens, n_features)) * (draw.random((n_layers, n_tokens, n_features)) < 0.05)
    state_LNF = feature_LNF.copy()
    for layer in range(1, n_layers):
        state_LNF[layer] += 0.7 * state_LNF[layer - 1]

    def seen(seed: int, width: int) -> list[torch.Tensor]:
        basis_FD = unit(rows(n_features, width, seed))
        noise_LND = 0.02 * rows(n_layers * n_tokens, width, seed + 100).reshape(n_layers, n_tokens, width)
        return [torch.from_numpy(state_NF).float() @ basis_FD + noise_ND for state_NF, noise_ND in zip(state_LNF, noise_LND, strict=True)]

    left, right = seen(1, 48), seen(2, 64)
    how = Construction(Pursuit(6), 0.8, max_passes=1)
    left_atoms, right_atoms = ([saturated(unit(each), how)[0].token_I for each in side] for side in (left, right))
    overlap_LL = np.array([[jaccard(one, other) for other in right_atoms] for one in left_atoms])
    cka_LL = np.array([[linear_cka(one, other) for other in right] for one in left])
    assert matched_share(overlap_LL) == 1  # the reference: 0.88 of GPT-2's twelve layers
    assert matched_share(cka_LL) == 1
