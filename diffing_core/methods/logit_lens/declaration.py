"""Settings and tables of `logit_lens`."""

from pydantic import Field

from diffing_core.settings import Settings
from diffing_core.tables import Column, TableSpec


class LogitLensSettings(Settings):
    """Knobs of `logit_lens`."""

    layers: tuple[int | float, ...] | None = Field(None, description="Blocks to read; none means all.")
    max_tokens: int = Field(512, ge=1, description="About this many tokens are read per corpus.")
    top_tokens: int = Field(25, ge=1, description="Tokens listed per layer, direction and criterion.")
    min_probability: float = Field(1e-5, ge=0, description="Mean probability a listed token needs in one model.")
    shown: int = Field(40, ge=1, description="Findings shown.")


LAYERS = TableSpec(
    "logit_lens_layers",
    "Divergence of the two models' lens readings per layer.",
    ("layer",),
    (
        Column("layer", "int32", "Block whose output was read, from 0.", role="key"),
        Column("n_layers", "int32", "Blocks of the model."),
        Column("n_tokens", "int64", "Tokens read.", role="count"),
        Column("kl_nats", "float64", "Mean KL(tuned ‖ base), each through its own norm and head.", "nats/token",
               "effect", low=0),
        Column("js_nats", "float64", "Mean Jensen–Shannon divergence, each through its own norm and head.", "nats/token",
               "effect", low=0),
        Column("cross_kl_nats", "float64", "The same with both residuals read through the base's norm and head.",
               "nats/token", "effect", low=0),
        Column("argmax_differs", "float64", "Share of tokens on whose likeliest next token the two differ.", "",
               "effect", low=0, high=1),
        Column("delta_logprob", "float64", "Mean log p of the true next token, tuned − base.", "nats", "effect",
               signed=True),
    ),
)  # fmt: skip
TOKENS = TableSpec(
    "logit_lens_tokens",
    "Tokens that the tuned model's lens gained or lost, per layer.",
    ("layer", "criterion", "direction", "rank"),
    (
        Column("layer", "int32", "Block whose output was read, from 0.", role="key"),
        Column("criterion", "string", "Ranked by: probability, logprob, or cross_probability: both states read through "
               "the base's norm and head, listed only where the tuned model has its own.", role="key"),
        Column("direction", "string", "gained or lost by the tuned model.", role="key"),
        Column("rank", "int32", "1 is the largest change.", role="key"),
        Column("token_id", "int32", "Vocabulary index."),
        Column("token", "string", "The token as text."),
        Column("base_rank", "int32", "Place of the token by its mean probability under the base, from 1.", low=1),
        Column("tuned_rank", "int32", "The same under the tuned model.", low=1),
        Column("delta_probability", "float64", "Mean p_tuned − p_base.", "", "effect"),
        Column("delta_logprob", "float64", "Mean log p_tuned − log p_base.", "nats", "effect"),
    ),
)  # fmt: skip
EMERGENCE = TableSpec(
    "logit_lens_emergence",
    "Depth at which the tokens gained at the deepest layer appear, and stay.",
    ("token_id",),
    (
        Column("token_id", "int32", "Vocabulary index.", role="key"),
        Column("token", "string", "The token as text."),
        Column("rank", "int32", "Its place among the tokens gained in probability at the deepest layer.", low=1),
        Column("delta_probability", "float64", "Mean p_tuned − p_base at the deepest layer.", "", "effect"),
        Column("gained_layer", "int32", "First layer from which on it is among the tokens gained most.", nullable=True),
        Column("tuned_layer", "int32", "First layer from which on it is among the tuned model's likeliest tokens; null "
               "if it never is.", nullable=True),
        Column("base_layer", "int32", "The same for the base.", nullable=True),
    ),
)  # fmt: skip
