"""Measures of coherence: log-probabilities against a plain forward, shares by hand."""

import math

import pytest
import torch

from diffing_core.coherence import distinct_share, grades, mean_logprobs, mean_over_tokens, measures, repeated_share
from diffing_core.generation import Generation
from diffing_core.subject import Subject
from tests import model_files


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject.of(model_files.build())


def answer(prompt: tuple[int, ...], ids: tuple[int, ...], text: str = "", finished: bool = True) -> Generation:
    return Generation(0, 0, text, len(ids), finished, prompt, ids)


def expected(subject: Subject, prompt: tuple[int, ...], ids: tuple[int, ...]) -> float:
    token_BT = torch.tensor([prompt + ids])
    with torch.no_grad():
        logprob_TV = subject.module(token_BT).logits[0].double().log_softmax(-1)
    return sum(logprob_TV[len(prompt) - 1 + place, token].item() for place, token in enumerate(ids)) / len(ids)


def test_means_are_those_of_each_text_alone_whatever_it_is_batched_with(subject: Subject) -> None:
    texts = [((3, 4), (5, 6, 7)), ((9,), (1,)), ((2, 3, 4, 5), (8, 9, 10, 11, 12, 13)), ((7,), ())]
    found = mean_logprobs(subject, [answer(*text) for text in texts])
    assert found[:3] == pytest.approx([expected(subject, *text) for text in texts[:3]], abs=1e-5)
    assert found[3] is None


def test_a_token_that_the_base_lacks_ends_what_is_scored(subject: Subject) -> None:
    [found] = mean_logprobs(subject, [answer((3,), (4, 5, model_files.VOCAB + 1, 6))])
    assert found == pytest.approx(expected(subject, (3,), (4, 5)), abs=1e-5)
    assert mean_logprobs(subject, [answer((3,), (model_files.VOCAB,))]) == [None]


def test_measures_by_hand() -> None:
    made = [answer((1,), (2, 3), finished=True), answer((1,), (2, 3, 4, 5), finished=False), answer((1,), ())]
    words = [["a", "b", "a", "b"], ["c"], []]
    found = measures(made, words, [-1.0, -4.0, None])
    assert found["mean_logprob_base"] == (pytest.approx(-(2 * 1 + 4 * 4) / 6), 2)
    assert found["perplexity_base"][0] == pytest.approx(math.exp(3))
    assert found["distinct_1"][0] == pytest.approx(3 / 5)
    assert found["distinct_2"][0] == pytest.approx(2 / 3)
    assert found["repeated_share"] == (pytest.approx(1 / 3), 1)
    assert found["finished_share"][0] == pytest.approx(2 / 3)
    assert found["mean_tokens"][0] == 2


def test_what_nothing_can_be_said_about_is_left_out() -> None:
    assert set(measures([answer((1,), ())], [[]], [None])) == {"finished_share", "mean_tokens"}
    assert mean_over_tokens([], []) is None


def test_a_text_is_graded_by_its_place_among_the_bases_own_answers() -> None:
    base = ([-1.0, -2.0, -3.0, -4.0], [0.0, 0.0, None, 0.0])
    assert grades(*base, *base) == [1.0, 0.75, 0.5, 0.25]
    found = grades([-0.5, -3.5, -9.0, None, -1.0, -1.0], [0.0, 0.0, 0.0, None, 0.6, None], *base)
    assert found == [1.0, 0.25, 0.0, None, 0.0, 1.0]
    assert grades([-1.00003], [0.0], *base) == [1.0]  # what the batch does to a mean is no difference


def test_the_base_seldom_has_a_low_grade_though_a_text_may_be_odd_in_two_ways() -> None:
    base = ([-float(n) for n in range(10)], [n / 10 for n in reversed(range(10))])
    of_base = grades(*base, *base)
    for grade in of_base:
        assert sum(other <= grade for other in of_base) / 10 <= grade + 1e-9
    assert grades([-1.0], [0.0], [None], [None]) == [None]


def test_shares_within_one_text() -> None:
    assert repeated_share(["a", "b", "a", "b"]) == pytest.approx(1 / 3)
    assert repeated_share(["a"]) is None
    assert distinct_share(["a", "b", "a", "b"]) == 0.5
    assert distinct_share([]) is None
