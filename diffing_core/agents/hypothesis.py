"""The tables `hypotheses` and `hypothesis_scores`: an investigator's answer and its ranking.

Posterior: softmax of score / TEMPERATURE over the candidates and, once nulls have set a threshold, "no change",
whose score is that threshold; so "no change" leads exactly when the verdict is no_meaningful_difference.
The temperature is fixed: a lead of 0.05 in cosine is odds of e to 1. It orders; it is not a calibrated belief.
"""

from collections.abc import Mapping
from math import exp

import pyarrow as pa

from diffing_core.agents.calibration import MIN_NULLS, Decision
from diffing_core.agents.offline import Investigation
from diffing_core.agents.words import clean
from diffing_core.tables import Column, TableSpec

INVESTIGATOR = "offline"
NO_CHANGE = "no_change"
TEMPERATURE = 0.05
DESCRIPTION_CHARS = 1_500

_WHO = (
    Column("investigator", "string", "Who answered.", role="key"),
    Column("repeat", "int32", "Independent run of the investigator, from 0.", role="key", low=0),
)

HYPOTHESES = TableSpec(
    name="hypotheses",
    doc="What an investigator concludes from the evidence arm in `method`: what the finetune changed, if anything.",
    grain=("investigator", "repeat"),
    columns=(
        *_WHO,
        Column("verdict", "string", "assert, no_meaningful_difference or insufficient_evidence."),
        Column("description", "string", "Plain-language hypothesis. Quotes models under test: untrusted."),
        Column("confidence", "float64", "Posterior of what the verdict says; 0 for insufficient.", low=0, high=1),
        Column("candidate", "string", "Best candidate; null if none scored.", nullable=True),
        Column("score", "float64", "Evidence score: cosine to the best candidate.", low=0, high=1),
        Column("threshold", "float64", "Score to exceed, from nulls that may judge this pair.", nullable=True),
        Column("n_nulls", "int32", "Nulls behind the threshold.", role="count", low=0),
        Column("p_value", "float64", "Conformal p-value against these nulls.", nullable=True, low=0, high=1),
        Column("n_findings", "int32", "Findings read.", role="count", low=0),
        Column("evidence", "list<string>", "JSON {table, key} of the rows behind the description."),
        Column("prompt_hash", "string", "Hash of the prompt, where there is one.", nullable=True),
        Column("tokens_used", "int64", "Tokens paid for.", role="count", low=0),
        Column("cost_usd", "float64", "Money paid.", "USD", low=0),
    ),
)

HYPOTHESIS_SCORES = TableSpec(
    name="hypothesis_scores",
    doc="Score of every candidate, decoys included, and of 'no_change' where there is a threshold.",
    grain=("investigator", "repeat", "candidate"),
    columns=(
        *_WHO,
        Column("candidate", "string", "Registered organism, decoy or no_change.", role="key"),
        Column("score", "float64", "Cosine of evidence and description; the threshold for no_change."),
        Column("posterior", "float64", "Softmax of the scores at a fixed temperature.", low=0, high=1),
        Column("candidate_rank", "int32", "1 is best; equals share the worse rank, so silence wins nothing.", low=1),
    ),
)


def tables(investigation: Investigation, decision: Decision) -> dict[TableSpec, pa.Table]:
    """Both tables of one offline investigation."""
    scores = dict(investigation.scores)
    if decision.threshold is not None:
        scores[NO_CHANGE] = decision.threshold
    posterior = _softmax(scores)
    chosen = {"assert": investigation.candidate, "no_meaningful_difference": NO_CHANGE}.get(decision.verdict)
    row = {
        "investigator": INVESTIGATOR,
        "repeat": 0,
        "verdict": decision.verdict,
        "description": clean(_opening(investigation, decision) + investigation.description, DESCRIPTION_CHARS),
        "confidence": posterior[chosen] if chosen else 0.0,
        "candidate": investigation.candidate,
        "score": investigation.evidence_score,
        "threshold": decision.threshold,
        "n_nulls": decision.n_nulls,
        "p_value": decision.p_value,
        "n_findings": investigation.n_findings,
        "evidence": list(investigation.evidence),
        "prompt_hash": None,
        "tokens_used": 0,
        "cost_usd": 0.0,
    }
    return {
        HYPOTHESES: HYPOTHESES.table({name: [value] for name, value in row.items()}),
        HYPOTHESIS_SCORES: HYPOTHESIS_SCORES.table(
            {
                "investigator": [INVESTIGATOR] * len(scores),
                "repeat": [0] * len(scores),
                "candidate": list(scores),
                "score": list(scores.values()),
                "posterior": list(posterior.values()),
                "candidate_rank": [sum(o >= score for o in scores.values()) for score in scores.values()],
            }
        ),
    }


def _opening(investigation: Investigation, decision: Decision) -> str:
    if decision.verdict == "insufficient_evidence":
        few = f"{decision.n_nulls} null pair(s), {MIN_NULLS} needed"
        return f"Cannot be judged: {few if decision.n_nulls < MIN_NULLS else 'no finished result'}. "
    if decision.verdict == "no_meaningful_difference":
        seen, needed = investigation.evidence_score, decision.threshold
        return f"No meaningful difference: evidence {seen:.2f} does not exceed {needed:.2f}. "
    return ""


def _softmax(scores: Mapping[str, float]) -> dict[str, float]:
    best = max(scores.values())
    odds = {name: exp((score - best) / TEMPERATURE) for name, score in scores.items()}
    total = sum(odds.values())
    return {name: value / total for name, value in odds.items()}
