"""Settings and tables of `diff_mining`."""

from typing import Literal

from pydantic import Field

from diffing_core.settings import Settings
from diffing_core.tables import Column, TableSpec


class DiffMiningSettings(Settings):
    """Knobs of `diff_mining`."""

    top_k: int = Field(100, ge=1, description="Tokens at each end of a position's differences; at most V/2.")
    centre: Literal["logprob", "mean"] = Field(
        "logprob", description="Zero of the differences: equal log-probabilities, or each position's mean over V."
    )
    listed: int = Field(100, ge=1, description="Tokens per ordering.")
    whole_vocabulary: bool = Field(False, description="Write every vocabulary entry, not only listed ones.")
    readable_only: bool = Field(True, description="Leave special, broken and blank tokens out of all lists.")
    min_probability: float = Field(
        1e-6, ge=0, le=1, description="Leave out tokens whose mean probability is below this in both models."
    )
    merge_variants: bool = Field(False, description="Treat tokens that differ in case or outer spaces as one.")
    prior_weight: float = Field(1.0, gt=0, description="Prior occurrences per observed one in the log-odds.")
    min_documents: int = Field(5, ge=1, description="Documents a token must occur in to be tested.")
    topics: int = Field(3, ge=0, description="NMF topics; 0 turns them off.")
    topic_tokens: int = Field(200, ge=1, description="Tokens per topic's list.")
    topic_words: int = Field(10, ge=1, description="Words that stand for a topic.")
    nmf_positions: int = Field(8192, ge=1, description="Positions that the topics are fitted to.")
    nmf_entries: Literal["magnitude", "binary"] = Field("magnitude", description="Entries: max(d, 0), or 1.")
    nmf_loss: Literal["frobenius", "kullback-leibler"] = Field("frobenius", description="Divergence of the NMF.")
    nmf_iterations: int = Field(200, ge=1, description="Most iterations of the NMF.")
    seed: int = Field(0, ge=0, description="Seed of the position sample and of the NMF.")
    shown: int = Field(40, ge=1, description="Tokens among the findings.")


ORDERINGS_LEGEND = (
    "top_k_occurring: 100 · count_top / positions. fraction_positive: share of positions with d > 0. log_odds: z of "
    "being among the largest rather than the smallest. nmf_topic_i: share of the topic's weight."
)
STATISTICS = (
    Column("mean_logprob_difference", "float64", "Mean of log p_tuned − log p_base.", "nats", "effect", signed=True),
    Column("count_top", "int64", "Positions where it is among the K largest differences.", role="count", low=0),
    Column("count_bottom", "int64", "Positions where it is among the K smallest.", role="count", low=0),
    Column("fraction_positive", "float64", "Share of positions with d > 0.", "share", "effect", low=0, high=1),
    Column(
        "q_value",
        "float64",
        "p-value after Benjamini–Hochberg; null where the token was not tested.",
        nullable=True,
        low=0,
        high=1,
    ),
)
ORDERINGS = TableSpec(
    "diff_mining_orderings",
    "Tokens that finetuning raises, in several orders.",
    ("ordering", "token_id"),
    (
        Column("ordering", "string", "top_k_occurring, fraction_positive, log_odds, nmf_topic_0 …", role="key"),
        Column("rank", "int32", "1 is first.", low=1),
        Column("token_id", "int32", "Vocabulary index; of merged variants, the most frequent.", role="key"),
        Column("token", "string", "The token as text."),
        Column("ordering_value", "float64", ORDERINGS_LEGEND, "see ordering_unit", "effect", low=0),
        Column("ordering_unit", "string", "Unit of ordering_value."),
        *STATISTICS,
    ),
)
VOCABULARY = TableSpec(
    "diff_mining_vocabulary",
    "What was counted for each listed token, and for those that finetuning lowers most.",
    ("token_id",),
    (
        Column("token_id", "int32", "Vocabulary index; of merged variants, the most frequent.", role="key"),
        Column("token", "string", "The token as text."),
        *STATISTICS,
        Column("log_odds", "float64", "Shrunk log-odds, largest against smallest.", "nats", "effect", signed=True),
        Column("log_odds_z", "float64", "Its z, occurrences taken as independent.", "sd", "effect", signed=True),
        Column("n_documents", "int32", "Documents in which the two counts differ.", role="count", low=0),
        Column("p_value", "float64", "Sign-flip test over documents.", nullable=True, low=0, high=1),
        Column("mean_base_probability", "float64", "Mean probability under the base."),
        Column("mean_tuned_probability", "float64", "Mean probability under the tuned model."),
    ),
)
TOPICS = TableSpec(
    "diff_mining_topics",
    "Groups of tokens that are raised at the same positions, largest first.",
    ("topic",),
    (
        Column("topic", "int32", "Index by mass, from 0.", role="key"),
        Column("mass", "float64", "Sum of the topic's part of the matrix.", "nats or entries", "effect", low=0),
        Column("prevalence", "float64", "Share of the positions where it is the largest.", "share", "effect", low=0),
        Column(
            "concentration", "float64", "1 − entropy of its weights / log of the tokens.", "0 to 1", "effect", low=-1e-9
        ),
        Column("largest_cosine", "float64", "Largest cosine with another topic's weights; 0 if alone.", low=0),
        Column("n_positions", "int32", "Positions in the matrix.", role="count"),
        Column("n_tokens", "int32", "Tokens in the matrix.", role="count"),
        Column("top_words", "string", "Its first words, separated by spaces."),
    ),
)
