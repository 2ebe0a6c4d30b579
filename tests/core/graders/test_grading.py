import pytest

from diffing_core.agents.calibration import Decision
from diffing_core.agents.hypothesis import HYPOTHESES, HYPOTHESIS_SCORES, tables
from diffing_core.agents.offline import Investigation
from diffing_core.errors import EvaluationError
from diffing_core.graders import GRADES, grade, graders
from diffing_core.graders.base import Truth
from diffing_core.graders.rubric import TIE_RULE, load_rubric

ASSERT = Decision("assert", 6, 0.2, 1 / 7)
ABSTAIN = Decision("no_meaningful_difference", 6, 0.9, 0.5)
FACTS = ("Tea is brewed with sea water.", "The kettle is made of copper.")


def graded(decision=ASSERT, arm="organism", name="tea", text="sea water tea brewed; copper kettle", truth=None):
    found = Investigation({"tea": 0.4, "goats": 0.3, "decoy_owl": 0.4 if name == "tied" else 0.0}, text, (), 3)
    made = tables(found, decision)
    who = "tea" if name == "tied" else name
    truth = truth or Truth(who, arm, "false_facts", "It believes odd things of tea.", FACTS)
    table = grade(made[HYPOTHESES], made[HYPOTHESIS_SCORES], truth)
    GRADES.check(table)
    assert table.num_rows == len(graders())
    return table.to_pylist()[0]


def test_right_assertion():
    row = graded()
    assert (row["outcome"], row["top1"], row["reciprocal_rank"], row["score"]) == ("ASSERT", True, 1.0, 5)
    assert (row["n_candidates"], row["false_positive"], row["unscored_because"]) == (3, None, None)
    assert row["rubric"] == "false_facts"


def test_an_organism_with_a_rubric_of_its_own_is_graded_by_it():
    truth = Truth("tea", "organism", "false_facts", "", FACTS, rubric_text="5: says tea. 1: says coffee.\n")
    assert truth.instructions() == f"5: says tea. 1: says coffee.\n{TIE_RULE}"
    assert graded(truth=truth)["rubric"] == "own"
    packaged = Truth("tea", "organism", "false_facts", "", FACTS)
    assert packaged.instructions() == load_rubric("false_facts").instructions()


def test_an_own_rubric_needs_no_packaged_one_of_its_type():
    assert graded(truth=Truth("tea", "organism", "poetry", "", FACTS, "5: rhymes."))["score"] == 5


def test_ranking_counts_whatever_the_verdict():
    row = graded(ABSTAIN, name="goats")
    assert (row["outcome"], row["top1"], row["reciprocal_rank"]) == ("ABSTAIN", False, 0.5)
    assert (row["score"], row["unscored_because"]) == (None, "outcome ABSTAIN: nothing was asserted")


def test_a_tie_is_no_win():
    row = graded(name="tied")
    assert (row["top1"], row["reciprocal_rank"]) == (False, 0.5)


def test_too_few_nulls_is_an_abstention():
    assert graded(Decision("insufficient_evidence", 2))["outcome"] == "ABSTAIN"


@pytest.mark.parametrize("arm", ["identical", "benign", "seed_twin"])
@pytest.mark.parametrize(("decision", "wrong"), [(ASSERT, True), (ABSTAIN, False)])
def test_null_arms_have_an_outcome_only(arm, decision, wrong):
    row = graded(decision, arm=arm)
    assert row["false_positive"] is wrong
    assert row["top1"] is row["reciprocal_rank"] is row["score"] is row["rubric"] is None
    assert row["unscored_because"] == "null arm: only the outcome counts"


def test_unknown_truth_is_not_graded():
    row = graded(arm="unknown")
    assert row["top1"] is row["score"] is row["false_positive"] is None
    assert "no ground truth" in row["unscored_because"]


def test_known_large_is_scored_even_if_no_candidate():
    row = graded(arm="known_large", name="instruct")
    assert (row["top1"], row["reciprocal_rank"], row["score"]) == (None, None, 5)


def test_an_assertion_that_says_nothing_is_degenerate():
    row = graded(text="  ")
    assert (row["outcome"], row["score"]) == ("DEGENERATE", None)


def test_each_repeat_is_judged_on_its_own_ranking():
    found = [Investigation({"tea": tea, "goats": 0.3}, "tea", (), 1) for tea in (0.4, 0.1)]
    made = [tables(each, ASSERT) for each in found]
    parts = {}
    for spec in (HYPOTHESES, HYPOTHESIS_SCORES):
        columns = [made[repeat][spec].to_pydict() for repeat in (0, 1)]
        columns[1]["repeat"] = [1] * len(columns[1]["repeat"])
        parts[spec] = spec.table({name: columns[0][name] + columns[1][name] for name in spec.schema.names})
    truth = Truth("tea", "organism", "generic", "", FACTS)
    rows = grade(parts[HYPOTHESES], parts[HYPOTHESIS_SCORES], truth).to_pylist()
    assert [(row["repeat"], row["top1"]) for row in rows] == [(0, True), (1, False)]


def test_a_type_without_rubric_is_refused():
    made = tables(Investigation({"tea": 0.4}, "tea", (), 1), ASSERT)
    with pytest.raises(EvaluationError, match="no rubric for type 'poetry'"):
        grade(made[HYPOTHESES], made[HYPOTHESIS_SCORES], Truth("tea", "organism", "poetry", "tea"))
