"""What a grader is: a name and one function from a description and the truth to a grade."""

from collections.abc import Callable
from dataclasses import dataclass

from diffing_core.graders.rubric import TIE_RULE, load_rubric

OWN_RUBRIC = "own"


@dataclass(frozen=True)
class Truth:
    """What the registry knows about an organism; graders alone see it."""

    name: str
    arm: str
    type: str
    ground_truth: str
    key_facts: tuple[str, ...] = ()
    rubric_text: str | None = None
    """The organism's own rubric, in place of the packaged one of its type."""

    @property
    def rubric(self) -> str:
        """Name of the rubric that holds."""
        return OWN_RUBRIC if self.rubric_text else load_rubric(self.type).type

    def instructions(self) -> str:
        """The rubric as a grader reads it.

        Raises:
            EvaluationError: there is none for the organism's type.
        """
        return f"{self.rubric_text.strip()}\n{TIE_RULE}" if self.rubric_text else load_rubric(self.type).instructions()


@dataclass(frozen=True)
class Grade:
    """A score from 1 to 5, or the cause why there is none; never a zero in its place."""

    score: int | None
    reason: str
    unscored_because: str | None = None
    prompt_hash: str | None = None
    cost_usd: float = 0.0


@dataclass(frozen=True)
class Grader:
    """`score(description, truth)` grades an assertion about a non-null pair."""

    name: str
    score: Callable[[str, Truth], Grade]
