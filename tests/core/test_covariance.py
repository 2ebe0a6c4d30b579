"""Principal components against scikit-learn, in any blocks."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from diffing_core.covariance import Covariance

N, D = 500, 12


def rows(seed: int, offset: float = 0.0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return draw.normal(size=(N, D)) @ draw.normal(size=(D, D)) + offset * draw.normal(size=D)


def of(rows_ND: np.ndarray, *cuts: int) -> Covariance:
    covariance = Covariance(D)
    for part in np.split(rows_ND, cuts):
        covariance.add(torch.from_numpy(part))
    return covariance


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_components_are_those_of_scikit_learn_signs_included(seed: int, offset: float) -> None:
    rows_ND = rows(seed, offset)
    found, known = of(rows_ND, 7, 7, 300).principal(D), PCA(svd_solver="full").fit(rows_ND)
    np.testing.assert_allclose(found.variance_K * N / (N - 1), known.explained_variance_, rtol=1e-6)
    np.testing.assert_allclose(found.explained_share_K, known.explained_variance_ratio_, rtol=1e-6)
    np.testing.assert_allclose(found.component_KD, known.components_, atol=1e-6)
    np.testing.assert_allclose(found.mean_D, known.mean_, rtol=1e-9)


def test_coordinates_are_those_of_scikit_learn() -> None:
    rows_ND = rows(0)
    found, known = of(rows_ND).principal(3), PCA(3).fit(rows_ND)
    np.testing.assert_allclose(found.coordinates(torch.from_numpy(rows_ND)), known.transform(rows_ND), atol=1e-4)


def test_the_same_rows_in_other_blocks_give_the_same_matrix() -> None:
    rows_ND = rows(1, offset=100.0)
    np.testing.assert_allclose(of(rows_ND, 1, 2, 499).matrix_DD(), of(rows_ND).matrix_DD(), rtol=1e-10, atol=1e-9)
    np.testing.assert_allclose(of(rows_ND, 40).matrix_DD(), np.cov(rows_ND.T, bias=True), rtol=1e-9, atol=1e-9)


def test_equal_rows_have_no_variance_and_nothing_is_divided_by_zero() -> None:
    found = of(np.full((20, D), 3.0)).principal(4)
    assert found.total_variance == 0
    assert found.explained_share_K.tolist() == [0, 0, 0, 0]
    assert Covariance(D).principal(2).variance_K.tolist() == [0, 0]


def test_bfloat16_rows_are_summed_in_float64() -> None:
    """The toolkit's running variance in the storage dtype stopped growing: 0.418 for 1 after 3,000 batches."""
    covariance = Covariance(1)
    draw = torch.Generator().manual_seed(0)
    for _ in range(3000):
        covariance.add(torch.randn(64, 1, generator=draw).bfloat16())
    assert covariance.principal(1).variance_K[0] == pytest.approx(1, rel=0.02)
