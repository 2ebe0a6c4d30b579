"""Settings and tables of `sae_diff`."""

from typing import Literal

from pydantic import Field

from diffing_core.settings import Settings

Column_ = Literal["difference", "base", "tuned"]


class SaeDiffSettings(Settings):
    """Knobs of `sae_diff`."""

    layers: tuple[int | float, ...] | None = Field((1.0,), description="Stored blocks to read.")
    trained_on: tuple[Column_, ...] = Field(("difference",), min_length=1)
    expansion: float = Field(2.0, gt=0)
    k: int | None = Field(None, ge=1)
    batch_rows: int = Field(2048, ge=1)
    epochs: float = Field(3.0, gt=0)
    max_tokens: int = Field(100_000_000, ge=1)
    learning_rate: float | None = Field(None, gt=0)
    first_position: int = Field(0, ge=0)
    held_out_share: float = Field(0.1, gt=0, lt=1)
    seed: int = Field(0, ge=0)
