"""What a grader is: a name and one function from a description and the truth to a grade."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Truth:
    """What the registry knows about an organism; graders alone see it."""

    name: str
    arm: str
    type: str
    ground_truth: str
    key_facts: tuple[str, ...] = ()


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
