"""Settings of which stored rows a fit method reads: one set of knobs for all of them."""

from typing import Literal

from pydantic import Field

from diffing_core.activation_pairs import PairedActivations, Selection
from diffing_core.corpus import ROLES
from diffing_core.settings import Settings


class RowSettings(Settings):
    """Knobs of the rows that are read; a method that fits on stored activations inherits them."""

    first_position: int = Field(1, ge=0, description="Tokens before it are left out of every sequence: attention sinks.")
    roles: tuple[str, ...] | None = Field(None, description=f"Turns that are read, of {', '.join(ROLES)}; null means all.")
    template: bool = Field(True, description="Whether tokens of the chat template are read too.")
    outlier_ratio: float = Field(10.0, gt=1, description="Tokens longer than this many times the median of a model are left out.")

    def selection(self, part: Literal["all", "fit", "held_out"] = "all", held_out_share: float = 0.1) -> Selection:
        """These rows, outliers still among them."""
        return Selection(self.first_position, self.roles, self.template, part, held_out_share)

    def rows(self, stored: PairedActivations, held_out_share: float = 0.1) -> PairedActivations:
        """These rows of both parts without outliers; what is usual is measured on the rows to fit on, or on all if there are none."""
        fit = stored.of(self.selection("fit", held_out_share)).outliers(self.outlier_ratio)
        every = stored.of(self.selection(held_out_share=held_out_share))
        return every.without(fit or every.outliers(self.outlier_ratio))
