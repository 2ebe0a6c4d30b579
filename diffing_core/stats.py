"""Statistics of the reports: exact intervals and tests, corrections, bootstrap and rater agreement.

Every rate is shown with its interval, because five successes of five only bound it to at least 0.48.
The functions are closed forms or one call of SciPy; each names its source. SciPy is imported where used.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

LEVEL = 0.95


class Interval(NamedTuple):
    """A two-sided interval of coverage `LEVEL`."""

    low: float
    high: float


def wilson(k: float, n: int) -> Interval:
    """Score interval of a rate of k of n (Wilson 1927): about the right coverage on average.

    With k a sum of n values from 0 to 1 it bounds their mean, on the wide side: none varies more than a coin.
    """
    _check_counts(k, n)
    from scipy.stats import norm

    z2 = norm.isf((1 - LEVEL) / 2) ** 2
    centre = (k + z2 / 2) / (n + z2)
    half = np.sqrt(z2 * (k * (n - k) / n + z2 / 4)) / (n + z2)
    return Interval(max(0.0, float(centre - half)), min(1.0, float(centre + half)))


def clopper_pearson(k: int, n: int) -> Interval:
    """Exact interval of a rate of k of n (Clopper & Pearson 1934): never less than its coverage."""
    _check_counts(k, n)
    from scipy.stats import beta

    tail = (1 - LEVEL) / 2
    low = beta.ppf(tail, k, n - k + 1) if k > 0 else 0.0
    high = beta.isf(tail, k + 1, n - k) if k < n else 1.0
    return Interval(float(low), float(high))


def fisher_exact(k_a: int, n_a: int, k_b: int, n_b: int) -> float:
    """Two-sided p-value that two unpaired rates are equal (Fisher 1935), e.g. organisms against nulls."""
    _check_counts(k_a, n_a)
    _check_counts(k_b, n_b)
    from scipy.stats import fisher_exact as scipy_fisher

    return float(scipy_fisher([[k_a, n_a - k_a], [k_b, n_b - k_b]]).pvalue)


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided p-value that two methods succeed equally often on the same pairs (McNemar 1947).

    Only pairs on which exactly one of them succeeded count; under the null they split like fair coins.
    """
    from scipy.stats import binomtest

    discordant = only_a + only_b
    return float(binomtest(only_a, discordant).pvalue) if discordant else 1.0


def sign_tests(n_positive: ArrayLike, n_negative: ArrayLike) -> np.ndarray:
    """Two-sided exact p-values that positive and negative values are equally likely (sign test), for many sets at once.

    Values of zero are in neither count; a set without any other gives 1.
    """
    from scipy.stats import binom

    positive_I, negative_I = np.asarray(n_positive), np.asarray(n_negative)
    return np.minimum(1.0, 2 * binom.cdf(np.minimum(positive_I, negative_I), positive_I + negative_I, 0.5))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for the family-wise error rate, in the order given (Holm 1979)."""
    p_N = np.asarray(p_values, dtype=float)
    order = np.argsort(p_N)
    stepped = np.maximum.accumulate(p_N[order] * np.arange(len(p_N), 0, -1))
    adjusted_N = np.empty_like(p_N)
    adjusted_N[order] = np.minimum(stepped, 1.0)
    return adjusted_N.tolist()


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """q-values that control the false discovery rate, in the order given (Benjamini & Hochberg 1995)."""
    from scipy.stats import false_discovery_control

    return false_discovery_control(p_values, method="bh").tolist() if len(p_values) else []


def cluster_bootstrap(
    values: ArrayLike,
    clusters: Sequence[object],
    statistic: Callable[[np.ndarray], float],
    seed: int,
    n_resamples: int = 10_000,
) -> Interval:
    """Percentile interval when rows of one cluster depend on each other (Cameron, Gelbach & Miller 2008).

    Args:
        values: one row per observation; rows may hold several numbers, e.g. both methods of a pair.
        clusters: the cluster of each row, e.g. its organism; whole clusters are drawn with replacement.
        statistic: number computed from the drawn rows.
        seed: seed of the draws.
        n_resamples: how many draws.
    """
    rows, labels = np.asarray(values), np.unique_inverse(np.asarray(clusters)).inverse_indices
    if len(rows) != len(labels) or len(rows) == 0:
        raise ValueError(f"{len(rows)} value(s) for {len(labels)} cluster label(s); expected equal and at least one")
    members = [rows[labels == label] for label in range(labels.max() + 1)]
    draws = np.random.default_rng(seed).integers(len(members), size=(n_resamples, len(members)))
    drawn = [statistic(np.concatenate([members[index] for index in draw])) for draw in draws]
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))


def bootstrap_mean_interval(values: Sequence[float], seed: int) -> Interval:
    """Percentile interval of the mean of independent values (Efron 1979)."""
    return cluster_bootstrap(values, range(len(values)), np.mean, seed)


def krippendorff_alpha_ordinal(ratings: ArrayLike) -> float | None:
    """Agreement of several raters on an ordered scale: 1 perfect, 0 chance (Krippendorff 2011, ordinal).

    Args:
        ratings: raters x items, NaN where a rater left an item out; items with one rating do not count.

    Returns:
        Alpha, or None where it is undefined: nothing was rated twice, or all ratings are the same.
    """
    ratings_RI = np.asarray(ratings, dtype=float)
    levels = np.unique(ratings_RI[~np.isnan(ratings_RI)])
    counts_IL = (ratings_RI[:, :, None] == levels).sum(0)
    counts_IL = counts_IL[counts_IL.sum(1) > 1]
    share_I = 1 / (counts_IL.sum(1) - 1)
    together_LL = np.einsum("il,im,i->lm", counts_IL, counts_IL, share_I) - np.diag(share_I @ counts_IL)
    total_L = counts_IL.sum(0)
    upto_L = np.cumsum(total_L) - total_L / 2
    distance_LL = (upto_L[:, None] - upto_L[None, :]) ** 2
    expected = (np.outer(total_L, total_L) * distance_LL).sum()
    if expected == 0:
        return None
    return float(1 - (total_L.sum() - 1) * (together_LL * distance_LL).sum() / expected)


def _check_counts(k: float, n: int) -> None:
    if not 0 <= k <= n or n == 0:
        raise ValueError(f"{k} of {n} is not a rate; expected 0 <= k <= n and n >= 1")
