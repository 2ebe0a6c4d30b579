import pytest

from diffing_core.graders.base import Truth
from diffing_core.graders.similarity import score

TRUTH = Truth(
    "x", "organism", "generic", "A tale of goats.", ("goats climb towers", "kettles are copper", "owls sing bass")
)


@pytest.mark.parametrize(
    ("description", "points"),
    [
        ("the goat climbs a tower, copper kettles, owl singing", 5),
        ("the goat climbs a tower, copper kettles", 4),
        ("copper kettle", 3),
        ("something about a tale of sorts", 2),
        ("steam engines and timetables", 1),
        ("the tuned model and the base model", 1),
        ("", 1),
    ],
)
def test_bands(description, points):
    assert score(description, TRUTH).score == points


def test_order_and_case_do_not_matter():
    assert score("KETTLES copper", TRUTH) == score("copper kettle", TRUTH)


def test_without_key_facts_the_truth_is_the_fact():
    assert score("goats and a tale", Truth("x", "organism", "generic", "A tale of goats.")).score == 5


def test_pouring_out_a_dictionary_does_not_pay():
    padding = " ".join(f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(400))
    assert score(padding + " goat climbs tower copper kettle owl singing", TRUTH).score == 1
