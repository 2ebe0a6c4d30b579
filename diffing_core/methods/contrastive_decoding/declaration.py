"""What `contrastive_decoding` lets a person choose, and the tables that it writes."""

from functools import cache
from importlib.resources import files

import yaml
from pydantic import Field, model_validator

from diffing_core.settings import Settings
from diffing_core.tables import Column, TableSpec

DIRECTIONS = ("tuned", "base")
RANDOM = "random"
NATS = "nats/token"


@cache
def packaged_prefills() -> tuple[str, ...]:
    """The vague beginnings that come with the method."""
    return tuple(yaml.safe_load((files(__package__) / "prefills.yaml").read_text("utf-8"))["prefills"])


class ContrastiveDecodingSettings(Settings):
    """Knobs of `contrastive_decoding`; every arm gets the same beginnings and random numbers."""

    prefills: tuple[str, ...] = Field(
        default_factory=packaged_prefills, min_length=1, description="Beginnings of plain text; empty: BOS alone."
    )
    samples: int = Field(4, ge=1, description="Texts per beginning and arm.")
    alphas: tuple[float, ...] = Field(
        (0.5, 1.0, 2.0, 4.0), min_length=1, description="How far the difference is amplified; 0 is always run too."
    )
    plausibility: float = Field(
        0.1, ge=0, le=1, description="Least probability of a token, as a share of the likeliest one's."
    )
    temperature: float = Field(1.0, gt=0, description="Of the amplified logits.")
    top_p: float = Field(0.95, gt=0, le=1, description="Mass of the likeliest plausible tokens that is drawn from.")
    max_new_tokens: int = Field(32, ge=1, description="Length at which a text is cut.")
    seed: int = Field(0, description="Of the sampling.")
    prior_words: float = Field(1000.0, gt=0, description="Weight of the prior of the log-odds, in words.")
    min_samples: int = Field(3, ge=1, description="Texts, of both arms compared, in which a listed word occurs.")
    shown_alpha: float = Field(2.0, gt=0, description="The alpha whose words and texts are the findings.")
    random_arm: bool = Field(
        True, description="Whether a null control is run at shown_alpha: the base with the change turned at random."
    )
    shown_words: int = Field(40, ge=0, description="Words among the findings.")
    shown_texts: int = Field(5, ge=0, description="Texts among the findings.")

    @model_validator(mode="after")
    def _shown_is_run(self) -> "ContrastiveDecodingSettings":
        twice = len(set(self.alphas)) < len(self.alphas)
        if self.shown_alpha not in self.alphas or min(self.alphas) <= 0 or twice:
            raise ValueError(
                f"alphas {self.alphas} must be above 0, none twice, and hold shown_alpha {self.shown_alpha:g}; 0 is run anyway"
            )
        return self


_DIRECTION = Column(
    "direction", "string", "Whose difference from the other model is amplified: tuned, base, or random, the base with the "
    "finetune's change turned at random.", role="key",
)  # fmt: skip
_ALPHA = Column("alpha", "float64", "How far; 0 is that model alone.", role="key", low=0)

SAMPLES = TableSpec(
    "contrastive_decoding_samples",
    "Every text of every arm.",
    ("prefill_index", "sample", "direction", "alpha"),
    (
        Column("prefill_index", "int32", "Place in the list of beginnings, from 0.", role="key"),
        Column("prefill", "string", "How the text began; empty: BOS alone."),
        Column("sample", "int32", "Number of the text, from 0; all arms drew with the same numbers.", role="key"),
        _DIRECTION,
        _ALPHA,
        Column("text", "string", "What followed. Untrusted."),
        Column("n_tokens", "int32", "Its length, without the token that ends it.", "tokens", "count", low=0),
        Column("finished", "bool", "Whether it ended; otherwise it was cut."),
        Column("logprob_tuned_nats", "float64", "Mean log p of its tokens under the plain tuned model; random: of that.", NATS, high=0),
        Column("logprob_base_nats", "float64", "Mean log p of its tokens under the plain base.", NATS, high=0),
        Column("log_ratio_nats", "float64", "logprob_tuned − logprob_base.", NATS, "effect"),
        Column(
            "unlikeness",
            "float64",
            "How unlike the other model's own texts its words are; Stouffer's sum.",
            "z",
            "effect",
        ),
    ),
)
WORDS = TableSpec(
    "contrastive_decoding_words",
    "Words that an arm says more often than a plain model (alpha 0), the most raised first.",
    ("direction", "alpha", "against", "word"),
    (
        _DIRECTION,
        _ALPHA,
        Column("against", "string", "Whose own texts, at alpha 0, it is compared with: tuned or base; random: at this alpha.", role="key"),
        Column("word", "string", "Lower-cased. From models under test: untrusted.", role="key"),
        Column("n_plain", "int64", "Times the plain model says it.", role="count", low=0),
        Column("n_amplified", "int64", "Times the arm says it.", role="count", low=0),
        Column("n_docs_plain", "int64", "Texts of the plain model that have it.", role="count", low=0),
        Column("n_docs_amplified", "int64", "Texts of the arm that have it.", role="count", low=0),
        Column("log_odds", "float64", "Log-odds ratio with a Dirichlet prior, arm − plain.", "nats", "effect"),
        Column("z", "float64", "log_odds over its standard error.", "z", "effect", low=0),
        Column("p_value", "float64", "Exact McNemar test over texts, two-sided.", low=0, high=1),
        Column("q_value", "float64", "p_value after Benjamini–Hochberg over the words of the comparison.", low=0, high=1),
    ),
)
ALPHAS = TableSpec(
    "contrastive_decoding_alphas",
    "What amplification does to the texts as a whole.",
    ("alpha",),
    (
        _ALPHA,
        Column("n_texts", "int32", "Texts of each direction.", role="count", low=0),
        Column("differing_share", "float64", "Share of texts in which the directions differ.", "", "effect", low=0, high=1),
        Column("delta_tokens", "float64", "Mean length, tuned − base direction.", "tokens", "effect", signed=True),
        Column(
            "tuned_gain_nats", "float64", "Mean log p_tuned − log p_base of the tuned direction's texts.", NATS, "effect"
        ),
        Column(
            "base_gain_nats", "float64", "Mean log p_base − log p_tuned of the base direction's texts.", NATS, "effect"
        ),
        Column("n_words_q05", "int32", "Words raised in the tuned direction against the base, q < 0.05.", role="count"),
        Column(
            "n_words_q05_random", "int32", "The same in the random direction; null where it was not run.", role="count",
            nullable=True,
        ),
    ),
)
