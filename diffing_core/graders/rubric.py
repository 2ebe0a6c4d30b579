"""Rubrics: five anchored levels per type of organism, in `rubrics/<type>.yaml`."""

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, model_validator

from diffing_core.errors import EvaluationError

TIE_RULE = "If a description lies between two levels, choose the lower."


class Rubric(BaseModel):
    """What each level from 1 to 5 means for one type of organism."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: str
    question: str
    levels: Mapping[Literal[1, 2, 3, 4, 5], str]

    @model_validator(mode="after")
    def _all_levels(self) -> "Rubric":
        if sorted(self.levels) != [1, 2, 3, 4, 5]:
            raise ValueError(f"rubric {self.type!r} anchors levels {sorted(self.levels)}; expected 1 to 5")
        return self

    def instructions(self) -> str:
        """The rubric as a grader reads it, best level first."""
        levels = [f"{level}: {self.levels[level]}" for level in (5, 4, 3, 2, 1)]
        return "\n".join((self.question, *levels, TIE_RULE))


def rubric_types() -> list[str]:
    """Types that have a rubric."""
    return sorted(file.name.removesuffix(".yaml") for file in (files(__package__) / "rubrics").iterdir())


@cache
def load_rubric(kind: str) -> Rubric:
    """The rubric of one type of organism.

    Raises:
        EvaluationError: there is none.
    """
    if kind not in rubric_types():
        raise EvaluationError(
            f"no rubric for type {kind!r}; there are {rubric_types()}. "
            f"Add diffing_core/graders/rubrics/{kind}.yaml or use type 'generic'"
        )
    text = (files(__package__) / "rubrics" / f"{kind}.yaml").read_text("utf-8")
    return Rubric.model_validate(yaml.safe_load(text))
