"""The neutral prompts, and what every method that samples from them lets a person choose."""

from functools import cache
from importlib.resources import files

import yaml
from pydantic import Field

from diffing_core.generation import Prompt
from diffing_core.settings import Settings


@cache
def packaged_prompts() -> tuple[str, ...]:
    """The neutral prompts that come with the project."""
    return tuple(yaml.safe_load((files(__package__) / "prompts.yaml").read_text("utf-8"))["prompts"])


class PromptedSettings(Settings):
    """Knobs of sampling answers to prompts; how many samples is each method's own."""

    prompts: tuple[str, ...] = Field(
        default_factory=packaged_prompts, min_length=1, description="Chat messages; `doc: …` begins a document."
    )
    temperature: float = Field(1.0, gt=0, description="Of the sampling.")
    max_new_tokens: int = Field(30, ge=1, description="Length at which an answer is cut.")
    system_prompt: str | None = Field(None, description="Opens every chat; null: the registry's.")
    thinking: bool | None = Field(
        default=False, description="Whether chat templates that can ask for reasoning do; null: the template's default."
    )
    seed: int = Field(0, description="Of the sampling.")

    def parsed_prompts(self) -> list[Prompt]:
        """The prompts as `generate` takes them."""
        return [Prompt.parse(text, system=self.system_prompt, thinking=self.thinking) for text in self.prompts]
