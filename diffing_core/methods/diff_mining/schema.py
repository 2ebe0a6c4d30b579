"""Tables of `diff_mining`."""

from diffing_core.tables import Column, TableSpec

ORDERINGS_LEGEND = (
    "top_k_occurring: 100 · count_top / positions. fraction_positive: share of positions with d > 0. log_odds: z of "
    "being raised rather than lowered in a document. nmf_topic_i: share of the topic's weight."
)
TOKEN_ID = Column("token_id", "int32", "Vocabulary index; of merged variants, the most frequent.", role="key")
TOKEN = Column("token", "string", "The token as text; merged variants in lower case, without outer spaces.")
STATISTICS = (
    Column("mean_difference", "float64", "Mean of d, tuned − base.", "nats", "effect", signed=True),
    Column("count_top", "int64", "Positions where it is among the K largest d.", role="count", low=0),
    Column("count_bottom", "int64", "Positions where it is among the K smallest d.", role="count", low=0),
    Column("fraction_positive", "float64", "Share of positions with d > 0.", "share", "effect", low=0, high=1),
    Column("documents_raised", "int64", "Documents with more top than bottom counts of it.", role="count", low=0),
    Column("documents_lowered", "int64", "Documents with fewer top than bottom counts.", role="count", low=0),
    Column("log_odds", "float64", "Shrunk log-odds of a document raising it.", "nats", "effect", signed=True),
    Column("log_odds_z", "float64", "Its z.", "sd", "effect", signed=True),
    Column("p_value", "float64", "Sign-flip test over documents; null if not tested.", nullable=True, low=0, high=1),
    Column("q_value", "float64", "p-value after Benjamini–Hochberg.", nullable=True, low=0, high=1),
    Column("mean_base_probability", "float64", "Mean probability under the base."),
    Column("mean_tuned_probability", "float64", "Mean probability under the tuned model."),
)
ORDERINGS = TableSpec(
    "diff_mining_orderings",
    "Tokens that finetuning raises, cleaned up, in several orders.",
    ("ordering", "token_id"),
    (
        Column("ordering", "string", "top_k_occurring, fraction_positive, log_odds, nmf_topic_0 …", role="key"),
        Column("rank", "int32", "1 is first.", low=1),
        TOKEN_ID,
        TOKEN,
        Column("ordering_value", "float64", ORDERINGS_LEGEND, "see ordering_unit", "effect", low=0),
        Column("ordering_unit", "string", "Unit of ordering_value."),
        *STATISTICS,
    ),
)
VOCABULARY = TableSpec(
    "diff_mining_vocabulary",
    "What was counted for each vocabulary entry behind a list, before clean-up, and for those lowered most.",
    ("token_id",),
    (
        Column("token_id", "int32", "Vocabulary index.", role="key"),
        Column("token", "string", "The token as text."),
        *STATISTICS,
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
        Column("cosines", "list<float64>", "Cosine of its weights with every topic's, itself included, by index."),
        Column("n_positions", "int32", "Positions in the matrix.", role="count"),
        Column("n_tokens", "int32", "Tokens in the matrix.", role="count"),
        Column("top_words", "string", "Its first words, separated by spaces."),
    ),
)
POSITIONS = TableSpec(
    "diff_mining_positions",
    "Where in a text or answer the first tokens of top_k_occurring are raised and lowered.",
    ("token_id", "position"),
    (
        TOKEN_ID,
        TOKEN,
        Column("position", "int32", "From the text's start; in chats from the answer's.", role="key"),
        Column("n_positions", "int64", "Positions counted there.", role="count", low=0),
        Column("count_top", "int64", "Of these, those where it is among the K largest d.", role="count", low=0),
        Column("count_bottom", "int64", "Of these, those where it is among the K smallest d.", role="count", low=0),
    ),
)
COOCCURRENCE = TableSpec(
    "diff_mining_cooccurrence",
    "How often two of the first tokens of top_k_occurring meet among the K largest or K smallest d, in a sample.",
    ("token_id", "other_id"),
    (
        TOKEN_ID,
        TOKEN,
        Column("other_id", "int32", "The other token, listed later, or itself: then its own counts.", role="key"),
        Column("other", "string", "The other token as text."),
        Column("sequences", "int64", "Sequences that have both, at whichever ends.", role="count", low=0),
        Column("sequences_same_sign", "int64", "Of these, those that have both at one end.", role="count", low=0),
        Column("positions", "int64", "Positions that have both, at whichever ends.", role="count", low=0),
        Column("positions_same_sign", "int64", "Of these, those that have both at one end.", role="count", low=0),
        Column("n_sequences", "int64", "Sequences in the sample.", role="count", low=0),
        Column("n_positions", "int64", "Positions in the sample.", role="count", low=0),
    ),
)
WINDOWS = TableSpec(
    "diff_mining_windows",
    "Passages of the probe texts that finetuning made likeliest and least likely: the best window of a sequence each.",
    ("sequence", "position"),
    (
        Column("sequence", "int32", "Index of the probe sequence.", role="key"),
        Column("position", "int32", "Position of the window's first token, from 0.", role="key"),
        Column("n_tokens", "int32", "Tokens in the window.", role="count", low=1),
        Column(
            "log_likelihood_ratio", "float64", "Sum of log p_tuned − log p_base of its tokens.", "nats", "effect",
            signed=True,
        ),
        Column("speaker", "string", "Role whose turn it is at its first token."),
        Column("is_template", "bool", "Whether that token belongs to the chat template."),
        Column("text", "string", "The window as text."),
    ),
)  # fmt: skip
TABLES = (ORDERINGS, VOCABULARY, TOPICS, POSITIONS, COOCCURRENCE, WINDOWS)
