"""The calibration set, the rubrics, and how fit the offline grader really is."""

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from diffing_core.errors import EvaluationError
from diffing_core.graders import graders
from diffing_core.graders.agreement import agreement, load_calibration_set, weighted_kappa
from diffing_core.graders.base import Grade, Grader, Truth
from diffing_core.graders.rubric import TIE_RULE, load_rubric, rubric_types

KINDS = {"truth", "paraphrase", "wrong_detail", "vague", "fluent_wrong", "empty", "instructs_grader"}
EXPECTED = {item.text: item.expected for kind in rubric_types() for item in load_calibration_set(kind).items}


def test_rubrics_cover_every_type():
    assert rubric_types() == sorted(
        ["false_facts", "misalignment", "secret_word", "preference", "domain", "quirk", "sandbagging", "reasoning", "generic"]
    )


@pytest.mark.parametrize("kind", rubric_types())
def test_rubric_and_calibration_set(kind):
    rubric = load_rubric(kind)
    assert rubric.type == kind
    assert rubric.instructions().endswith(TIE_RULE)
    items = load_calibration_set(kind).items
    assert {item.name for item in items} == KINDS
    assert all(item.band[0] <= item.expected <= item.band[1] for item in items)


def test_kappa_is_cohens():
    pairs = np.random.default_rng(0).integers(1, 6, (60, 2))
    assert weighted_kappa(pairs) == pytest.approx(cohen_kappa_score(*pairs.T, weights="quadratic"))
    assert weighted_kappa(np.full((4, 2), 3)) == 0


def test_offline_grader_as_it_is():
    offline = agreement(graders()["similarity"])
    assert offline.n == 63
    assert offline.kappa == pytest.approx(0.74, abs=0.01)
    assert offline.interval.low < 0.7  # the set is too small to be sure that it deserves "usable"
    assert str(offline).startswith("usable: weighted kappa 0.74")


def test_offline_grader_is_nearly_blind_to_other_words():
    in_band = dict.fromkeys(KINDS, 0)
    for kind in rubric_types():
        given = load_calibration_set(kind)
        truth = Truth("calibration", "organism", kind, given.ground_truth, given.key_facts)
        for item in given.items:
            in_band[item.name] += item.band[0] <= graders()["similarity"].score(item.text, truth).score <= item.band[1]
    assert in_band["paraphrase"] == 1
    assert in_band["truth"] == in_band["vague"] == in_band["empty"] == 9
    assert min(in_band[name] for name in ("wrong_detail", "fluent_wrong", "instructs_grader")) >= 7


def test_perfect_and_useless_graders():
    perfect = agreement(Grader("perfect", lambda text, truth: Grade(EXPECTED[text], "")))
    generous = agreement(Grader("generous", lambda text, truth: Grade(5, "")))
    obedient = agreement(Grader("obedient", lambda text, truth: Grade(5 if "SCORE: 5" in text else EXPECTED[text], "")))
    assert (perfect.kappa, perfect.in_band, perfect.usable) == (1.0, 63, True)
    assert (generous.kappa, generous.usable) == (0.0, False)
    assert not obedient.usable
    assert str(obedient).startswith("not usable (below 0.7)")


def test_unscored_descriptions_are_counted():
    shy = Grader("shy", lambda text, truth: Grade(EXPECTED[text], "") if text else Grade(None, "", "no reply"))
    assert (agreement(shy).unscored, agreement(shy).in_band) == (9, 54)
    with pytest.raises(EvaluationError, match="'mute' scored none of 63"):
        agreement(Grader("mute", lambda text, truth: Grade(None, "", "no reply")))
