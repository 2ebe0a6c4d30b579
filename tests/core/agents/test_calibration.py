import numpy as np
import pytest
from scipy.stats import t

from diffing_core.agents.calibration import (
    CALIBRATION,
    MIN_SD,
    NullScore,
    calibration_row,
    decide,
    null_scores,
    prediction_bound,
)
from diffing_core.identity import RunKey
from diffing_core.lake import Lake
from diffing_core.pairs import Pair
from diffing_core.settings import Settings

ORGANISM = Pair("demo", "cake")


def null(score, organism="benign", variant="default", arm="benign", model="demo"):
    return NullScore(Pair(model, organism, variant), arm, score)


@pytest.fixture
def nulls():
    return [
        null(0.0, "same", arm="identical"),
        null(0.10, variant="seed1"),
        null(0.14, variant="seed2"),
        null(0.06, variant="seed3"),
        null(0.12, "cake_twin", "a", "seed_twin"),
        null(0.20, "owl_twin", "a", "seed_twin"),
        null(0.18, "owl_twin", "b", "seed_twin"),
    ]


def test_bound_by_hand():
    # mean 0.2, sd 0.1, n 3
    assert prediction_bound([0.1, 0.2, 0.3]) == pytest.approx(0.2 + 2.919986 * 0.1 * (4 / 3) ** 0.5)


def test_bound_covers_a_new_null_in_95_of_100():
    rng = np.random.default_rng(0)
    n, trials = 5, 20_000
    draws = rng.normal(1.0, 1.0, (trials, n + 1))
    factor = t.ppf(0.95, n - 1) * (1 + 1 / n) ** 0.5
    assert prediction_bound(draws[0, :n].tolist()) == pytest.approx(
        draws[0, :n].mean() + factor * draws[0, :n].std(ddof=1)
    )
    above = draws[:, n] > draws[:, :n].mean(1) + factor * draws[:, :n].std(1, ddof=1)
    assert above.mean() == pytest.approx(0.05, abs=0.006)


def test_high_asserts_and_low_abstains(nulls):
    high, low = decide(0.9, nulls, ORGANISM), decide(0.15, nulls, ORGANISM)
    assert (high.verdict, high.n_nulls, high.p_value) == ("assert", 6, 1 / 7)
    assert (low.verdict, low.p_value) == ("no_meaningful_difference", 3 / 7)
    assert high.threshold == low.threshold == pytest.approx(prediction_bound([0.1, 0.14, 0.06, 0.12, 0.2, 0.18]))


def test_identical_models_abstain(nulls):
    assert decide(0.0, nulls, Pair("demo", "same")).verdict == "no_meaningful_difference"


@pytest.mark.parametrize("n", [0, 1, 2])
def test_too_few_nulls(n):
    few = [null(0.0, variant=f"seed{i}") for i in range(n)]
    decision = decide(0.9, [*few, null(0.0, "same", arm="identical")], ORGANISM)
    assert (decision.verdict, decision.n_nulls) == ("insufficient_evidence", n)
    assert decision.threshold is decision.p_value is None


@pytest.mark.parametrize(
    ("judged", "left_out"),
    [(("benign", "seed2"), {0.14}), (("owl_twin", "a"), {0.20, 0.18}), (("cake_twin", "a"), {0.12})],
)
def test_a_null_is_not_judged_by_itself(nulls, judged, left_out):
    pair = Pair("demo", *judged)
    rest = [one.score for one in nulls if one.arm != "identical" and one.score not in left_out]
    decision = decide(0.5, nulls, pair)
    assert decision.n_nulls == len(rest)
    assert decision.threshold == pytest.approx(prediction_bound(rest))


def test_a_null_inside_its_own_bound_could_never_be_flagged(nulls):
    scores = [0.1, 0.1, 0.1, 0.1, 0.1, 0.9]
    assert max(scores) < prediction_bound(scores)
    outlier = [null(score, variant=f"seed{i}") for i, score in enumerate(scores)]
    assert decide(0.9, outlier, outlier[-1].pair).verdict == "assert"


def test_nulls_of_another_base_do_not_count(nulls):
    assert decide(0.9, nulls, Pair("qwen", "cake")).verdict == "insufficient_evidence"


def test_equal_nulls_do_not_make_certainty():
    silent = [null(0.0, variant=f"seed{i}") for i in range(5)]
    assert decide(MIN_SD, silent, ORGANISM).verdict == "no_meaningful_difference"
    assert decide(0.1, silent, ORGANISM).verdict == "assert"


def test_rows_travel_through_the_lake(tmp_path):
    pair = Pair("demo", "benign", "seed1")
    key = RunKey(pair, "kl", "1", Settings().settings_id(), "base", "tuned")
    lake = Lake(tmp_path)
    lake.write(CALIBRATION, key, calibration_row("offline", 0.25, "benign"))
    assert null_scores(lake.read(CALIBRATION, method="kl")) == [NullScore(pair, "benign", 0.25)]
