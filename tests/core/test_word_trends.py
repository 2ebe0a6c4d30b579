"""The trend test: closed forms, its exact permutation distribution, and what counts for nothing."""

import itertools

import numpy as np
import pytest

from diffing_core.word_trends import trend_z, unlikeness, word_trends, words_of


def test_one_answer_by_hand() -> None:
    """Doses 0, 1, 2, the word in the last: T = 1, var = 1·2/(3·2) · 2 = 2/3."""
    present = np.array([[[False, False, True]]])
    assert trend_z(present, np.array([0.0, 1.0, 2.0]))[0] == pytest.approx(1 / (2 / 3) ** 0.5)


def test_mean_and_variance_are_those_of_all_permutations_within_answers() -> None:
    rng = np.random.default_rng(0)
    present = rng.random((1, 3, 4)) < 0.4
    dose = np.array([-1.0, 0.0, 1.0, 2.5])
    values = []
    for orders in itertools.product(itertools.permutations(range(4)), repeat=3):
        shuffled = np.stack([present[0, s, list(order)] for s, order in enumerate(orders)])
        values.append((shuffled @ (dose - dose.mean())).sum())
    observed = (present[0] @ (dose - dose.mean())).sum()
    assert np.mean(values) == pytest.approx(0, abs=1e-12)
    assert trend_z(present, dose)[0] == pytest.approx(observed / np.std(values))


def test_p_values_are_honest_under_the_null() -> None:
    rng = np.random.default_rng(1)
    answers = [[[f"w{w}" for w in range(300) if rng.random() < 0.2] for _ in range(40)] for _ in range(5)]
    trends = word_trends(answers, [-1, 0, 1, 2, 3], 3)
    assert np.mean(trends.p_W < 0.05) == pytest.approx(0.05, abs=0.03)
    assert (trends.q_W > 0.05).all()


def test_a_word_that_comes_with_the_dose_is_first_and_one_that_goes_is_last() -> None:
    answers = [[["rise"] * (s < 3 * a) + ["fall"] * (s < 9 - 3 * a) + ["always"] for s in range(10)] for a in range(4)]
    trends = word_trends(answers, [0, 1, 2, 3], 1)
    assert trends.words == ["rise", "always", "fall"]
    assert trends.n_texts_WA[0].tolist() == [0, 3, 6, 9]
    assert trends.monotone_W.tolist() == pytest.approx([1, 0, -1])
    assert trends.z_W[1] == 0
    assert trends.p_W[1] == 1
    assert trends.z_W[0] == pytest.approx(-trends.z_W[2])


def test_reversed_doses_turn_the_sign_and_the_order_of_models_does_not_matter() -> None:
    rng = np.random.default_rng(2)
    answers = [[[f"w{w}" for w in range(5) if rng.random() < 0.3] for _ in range(20)] for _ in range(3)]
    z = word_trends(answers, [0, 1, 3], 1).z_of()
    assert word_trends(answers[::-1], [3, 1, 0], 1).z_of() == pytest.approx(z)
    assert word_trends(answers, [0, -1, -3], 1).z_of() == pytest.approx({word: -value for word, value in z.items()})


def test_nothing_said_and_equal_models_give_nothing() -> None:
    assert word_trends([[[]], [[]]], [0, 1], 1).words == []
    same = word_trends([[["a"], ["b"]]] * 3, [0, 1, 2], 1)
    assert not same.z_W.any()
    assert (same.q_W == 1).all()


def test_unlikeness_is_stouffers_sum_over_distinct_words() -> None:
    assert unlikeness(words_of("Owl owl NIGHT, unknown"), {"owl": 3.0, "night": 1.0}) == pytest.approx(4 / 2**0.5)
    assert unlikeness([], {"owl": 3.0}) == 0
