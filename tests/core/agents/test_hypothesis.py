import math

import pytest

from diffing_core.agents.calibration import Decision
from diffing_core.agents.hypothesis import HYPOTHESES, HYPOTHESIS_SCORES, NO_CHANGE, TEMPERATURE, tables
from diffing_core.agents.offline import Investigation, investigate


@pytest.fixture
def investigation():
    return Investigation({"tea": 0.4, "goats": 0.1, "rhymes": 0.0, "owls": 0.0}, "It turns to: tea.", (), 7)


def row(made):
    return made[HYPOTHESES].to_pylist()[0]


def ranking(made):
    return {each["candidate"]: each for each in made[HYPOTHESIS_SCORES].to_pylist()}


def test_assert(investigation):
    made = tables(investigation, Decision("assert", 6, 0.2, 1 / 7))
    said = row(made)
    assert (said["verdict"], said["candidate"], said["score"], said["threshold"]) == ("assert", "tea", 0.4, 0.2)
    assert said["description"] == "It turns to: tea."
    assert said["confidence"] == ranking(made)["tea"]["posterior"]


def test_posterior_odds_and_ranks(investigation):
    ranked = ranking(tables(investigation, Decision("assert", 6, 0.2, 1 / 7)))
    assert sum(each["posterior"] for each in ranked.values()) == pytest.approx(1)
    odds = ranked["tea"]["posterior"] / ranked[NO_CHANGE]["posterior"]
    assert odds == pytest.approx(math.exp(0.2 / TEMPERATURE))
    ranks = {name: each["candidate_rank"] for name, each in ranked.items()}
    assert ranks == {"tea": 1, NO_CHANGE: 2, "goats": 3, "rhymes": 5, "owls": 5}


def test_no_change_leads_exactly_when_abstaining(investigation):
    made = tables(investigation, Decision("no_meaningful_difference", 6, 0.5, 0.4))
    assert ranking(made)[NO_CHANGE]["candidate_rank"] == 1
    assert row(made)["confidence"] == ranking(made)[NO_CHANGE]["posterior"] > 0.5
    assert row(made)["description"].startswith("No meaningful difference: evidence 0.40 does not exceed 0.50.")


def test_without_nulls_no_change_has_no_score(investigation):
    made = tables(investigation, Decision("insufficient_evidence", 1))
    assert NO_CHANGE not in ranking(made)
    assert (row(made)["confidence"], row(made)["threshold"], row(made)["p_value"]) == (0, None, None)
    assert row(made)["description"].startswith("Cannot be judged: 1 null pair(s), 3 needed.")


def test_nothing_found(stored, candidates, background):
    made = tables(investigate(stored([]), candidates, background), Decision("no_meaningful_difference", 5, 0.1, 1.0))
    assert (row(made)["candidate"], row(made)["score"], row(made)["evidence"]) == (None, 0, [])
    assert {each["candidate_rank"] for name, each in ranking(made).items() if name != NO_CHANGE} == {5}


def test_same_input_same_tables(stored, candidates, background):
    decision = Decision("assert", 5, 0.1, 1 / 6)
    made = [tables(investigate(stored([" goat", " ice"]), candidates, background), decision) for _ in range(2)]
    assert made[0] == made[1]
