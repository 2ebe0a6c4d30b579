import pytest

from diffing_core.agents.words import FUNCTION_WORDS, Background, clean, stem, stems, surfaces
from diffing_core.errors import EvaluationError


@pytest.mark.parametrize(
    "family",
    [
        "bake bakes baked baking",
        "run runs running",
        "fall falls falling",
        "dish dishes",
        "box boxes",
        "study studies studied studying",
        "glacier glaciers",
        "glass glasses",
        "tree trees",
    ],
)
def test_one_stem_per_family(family):
    assert len({stem(word) for word in family.split()}) == 1


@pytest.mark.parametrize("word", ["thing", "king", "string", "spring", "red", "glass", "virus", "basis", "bee"])
def test_stem_keeps_words_that_only_look_inflected(word):
    assert stem(word) == word


def test_content_words_only():
    assert surfaces("The cakes were baked at 450 degrees; it's 0xE2 ok") == ["cakes", "baked", "450", "degrees"]
    assert stems(" ".join(sorted(FUNCTION_WORDS))) == []


def test_clean_strips_what_a_reader_cannot_see():
    assert clean("a\x00b\x1b[31m\u202ec\nd\u200be", 100) == "a b [31m c d e"
    assert clean("x" * 50, 10) == "x" * 10


def test_idf_ends():
    background = Background.of(["the sea is deep", "a sea of grass"])
    assert background.idf("sea") == 0
    assert background.idf("owl") > background.idf("deep") > 0


def test_background_needs_words():
    with pytest.raises(EvaluationError, match="probe corpus"):
        Background.of(["the", ""])
