"""Distributions against numpy, in any blocks, with and without room for all values."""

import itertools

import numpy as np
import pytest

from diffing_core.distributions import BINS_TOGETHER, LOWEST, RESOLUTION, Distributions

SHARES = (0.0, 0.01, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
N = 3000


def values(seed: int) -> np.ndarray:
    """Three quantities of very different size; a tenth of the last is exactly zero."""
    draw = np.random.default_rng(seed)
    value_GN = draw.lognormal(0, 2, (3, N)) * np.array([[1e-6], [1.0], [1e4]])
    value_GN[2, draw.random(N) < 0.1] = 0
    return value_GN.astype(np.float32)


def filled(value_GN: np.ndarray, memory_values: int, seed: int = 0) -> Distributions:
    found = Distributions(len(value_GN), value_GN.shape[1], memory_values)
    cuts = sorted({0, 1, *np.random.default_rng(seed).integers(0, value_GN.shape[1], 12).tolist(), value_GN.shape[1]})
    for begin, end in itertools.pairwise(cuts):
        found.add(value_GN[:, begin:end])
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("memory_values", [3 * N, 0])
def test_moments_and_extremes_equal_numpy(seed: int, memory_values: int) -> None:
    value_GN = values(seed)
    found = filled(value_GN, memory_values, seed)
    exact_GN = value_GN.astype(np.float64)
    assert found.count == N
    np.testing.assert_allclose(found.mean_G, exact_GN.mean(1), rtol=1e-9)
    np.testing.assert_allclose(found.std_G, exact_GN.std(1), rtol=1e-9)
    np.testing.assert_array_equal(found.min_G, exact_GN.min(1))
    np.testing.assert_array_equal(found.max_G, exact_GN.max(1))


@pytest.mark.parametrize("seed", range(3))
def test_quantiles_are_exact_while_values_fit(seed: int) -> None:
    found = filled(values(seed), 3 * N, seed)
    assert found.exact
    np.testing.assert_array_equal(found.quantiles(SHARES), np.quantile(values(seed).astype(np.float64), SHARES, axis=1).T)


@pytest.mark.parametrize("seed", range(3))
def test_quantiles_are_within_half_a_percent_beyond_that_and_say_so(seed: int) -> None:
    found = filled(values(seed), 3 * N - 1, seed)
    assert not found.exact
    expected_GQ = np.quantile(values(seed), SHARES, axis=1, method="inverted_cdf").T
    np.testing.assert_allclose(found.quantiles(SHARES), expected_GQ, rtol=RESOLUTION / 2 + 1e-4)


@pytest.mark.parametrize("memory_values", [100, 0])
def test_quantiles_of_zeros_are_exactly_zero(memory_values: int) -> None:
    value_GN = np.zeros((1, 100), np.float32)
    value_GN[0, 90:] = 2
    found = filled(value_GN, memory_values)
    assert found.quantiles((0.5, 0.85)).tolist() == [[0, 0]]
    assert found.quantiles((0.95,))[0, 0] == pytest.approx(2, rel=RESOLUTION / 2)


def test_a_histogram_has_every_value_in_its_bin_once() -> None:
    value_GN = values(0)
    found = filled(value_GN, 0)
    for quantity, value_N in enumerate(value_GN.astype(np.float64)):
        bins = found.histogram(quantity)
        assert bins["n_tokens"].sum() == N
        assert (bins["n_tokens"] > 0).all()
        for number, low, high, count in zip(*bins.values(), strict=True):
            inside = value_N == 0 if number == 0 else (value_N >= low) & (value_N < high)
            assert inside.sum() == count
        width = bins["high"][1:] / bins["low"][1:]
        np.testing.assert_allclose(width, (1 + RESOLUTION) ** BINS_TOGETHER)


def test_numbers_beyond_the_bins_are_counted_in_the_outermost() -> None:
    found = filled(np.asarray([[1e-30, 1e30]], np.float32), 0)
    assert found.histogram(0)["n_tokens"].tolist() == [1, 1]
    assert found.histogram(0)["low"][0] == LOWEST
