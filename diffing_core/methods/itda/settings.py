"""Settings of `itda`."""

from typing import Literal

from pydantic import Field

from diffing_core.itda_dictionary import Construction
from diffing_core.pursuit import Pursuit
from diffing_core.row_settings import RowSettings

Encoder = Literal["orthogonal", "plain"]
Ranking = Literal["energy", "added_energy"]


class ItdaSettings(RowSettings):
    """Knobs of `itda`."""

    layers: tuple[int | float, ...] | None = Field(None, description="Stored blocks to read; none means all that are stored.")
    max_tokens: int = Field(2500, ge=1, description="Tokens, spread over all texts, from which a dictionary is built per layer.")
    held_out_share: float = Field(0.2, gt=0, lt=1, description="Share of the texts that dictionaries never see.")
    held_out_tokens: int = Field(2000, ge=1, description="About as many tokens of whole held-out texts are encoded.")
    min_cosine: float = Field(0.8, gt=0, lt=1, description="A token less well expressed becomes an atom.")
    steps: int = Field(8, ge=1, description="Atoms that may express a token.")
    built_by: Encoder = Field("plain", description="Pursuit that builds dictionaries.")
    encoded_by: Encoder = Field("orthogonal", description="Pursuit that encodes held-out tokens.")
    non_negative: bool = Field(False, description="Choose atoms with a positive inner product only.")
    batch_rows: int = Field(256, ge=1, description="Tokens judged by the same atoms while a dictionary is built.")
    max_atoms: int = Field(4096, ge=1, description="Atoms of the base at most; each later pass may add as many again.")
    max_passes: int = Field(8, ge=1, description="Passes over the base at most.")
    settled_share: float = Field(0.0, ge=0, lt=1, description="A pass that adds at most this share of the atoms is the last.")
    ranked_by: Ranking = Field("energy", description="New atoms by energy in tuned vectors, or by that less the energy in base ones.")
    cluster_cosine: float = Field(0.7, gt=0, le=1, description="New atoms at least this alike are one cluster.")
    read_atoms: int = Field(30, ge=1, description="Leading new atoms per layer whose tokens are added up.")
    listed_atoms: int = Field(8, ge=1, description="Leading new atoms per layer that are shown one by one.")
    top_tokens: int = Field(10, ge=1, description="Tokens listed per atom, side and sign.")
    context_tokens: int = Field(10, ge=0, description="Tokens of a source snippet on either side of its atom.")
    examples_per_band: int = Field(2, ge=1, description="Texts shown per new atom and band of activation.")
    ablated_tokens: int = Field(700, ge=0, description="About as many held-out tokens test what new atoms do; 0 for no test.")
    resamples: int = Field(1000, ge=1, description="Draws of the bootstrap over texts.")
    seed: int = Field(0, ge=0, description="Of random atoms and of the bootstrap.")
    shown: int = Field(60, ge=1, description="Tokens shown as findings.")
    shown_sources: int = Field(10, ge=0, description="Source texts shown as findings after them.")

    @property
    def encoder(self) -> Pursuit:
        """How held-out tokens are encoded."""
        return Pursuit(self.steps, self.encoded_by == "orthogonal", self.non_negative)

    @property
    def construction(self) -> Construction:
        """How dictionaries are built."""
        return Construction(
            Pursuit(self.steps, self.built_by == "orthogonal", self.non_negative),
            self.min_cosine,
            self.batch_rows,
            self.max_atoms,
            self.max_passes,
            self.settled_share,
        )
