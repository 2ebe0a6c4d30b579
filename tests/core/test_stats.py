import numpy as np
import pytest
from scipy.stats import binom

from diffing_core import stats


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [(0, 5, 0.0, 0.5218), (5, 5, 0.4782, 1.0), (10, 10, 0.6915, 1.0), (0, 20, 0.0, 0.1684), (0, 30, 0.0, 0.1157)],
)
def test_clopper_pearson_known_bounds(k, n, low, high):
    assert stats.clopper_pearson(k, n) == pytest.approx((low, high), abs=1e-4)


def test_wilson_known_bounds():
    # Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29
    assert stats.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert stats.wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert stats.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert stats.wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=1e-4)


def _coverage(interval, n, rate):
    inside = [k for k in range(n + 1) if interval(k, n).low <= rate <= interval(k, n).high]
    return binom.pmf(inside, n, rate).sum()


def test_exact_coverage_over_all_outcomes():
    rates = np.linspace(0.02, 0.98, 49)
    exact = [_coverage(stats.clopper_pearson, 15, rate) for rate in rates]
    score = [_coverage(stats.wilson, 15, rate) for rate in rates]
    assert min(exact) >= 0.95
    assert np.mean(score) == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize("interval", [stats.wilson, stats.clopper_pearson])
def test_a_rate_needs_counts(interval):
    with pytest.raises(ValueError, match="6 of 5"):
        interval(6, 5)
    with pytest.raises(ValueError, match="0 of 0"):
        interval(0, 0)


def test_fisher_tea_tasting():
    assert stats.fisher_exact(3, 4, 1, 4) == pytest.approx(34 / 70)


def test_mcnemar_is_a_coin():
    assert stats.mcnemar_exact(5, 0) == pytest.approx(2 / 2**5)
    assert stats.mcnemar_exact(0, 0) == 1.0
    assert stats.mcnemar_exact(2, 7) == stats.mcnemar_exact(7, 2)


def test_holm_by_hand():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.6, 0.7]) == [1.0, 1.0]
    assert stats.holm([]) == []


def test_benjamini_hochberg_by_hand():
    assert stats.benjamini_hochberg([0.04, 0.01, 0.03, 0.5]) == pytest.approx([0.16 / 3, 0.04, 0.16 / 3, 0.5])
    assert stats.benjamini_hochberg([]) == []


def test_cluster_bootstrap_is_wider_than_a_naive_one():
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(12), 10)
    values = rng.normal(size=12)[clusters] + 0.1 * rng.normal(size=120)
    clustered = stats.cluster_bootstrap(values, clusters, np.mean, seed=1, n_resamples=1000)
    naive = stats.bootstrap_mean_interval(values, seed=1)
    assert clustered.high - clustered.low > 2 * (naive.high - naive.low)
    assert clustered == stats.cluster_bootstrap(values, clusters, np.mean, seed=1, n_resamples=1000)


def test_cluster_bootstrap_keeps_rows_together():
    pairs = np.array([[0, 1], [1, 2], [5, 6]])
    gain = stats.cluster_bootstrap(pairs, list("abb"), lambda rows: float((rows[:, 1] - rows[:, 0]).mean()), seed=0)
    assert gain == (1.0, 1.0)


def test_bootstrap_mean_coverage():
    rng = np.random.default_rng(3)
    hits = 0
    for seed in range(200):
        values = rng.normal(size=40)
        low, high = stats.cluster_bootstrap(values, range(40), np.mean, seed, n_resamples=300)
        hits += low <= 0 <= high
    assert stats.clopper_pearson(hits, 200).high > 0.93


def test_bootstrap_refuses_unequal_lengths():
    with pytest.raises(ValueError, match="2 value"):
        stats.cluster_bootstrap([1.0, 2.0], ["a"], np.mean, seed=0)


def test_krippendorff_published_example():
    # Krippendorff (2011), "Computing Krippendorff's alpha-reliability", example C: ordinal 0.815
    nan = np.nan
    ratings = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, nan, nan, nan],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, nan, 3],
        [nan, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, nan],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, nan],
    ]
    assert stats.krippendorff_alpha_ordinal(ratings) == pytest.approx(0.815, abs=5e-4)


def test_krippendorff_limits():
    assert stats.krippendorff_alpha_ordinal([[1, 2, 3, 4], [1, 2, 3, 4]]) == pytest.approx(1.0)
    assert stats.krippendorff_alpha_ordinal([[1, 1], [1, 1]]) is None
    assert stats.krippendorff_alpha_ordinal([[1, np.nan], [np.nan, 2]]) is None
    assert stats.krippendorff_alpha_ordinal([[np.nan], [np.nan]]) is None
    rng = np.random.default_rng(0)
    assert stats.krippendorff_alpha_ordinal(rng.integers(1, 6, (2, 4000))) == pytest.approx(0.0, abs=0.05)
