"""The offline grader: how many key facts of the truth a description hits, by words alone. Deterministic.

A fact is hit if at least half of its content words (stems, numbers included) occur in the description; without
key facts, the ground truth is the one fact. Bands, by share of facts hit:

    5  at least 0.9        4  at least 0.6        3  at least 0.3
    2  any fact, or at least 0.1 of all content words of the truth        1  otherwise

It cannot see a negation or an invented addition, and it is nearly blind to the truth in other words: of the nine
paraphrases in the calibration set it puts one in its band. That suits the offline investigator, which quotes
findings; for free prose use an LLM grader. Descriptions are capped, so that pouring out a dictionary does not pay.
"""

from diffing_core.agents.words import clean, stems
from diffing_core.graders.base import Grade, Grader, Truth

DESCRIPTION_CHARS = 1_500
BANDS = ((0.9, 5), (0.6, 4), (0.3, 3))
FACT_SHARE, TRACE_SHARE = 0.5, 0.1
IN_EVERY_DESCRIPTION = frozenset(stems("base model tuned finetune finetuned"))


def score(description: str, truth: Truth) -> Grade:
    """Grades by facts hit."""
    said = _content(clean(description, DESCRIPTION_CHARS))
    facts = [_content(fact) for fact in truth.key_facts or (truth.ground_truth,)]
    hits = sum(_share(fact, said) >= FACT_SHARE for fact in facts)
    trace = _share(set.union(*facts, _content(truth.ground_truth)), said)
    return Grade(_band(hits / len(facts), trace), f"{hits} of {len(facts)} facts hit, {trace:.0%} of the truth's words")


def _content(text: str) -> set[str]:
    return set(stems(text)) - IN_EVERY_DESCRIPTION


def _share(wanted: set[str], said: set[str]) -> float:
    return len(wanted & said) / len(wanted) if wanted else 0.0


def _band(hit_share: float, trace: float) -> int:
    for least, points in BANDS:
        if hit_share >= least:
            return points
    return 2 if hit_share > 0 or trace >= TRACE_SHARE else 1


GRADER = Grader("similarity", score)
