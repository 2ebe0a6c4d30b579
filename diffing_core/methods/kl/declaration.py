"""Settings and tables of `kl`."""

from pydantic import Field

from diffing_core.examples import examples_spec
from diffing_core.settings import Settings
from diffing_core.tables import Column, TableSpec

NATS = "nats/token"


class KlSettings(Settings):
    """Knobs of `kl`."""

    temperature: float = Field(1.0, gt=0, description="Divides both models' log-probabilities before they are compared.")
    token_rows: int = Field(200_000, ge=0, description="At most this many tokens are written one by one.")
    top_tokens: int = Field(100, ge=1, description="Vocabulary entries listed by their share of the KL.")
    examples: int = Field(20, ge=1, description="Sequences kept per divergence and ranking, with a value per token.")
    min_contexts: int = Field(3, ge=1, description="Times a token must occur to be listed as hot.")
    shown: int = Field(40, ge=1, description="Findings shown.")


def _divergences(role: str) -> tuple[Column, ...]:
    return (
        Column("kl_nats", "float64", "KL(tuned ‖ base).", NATS, role, low=0),
        Column("reverse_kl_nats", "float64", "KL(base ‖ tuned).", NATS, role, low=0),
        Column("js_nats", "float64", "Jensen–Shannon divergence.", NATS, role, low=0, high=0.6932),
        Column("total_variation", "float64", "Half the sum of |p_tuned − p_base|.", "", role, low=0, high=1.0001),
    )


MEANS = (
    Column("argmax_differs", "float64", "Share of tokens after which the two favour different ones.", "", "effect",
           low=0, high=1),
    Column("delta_logprob", "float64", "Mean of log p of the true next token, tuned − base; null where none follows.",
           "nats", "effect", True, signed=True),
    Column("base_entropy_nats", "float64", "Mean entropy of the base's predictions.", NATS),
    Column("tuned_entropy_nats", "float64", "Mean entropy of the tuned model's predictions.", NATS),
)  # fmt: skip
TOKENS = TableSpec(
    "kl_tokens",
    "How far the two models' predictions differ after each probe token.",
    ("sequence", "position"),
    (
        Column("sequence", "int32", "Index of the probe sequence.", role="key"),
        Column("position", "int32", "Position of the token, from 0.", role="key"),
        Column("token", "string", "The token after which both models predict."),
        Column("next_token", "string", "The true next token.", nullable=True),
        Column("speaker", "string", "Role whose turn it is: text, system, user, assistant, tool."),
        Column("is_template", "bool", "Whether the token belongs to the chat template."),
        *_divergences("effect"),
        Column("delta_logprob", "float64", "log p of the true next token, tuned − base.", "nats", "effect", True,
               signed=True),
        Column("base_entropy_nats", "float64", "Entropy of the base's prediction.", NATS),
        Column("tuned_entropy_nats", "float64", "Entropy of the tuned model's prediction.", NATS),
        Column("argmax_agrees", "bool", "Whether both models favour the same token."),
        Column("gained_token", "string", "Token with the largest term p_tuned (log p_tuned − log p_base) of the KL."),
        Column("gained_nats", "float64", "That term.", "nats", "effect", low=0),
        Column("lost_token", "string", "Token with the smallest such term."),
        Column("lost_nats", "float64", "That term.", "nats", "effect", high=0),
    ),
)  # fmt: skip
SEQUENCES = TableSpec(
    "kl_sequences",
    "Mean divergence per probe sequence: the sampling unit of every interval.",
    ("sequence",),
    (
        Column("sequence", "int32", "Index of the probe sequence.", role="key"),
        Column("n_tokens", "int32", "Tokens read.", role="count"),
        *_divergences("effect"),
        Column("max_kl_nats", "float64", "Largest KL(tuned ‖ base) of a token.", "nats", "effect", low=0),
        *MEANS,
    ),
)
POSITIONS = TableSpec(
    "kl_positions",
    "Mean divergence by position, speaker and template flag.",
    ("position", "speaker", "is_template"),
    (
        Column("position", "int32", "Position in the sequence, from 0.", role="key"),
        Column("speaker", "string", "Role whose turn it is.", role="key"),
        Column("is_template", "bool", "Whether the tokens belong to the chat template.", role="key"),
        Column("n_tokens", "int64", "Tokens averaged.", role="count"),
        *_divergences("effect"),
        *MEANS,
    ),
)
VOCABULARY = TableSpec(
    "kl_vocabulary",
    "Tokens on which the divergence is spent.",
    ("token_id",),
    (
        Column("token_id", "int32", "Vocabulary index.", role="key"),
        Column("token", "string", "The token as text."),
        Column("contribution_nats", "float64", "Mean of p_tuned (log p_tuned − log p_base).", NATS, "effect"),
        Column("mean_base_probability", "float64", "Mean probability under the base."),
        Column("mean_tuned_probability", "float64", "Mean probability under the tuned model."),
    ),
)
HOT_TOKENS = TableSpec(
    "kl_hot_tokens",
    "Divergence by the token that was just read, and by the one that truly follows: what sets the tuned model off.",
    ("place", "token_id"),
    (
        Column("place", "string", "read: the last token of the context; next: the true token after it.", role="key"),
        Column("token_id", "int32", "Vocabulary index of that token.", role="key"),
        Column("token", "string", "The token as text."),
        Column("n_contexts", "int64", "Times it occurs in the corpus.", role="count"),
        Column("kl_nats", "float64", "Mean KL(tuned ‖ base) there.", NATS, "effect", low=0),
        Column("sd_kl_nats", "float64", "Standard deviation of it over these contexts.", NATS, "effect", low=0),
    ),
)
EXAMPLES = examples_spec(
    "kl_examples",
    "Probe sequences on which the models differ most, with the divergence after each token.",
    (Column("statistic", "string", "kl_nats or reverse_kl_nats.", role="key"),),
    unit=NATS,
)
