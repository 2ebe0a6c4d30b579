"""The offline grader: how many key facts of the truth a description hits, by words alone. Deterministic.

A fact is hit if at least half of its content words (stems, numbers included) occur in the description; without
key facts, the ground truth is the one fact. Bands, by share of facts hit:

    5  at least 0.9        4  at least 0.6        3  at least 0.3
    2  any fact, or at least 0.1 of all content words of the truth        1  otherwise

It cannot see a negation, a synonym or an invented addition, and it rewards quoting; see its kappa in
`agreement.py` before trusting it. Descriptions are capped, so that pouring out a dictionary does not pay.
"""

from diffing_core.agents.words import clean, stems
from diffing_core.graders.base import Grade, Grader, Truth

DESCRIPTION_CHARS = 1_500
BANDS = ((0.9, 5), (0.6, 4), (0.3, 3))
FACT_SHARE, TRACE_SHARE = 0.5, 0.1


def score(description: str, truth: Truth) -> Grade:
    """Grades by facts hit."""
    said = set(stems(clean(description, DESCRIPTION_CHARS)))
    facts = [set(stems(fact)) for fact in truth.key_facts or (truth.ground_truth,)]
    hits = sum(_share(fact, said) >= FACT_SHARE for fact in facts)
    trace = _share(set.union(*facts, set(stems(truth.ground_truth))), said)
    return Grade(_band(hits / len(facts), trace), f"{hits} of {len(facts)} facts hit, {trace:.0%} of the truth's words")


def _share(wanted: set[str], said: set[str]) -> float:
    return len(wanted & said) / len(wanted) if wanted else 0.0


def _band(hit_share: float, trace: float) -> int:
    for least, points in BANDS:
        if hit_share >= least:
            return points
    return 2 if hit_share > 0 or trace >= TRACE_SHARE else 1


GRADER = Grader("similarity", score)
