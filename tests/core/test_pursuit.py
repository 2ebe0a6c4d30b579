"""Matching pursuits: against scikit-learn, by hand, and at their edges."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import orthogonal_mp

from diffing_core import pursuit
from diffing_core.pursuit import Pursuit


def unit_rows(n_rows: int, width: int, seed: int) -> torch.Tensor:
    drawn_ND = torch.randn(n_rows, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(drawn_ND, dim=1)


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_orthogonal_pursuit_equals_scikit_learn(steps: int) -> None:
    row_ND, atom_ID = unit_rows(40, 16, 0), unit_rows(50, 16, 1)
    ours_NI = Pursuit(steps).encode(row_ND, atom_ID).dense(50)
    theirs_IN = orthogonal_mp(atom_ID.T.double().numpy(), row_ND.T.double().numpy(), n_nonzero_coefs=steps)
    np.testing.assert_allclose(ours_NI.numpy(), theirs_IN.T, atol=2e-5)


def test_plain_pursuit_by_hand() -> None:
    """x = (1, 0.9) over (1, 0) and (0.6, 0.8): inner products 1 and 1.32, then 0.208 and 0, then −0.1248 of the second."""
    row_ND, atom_ID = torch.tensor([[1.0, 0.9]]), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    code = Pursuit(3, orthogonal=False).encode(row_ND, atom_ID)
    assert code.atom_NK.tolist() == [[1, 0, 1]]
    torch.testing.assert_close(code.coefficient_NK, torch.tensor([[1.32, 0.208, -0.1248]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(code.dense(2), torch.tensor([[0.208, 1.1952]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(code.reconstruction(atom_ID), code.dense(2) @ atom_ID)


def test_plain_pursuit_over_an_orthonormal_dictionary_gives_the_largest_coordinates() -> None:
    row_ND = torch.tensor([[0.1, -3.0, 2.0, 0.5], [1.0, 0.0, 0.0, 0.0]])
    for orthogonal in (True, False):
        code = Pursuit(2, orthogonal).encode(row_ND, torch.eye(4))
        assert code.dense(4).tolist() == [[0.0, -3.0, 2.0, 0.0], [1.0, 0.0, 0.0, 0.0]]
        assert code.atom_NK.tolist() == [[1, 2], [0, -1]]


@pytest.mark.parametrize("orthogonal", [True, False])
def test_a_non_negative_choice_takes_no_atom_that_points_away(orthogonal: bool) -> None:
    row_ND = torch.tensor([[-2.0, 1.0], [-1.0, -1.0]])
    code = Pursuit(2, orthogonal, non_negative=True).encode(row_ND, torch.eye(2))
    assert code.atom_NK.tolist() == [[1, -1], [-1, -1]]
    assert code.dense(2).tolist() == [[0.0, 1.0], [0.0, 0.0]]


def test_orthogonal_pursuit_leaves_less_than_plain_and_never_more_with_another_step() -> None:
    row_ND, atom_ID = unit_rows(64, 24, 2), unit_rows(96, 24, 3)
    left = [
        [(row_ND - Pursuit(k, orthogonal).encode(row_ND, atom_ID).reconstruction(atom_ID)).norm(dim=1) for k in (1, 2, 4, 8)]
        for orthogonal in (True, False)
    ]
    for fewer_N, more_N in zip(left[0], left[0][1:], strict=False):
        assert (more_N <= fewer_N + 1e-6).all()
    assert left[0][-1].mean() < 0.9 * left[1][-1].mean()


def test_repeated_atoms_and_zero_rows_end_a_code() -> None:
    atom_ID = unit_rows(1, 8, 4).repeat(3, 1)
    row_ND = torch.cat([2 * atom_ID[:1] + 0.1 * unit_rows(1, 8, 5), torch.zeros(1, 8)])
    code = Pursuit(3).encode(row_ND, atom_ID)
    assert (code.atom_NK >= 0).sum(1).tolist() == [1, 0]
    assert torch.isfinite(code.coefficient_NK).all()


@pytest.mark.parametrize("orthogonal", [True, False])
def test_codes_do_not_depend_on_how_rows_are_cut(orthogonal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    row_ND, atom_ID = unit_rows(37, 12, 6), unit_rows(20, 12, 7)
    together = Pursuit(4, orthogonal).encode(row_ND, atom_ID)
    monkeypatch.setattr(pursuit, "VALUES_TOGETHER", 5 * 4 * 12)
    apart = Pursuit(4, orthogonal).encode(row_ND, atom_ID)
    assert torch.equal(together.atom_NK, apart.atom_NK)
    torch.testing.assert_close(together.coefficient_NK, apart.coefficient_NK, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("orthogonal", [True, False])
def test_a_row_is_expressed_once_its_reconstruction_reaches_the_cosine(orthogonal: bool) -> None:
    row_ND, atom_ID = unit_rows(200, 12, 8), unit_rows(30, 12, 9)
    reached_N = torch.zeros(200, dtype=torch.bool)
    for steps in range(1, 5):
        rebuilt_ND = Pursuit(steps, orthogonal).encode(row_ND, atom_ID).reconstruction(atom_ID)
        reached_N |= torch.nn.functional.cosine_similarity(row_ND, rebuilt_ND) >= 0.9
    assert 0.2 < reached_N.float().mean() < 0.9
    assert torch.equal(Pursuit(4, orthogonal).expresses(row_ND, atom_ID, 0.9), reached_N)


def test_nothing_is_expressed_by_no_atoms() -> None:
    row_ND, no_atoms = torch.tensor([[3.0, 4.0]]), torch.zeros(0, 2)
    assert Pursuit(1).expresses(row_ND, torch.eye(2), 0.8).tolist() == [True]  # (0, 4): cosine 0.8
    assert Pursuit(1).expresses(row_ND, no_atoms, 0.0).tolist() == [False]
    assert Pursuit(1).encode(row_ND, no_atoms).reconstruction(no_atoms).tolist() == [[0.0, 0.0]]
