import json
import math
import subprocess
import sys

import pyarrow as pa
import pytest

from diffing_core.agents.offline import MAX_RANK, Candidate, decoys, investigate
from diffing_core.agents.words import stems
from diffing_core.errors import EvaluationError


@pytest.mark.parametrize(
    ("items", "kind", "winner"),
    [
        ([" kettle", " copper", " teas", " brew"], "token", "tea"),
        ([" goat", " climbing"], "token", "goats"),
        (["My answer is a goat.", "Goats are climbing well."], "generation", "goats"),
        (["glaciers ice level"], "topic", "antarctic"),
    ],
)
def test_planted_words_rank_first(items, kind, winner, stored, candidates, background):
    found = investigate(stored(items, kind=kind), candidates, background)
    assert found.candidate == winner
    assert found.evidence_score == found.scores[winner] > 0.2


def test_score_by_hand(stored, background):
    # One candidate word found at rank 1, one foreign word at rank 2; idf over candidates is equal and cancels.
    candidates = [Candidate("a", "goat kettle"), Candidate("b", "glacier")]
    found = investigate(stored(["goat", "zebra"]), candidates, background)
    assert found.scores["a"] == pytest.approx(1 / math.hypot(1, 1 / math.log2(3)) / math.sqrt(2))
    assert found.scores["b"] == 0


def test_order_of_candidates_does_not_matter(stored, candidates, background):
    findings = stored([" goat", " sea", " verse"])
    one, other = investigate(findings, candidates, background), investigate(findings, candidates[::-1], background)
    assert dict(one.scores) == pytest.approx(dict(other.scores), abs=1e-12)
    assert (one.candidate, one.description) == (other.candidate, other.description)


def test_order_of_rows_does_not_matter(stored, candidates, background):
    findings = pa.concat_tables([stored([" goat", " sea"]), stored([" verse", " ice"], corpus="chat")])
    shuffled = findings.take([3, 0, 2, 1])
    assert investigate(findings, candidates, background) == investigate(shuffled, candidates, background)


def test_function_words_change_nothing(stored, candidates, background):
    texts = ["goats climbing kettle", "a verse"]
    styled = ["The goats were climbing over that kettle", "and with a verse"]
    plain = investigate(stored(texts, kind="topic"), candidates, background)
    longer = investigate(stored(styled, kind="topic"), candidates, background)
    assert plain.scores == longer.scores
    tokens, styled_tokens = stored([" goat", " sea"]), stored([" the", " goat", "And", " of", " sea", " were"])
    assert (
        investigate(tokens, candidates, background).scores == investigate(styled_tokens, candidates, background).scores
    )


def test_style_only_scores_zero(stored, candidates, background):
    found = investigate(stored([" the", " and", "THE", " very", " of", "\n", "!!"]), candidates, background)
    assert found.evidence_score == 0
    assert found.candidate is None
    assert found.description == "The findings hold no content word."


@pytest.mark.parametrize(("items", "scores"), [([], []), ([" goat", " tea"], [0.0, -2.0])])
def test_identical_models_score_exactly_zero(items, scores, stored, candidates, background):
    found = investigate(stored(items, scores=scores), candidates, background)
    assert (found.evidence_score, found.n_findings, found.evidence) == (0, 0, ())


@pytest.mark.parametrize("kind", ["layer", "module", "direction", "position"])
def test_names_of_parts_are_no_words(kind, stored, candidates, background):
    found = investigate(stored(["goat.layers.3.sea"], kind=kind), candidates, background)
    assert (found.evidence_score, found.n_findings) == (0, 0)


def test_common_words_weigh_nothing(stored, candidates):
    from diffing_core.agents.words import Background

    background = Background.of(["a goat", "the goats"])
    assert investigate(stored([" goat"]), candidates, background).evidence_score == 0


def test_word_pieces(stored, candidates, background):
    assert investigate(stored([" Antarc"]), candidates, background).candidate == "antarctic"
    assert investigate(stored([" ant"]), candidates, background).candidate is None
    assert investigate(stored(["antarc"], kind="generation"), candidates, background).candidate is None
    # a piece that begins words of two candidates gives each one half
    both = [Candidate("a", "glacier"), Candidate("b", "glacial")]
    scores = investigate(stored([" glaci"]), both, background).scores
    assert scores["a"] == pytest.approx(scores["b"])


def test_noise_lowers_the_score(stored, candidates, background):
    pure = investigate(stored([" goat"]), candidates, background)
    noisy = investigate(stored([" goat", " zebra", " lamp", " quill"]), candidates, background)
    assert 0 < noisy.evidence_score < pure.evidence_score


def test_every_run_has_one_vote(stored, candidates, background):
    goats = stored([" goat"] + [" climbing"] * 3, method="kl")
    tea = stored([" kettle", " copper"], method="adl")
    many = stored([" kettle", " copper"], method="adl", scores=[1e9, 1e9])
    one = investigate(pa.concat_tables([goats, tea]), candidates, background)
    other = investigate(pa.concat_tables([goats, many]), candidates, background)
    assert one.scores == other.scores
    assert one.scores["goats"] > 0 < one.scores["tea"]


def test_what_nobody_reads_does_not_count(stored, candidates, background):
    found = investigate(stored([" lamp"] * MAX_RANK + [" goat"]), candidates, background)
    assert found.n_findings == MAX_RANK
    assert found.evidence_score == 0


def test_blind_to_who_was_compared(stored, candidates, background):
    items = [" goat", " sea", " verse", " brewed"]
    named = stored(items, organism="tea", method="tea", corpus="tea")
    one, other = (investigate(findings, candidates, background) for findings in (named, stored(items)))
    assert one.scores == other.scores


def test_description_comes_from_findings_alone(stored, candidates, background):
    findings = stored([" goat", " Antarc"])
    found = investigate(findings, candidates, background)
    assert found.description == "The tuned model turns to: goat, antarc."
    others = [Candidate(candidate.name, "something else entirely") for candidate in candidates]
    assert investigate(findings, others, background).description == found.description


def test_description_quotes_cleaned_and_capped_examples(stored, candidates, background):
    found = investigate(stored(["goat\x1b[2J\u202e " + "x" * 500], kind="generation"), candidates, background)
    assert "\x1b" not in found.description
    assert "\u202e" not in found.description
    assert len(found.description) < 2_500


def test_evidence_resolves_to_rows(stored, candidates, background):
    findings = stored([" goat", " the", " verse"])
    evidence = [json.loads(reference) for reference in investigate(findings, candidates, background).evidence]
    run_id = findings["run_id"][0].as_py()
    assert evidence == [
        {"table": "kl_tokens", "key": {"token": 0, "run_id": run_id}},
        {"table": "kl_tokens", "key": {"token": 2, "run_id": run_id}},
    ]


def test_candidates_are_checked(stored, candidates, background):
    with pytest.raises(EvaluationError, match="named differently"):
        investigate(stored([" goat"]), [candidates[0], candidates[0]], background)
    with pytest.raises(EvaluationError, match="at least one"):
        investigate(stored([" goat"]), [], background)


def test_decoys_are_comparable_and_distinct():
    texts = [candidate.text for candidate in decoys()]
    assert 6 <= len(texts) <= 8
    assert all(50 <= len(stems(text)) <= 120 for text in texts)
    assert all(candidate.name.startswith("decoy_") for candidate in decoys())


def test_imports_stay_light():
    code = (
        "import sys, diffing_core.agents.hypothesis, diffing_core.graders.agreement, diffing_core.stats\n"
        "sys.exit(' '.join({'torch', 'sklearn', 'scipy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr == "\n"
