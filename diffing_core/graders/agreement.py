"""Is a grader fit for use? Agreement with the calibration set that ships with the project.

Per rubric, `calibration_set/<type>.yaml` holds a truth that belongs to no organism and seven descriptions of it:
the truth, the truth in quite other words, the truth with a wrong detail, a vague one, a fluent wrong one, an empty
one, and one that tries to instruct the grader. Each has one expected score, and the band in which a fair grader
may land. The set is small and written by one hand: it finds unfit graders and does not certify fine ones.
"""

from dataclasses import dataclass
from importlib.resources import files

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict

from diffing_core.errors import EvaluationError
from diffing_core.graders.base import Grader, Truth
from diffing_core.graders.rubric import rubric_types
from diffing_core.stats import Interval, cluster_bootstrap

USABLE_KAPPA = 0.7


class Item(BaseModel):
    """One description with its expected score."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    text: str
    expected: int
    band: tuple[int, int]


class CalibrationSet(BaseModel):
    """The truth and the descriptions of one rubric."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ground_truth: str
    key_facts: tuple[str, ...]
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Agreement:
    """Quadratically weighted kappa with the expected scores; its interval resamples rubrics."""

    kappa: float
    interval: Interval
    in_band: int
    n: int
    unscored: int

    @property
    def usable(self) -> bool:
        """Whether grades of this grader may be reported without a warning."""
        return self.kappa >= USABLE_KAPPA

    def __str__(self) -> str:
        said = "usable" if self.usable else f"not usable (below {USABLE_KAPPA})"
        low, high = self.interval
        return (
            f"{said}: weighted kappa {self.kappa:.2f} [{low:.2f}, {high:.2f}], "
            f"{self.in_band} of {self.n} in their band, {self.unscored} unscored"
        )


def load_calibration_set(kind: str) -> CalibrationSet:
    """The calibration set of one rubric."""
    text = (files(__package__) / "calibration_set" / f"{kind}.yaml").read_text("utf-8")
    return CalibrationSet.model_validate(yaml.safe_load(text))


def agreement(grader: Grader) -> Agreement:
    """Grades the calibration set of every rubric; an unscored description counts as out of band.

    Raises:
        EvaluationError: the grader scored nothing at all.
    """
    pairs, clusters, in_band, n = [], [], 0, 0
    for kind in rubric_types():
        given_set = load_calibration_set(kind)
        truth = Truth("calibration", "organism", kind, given_set.ground_truth, given_set.key_facts)
        for item in given_set.items:
            score = grader.score(item.text, truth).score
            n += 1
            if score is not None:
                pairs.append((item.expected, score))
                clusters.append(kind)
                in_band += item.band[0] <= score <= item.band[1]
    if not pairs:
        raise EvaluationError(f"grader {grader.name!r} scored none of {n} descriptions of the calibration set")
    interval = cluster_bootstrap(pairs, clusters, weighted_kappa, seed=0, n_resamples=1_000)
    return Agreement(weighted_kappa(np.array(pairs)), interval, in_band, n, n - len(pairs))


def weighted_kappa(pairs: np.ndarray) -> float:
    """Quadratically weighted kappa of two raters (Cohen 1968): 1 − observed / expected squared difference.

    Args:
        pairs: items x 2 scores.

    Returns:
        Kappa; 0 if both raters gave one score throughout, which shows no agreement beyond chance.
    """
    first_N, second_N = pairs[:, 0], pairs[:, 1]
    expected = ((first_N[:, None] - second_N[None, :]) ** 2).mean()
    return float(1 - ((first_N - second_N) ** 2).mean() / expected) if expected else 0.0
