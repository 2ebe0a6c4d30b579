"""When does an evidence score mean that something changed? Calibration on pairs in which nothing narrow did.

Bound. A pair is asserted if its score exceeds the one-sided 95 % prediction bound for one new null,
mean + t(0.95, n-1) sd sqrt(1 + 1/n) over n null scores of the same base model and evidence arm; below three
nulls the verdict is insufficient_evidence. Right-skewed null scores make the true level somewhat larger than
5 %, so the observed false-positive rate belongs beside every success rate. The conformal p-value
(1 + #{null >= score}) / (n + 1) needs no normality, but with n nulls it cannot fall below 1 / (n + 1).

Which nulls. Those with training noise: seed twins and benign finetunes. Identical models score 0 by
construction, not by chance; as a "sample" they would only pull the mean down and the spread up.

Cross-fitting. A null is never judged by a bound that it helped to set: with six nulls none can lie further from
the mean than 5 / sqrt(6) = 2.04 sd, the bound lies at 2.18 sd, and the false-positive rate would be zero by
arithmetic. (The other simple rule, "above the largest of the others", errs the other way: exactly one null, the
largest, always exceeds it.) Twins of one organism share its subject, so all of them are left out together.
Benign finetunes share no narrow subject; what differs between their seeds is the very noise to be predicted, so
only the judged one is left out.

No spread. If nulls agree exactly (often all 0), normal theory would call any larger score certain. The spread is
therefore never taken below `MIN_SD`: about what one accidental word in the middle of a list of twenty adds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

import pyarrow as pa

from diffing_core.pairs import Pair
from diffing_core.tables import Column, TableSpec

Verdict = Literal["assert", "no_meaningful_difference", "insufficient_evidence"]

MIN_NULLS = 3
MIN_SD = 0.03
LEVEL = 0.95

CALIBRATION = TableSpec(
    name="calibration",
    doc="Evidence scores of null pairs (nothing narrow changed), from which verdict thresholds come.",
    grain=("investigator",),
    columns=(
        Column("investigator", "string", "Who scored.", role="key"),
        Column("score", "float64", "Evidence score: cosine to the best candidate.", low=0, high=1),
        Column("arm", "string", "Kind of null: identical, benign or seed_twin."),
    ),
)


@dataclass(frozen=True)
class NullScore:
    """Evidence score of one null pair."""

    pair: Pair
    arm: str
    score: float


@dataclass(frozen=True)
class Decision:
    """Verdict on one pair; threshold and p-value are None where there are too few nulls."""

    verdict: Verdict
    n_nulls: int
    threshold: float | None = None
    p_value: float | None = None


def decide(score: float, nulls: Sequence[NullScore], pair: Pair) -> Decision:
    """Compares a pair's evidence score with the nulls of one evidence arm that may judge it."""
    scores = [null.score for null in nulls if _may_judge(null, pair)]
    n = len(scores)
    if n < MIN_NULLS:
        return Decision("insufficient_evidence", n)
    threshold = prediction_bound(scores)
    p_value = (1 + sum(null >= score for null in scores)) / (n + 1)
    return Decision("assert" if score > threshold else "no_meaningful_difference", n, threshold, p_value)


def prediction_bound(scores: Sequence[float]) -> float:
    """One-sided 95 % bound for one new value from the same normal distribution."""
    from scipy.stats import t

    n = len(scores)
    spread = max(stdev(scores), MIN_SD)
    return fmean(scores) + float(t.ppf(LEVEL, n - 1)) * spread * (1 + 1 / n) ** 0.5


def calibration_row(investigator: str, score: float, arm: str) -> pa.Table:
    """The row of one null pair."""
    return CALIBRATION.table({"investigator": [investigator], "score": [score], "arm": [arm]})


def null_scores(stored: pa.Table) -> list[NullScore]:
    """Null scores from stored rows of `calibration`; the caller selects one evidence arm and investigator."""
    return [
        NullScore(Pair(row["model"], row["organism"], row["variant"]), row["arm"], row["score"])
        for row in stored.to_pylist()
    ]


def _may_judge(null: NullScore, pair: Pair) -> bool:
    twins = null.arm == "seed_twin" and null.pair.organism == pair.organism
    return null.arm != "identical" and null.pair.model == pair.model and null.pair != pair and not twins
