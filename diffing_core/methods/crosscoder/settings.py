"""Knobs of `crosscoder`, and what they come to for the amount of text there is.

Numbers that must grow with model and corpus are limits: a few thousand tokens get a small dictionary and a short
training, a hundred million the published ones (expansion 32, k 100, batches of 2048, two epochs).
"""

from typing import Literal

from pydantic import Field

from diffing_core.methods.crosscoder.model import Sparsity
from diffing_core.methods.crosscoder.partition import Kind
from diffing_core.methods.crosscoder.training import Plan
from diffing_core.row_settings import RowSettings
from diffing_core.steering import SteeringSettings

LEAST_BATCHES = 64  # an epoch has so many, or batches of LEAST_ROWS
LEAST_ROWS = 64
WIDTHS_AT_LEAST = 2  # latents per dimension, however few tokens there are
MOST_K = 100
SHARED_SPARSITY: dict[Sparsity, float] = {"batch_topk": 0.7, "l1": 0.15}
SHORT_STEPS = 5000  # a shorter training takes larger steps: 2.6 times larger ones with 300
WARM_UP_SHARE, ANNEALING_SHARE = 0.05, 0.2


class CrosscoderSettings(SteeringSettings, RowSettings):
    """Knobs of `crosscoder`."""

    layers: tuple[int | float, ...] | None = Field((1.0,), description="Blocks to read; null means all stored ones.")
    held_out_share: float = Field(0.1, gt=0, lt=1, description="Of the sequences: not trained on, to measure the fit.")
    sparsity: Sparsity = Field("batch_topk", description="batch_topk, or l1.")
    k: float | None = Field(None, gt=0, description="Latents active per token; null: a sixteenth of the width, 100 at most.")
    l1: float = Field(0.02, ge=0, description="With l1: its weight, in mean lengths of an activation.")
    partition: Kind = Field("plain", description="plain, dedicated or designated_shared.")
    partition_share: float = Field(0.05, ge=0, lt=1, description="Of the latents, in each dedicated block or in the shared one.")
    shared_sparsity: float | None = Field(
        None, gt=0, le=1, description="What a designated shared latent pays, of what others do; null: 0.15 with l1, else 0.7."
    )
    input_scale: Literal["common", "per_model"] = Field("common", description="One scale for both models, or one for each.")
    expansion: float = Field(32.0, gt=0, description="Latents per dimension, at most.")
    tokens_per_latent: float = Field(64.0, gt=0, description="Latents are so few that this many tokens come to each.")
    epochs: float = Field(4.0, gt=0, description="Times that every token is seen.")
    max_tokens: int = Field(100_000_000, ge=1, description="Tokens trained on, at most, but at least min_steps batches.")
    min_steps: int = Field(300, ge=1, description="Steps, at least: short corpora are read more often.")
    batch_rows: int = Field(2048, ge=1, description="Tokens per batch, at most; fewer where an epoch had under 64 batches.")
    learning_rate: float | None = Field(None, gt=0, description="Null: 2e-4 / sqrt(latents / 16384), and larger for short trainings.")
    k_start_ratio: float = Field(4.0, ge=1, description="k begins this many times larger; 1 for no annealing.")
    aux_weight: float = Field(1 / 32, ge=0, description="Weight of the loss that brings dead latents back.")
    dead_after_steps: int = Field(100, ge=1, description="Batches without activity after which a latent is dead.")
    checkpoint_every: int = Field(2000, ge=1, description="Steps after which the state is written; an interrupt writes it too.")
    log_rows: int = Field(200, ge=1, description="Rows of the training log, at most.")
    seed: int = Field(0, ge=0, description="Of the initial weights and of the order of the data.")
    least_beta: float = Field(0.05, ge=0, description="Latent Scaling: no ratio where the model's own beta is smaller.")
    least_active: int = Field(100, ge=1, description="Latent Scaling: no ratio where a latent is active on fewer tokens.")
    specific_error: float = Field(0.2, description="A latent is one model's alone if its error ratio is below this …")
    specific_reconstruction: float = Field(0.5, description="… and its reconstruction ratio below this.")
    listed: int = Field(30, ge=1, description="Latents with tokens and examples: those that carry most of the difference.")
    per_band: int = Field(3, ge=1, description="Example sequences per latent and band.")
    top_tokens: int = Field(20, ge=1, description="Tokens listed per latent, head and direction.")
    min_probability: float = Field(1e-8, ge=0, le=1, description="Mean probability that lets a token be listed which the corpus lacks.")
    causal_tokens: int = Field(2048, ge=1, description="Tokens of held-out texts on which sets of latents are patched, at most.")
    causal_share: float = Field(0.25, gt=0, le=0.5, description="Of the latents that Latent Scaling ranks, in the sets of both ends.")
    shown: int = Field(40, ge=1, description="Tokens shown as findings.")
    shown_texts: int = Field(5, ge=0, description="Texts shown after them.")

    @property
    def paid_by_shared(self) -> float:
        """`shared_sparsity`, by default the published one with L1 alone: with BatchTopK shared latents would take all of k."""
        return self.shared_sparsity or SHARED_SPARSITY[self.sparsity]

    def n_latents(self, width: int, n_tokens: int) -> int:
        """F for so many tokens to fit on."""
        return int(max(WIDTHS_AT_LEAST * width, min(self.expansion * width, n_tokens / self.tokens_per_latent)))

    def rows_per_batch(self, n_tokens: int) -> int:
        """Tokens per batch."""
        return min(self.batch_rows, max(LEAST_ROWS, n_tokens // LEAST_BATCHES))

    def plan(self, width: int, n_latents: int, n_tokens: int) -> Plan:
        """The training for so many tokens to fit on."""
        trained = min(self.max_tokens, self.epochs * n_tokens)
        steps = max(self.min_steps, round(trained / self.rows_per_batch(n_tokens)))
        k = min(self.k or max(2.0, min(MOST_K, width / 16)), n_latents)
        return Plan(
            steps=steps,
            learning_rate=self.learning_rate or 2e-4 / (n_latents / 2**14) ** 0.5 * max(1.0, SHORT_STEPS / steps) ** (1 / 3),
            k=k,
            sparsity=self.sparsity,
            l1=self.l1,
            warm_up_steps=min(1000, round(WARM_UP_SHARE * steps)),
            k_start=min(self.k_start_ratio * k, n_latents),
            annealing_steps=min(5000, round(ANNEALING_SHARE * steps)),
            aux_weight=self.aux_weight,
            dead_after_steps=self.dead_after_steps,
        )
