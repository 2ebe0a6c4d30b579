"""Tables of `itda`."""

from diffing_core.band_examples import bands_spec
from diffing_core.lens_tables import lens_spec
from diffing_core.tables import Column, TableSpec

LAYER = Column("layer", "int32", "Block whose output was read, from 0.", role="key")
ATOM = Column("atom", "int32", "Number of the atom in its layer's dictionary, from 0 in order of construction.", role="key")
TOKEN = Column("token", "string", "The token that the atom is.")
SNIPPET = Column("snippet", "string", "That token, between « and », in its text. Untrusted.")
ENERGY = "share of mean ‖h‖²"

LAYERS = TableSpec(
    "itda_layers",
    "Dictionaries of activations per layer: how many atoms the base needed, how many more the tuned model.",
    ("layer",),
    (
        LAYER,
        Column("n_tokens", "int64", "Tokens from which the dictionary was built.", role="count"),
        Column("n_left_out", "int64", "Chosen tokens that were special or zero.", role="count"),
        Column("n_outliers", "int64", "Rows left out for their norms before any was chosen.", role="count", low=0),
        Column("n_held_out", "int64", "Held-out tokens that were encoded.", role="count"),
        Column("base_atoms", "int64", "Atoms after all passes over the base.", role="count"),
        Column("is_saturated", "bool", "Whether the last pass over the base added next to nothing."),
        Column("null_atoms", "int64", "Atoms that one more pass over the base would add; 0 by construction if the base saturated "
               "with settled_share 0, since its last pass added none.", role="count"),
        Column("tuned_atoms", "int64", "Atoms that the pass over the tuned model added.", role="count"),
        Column("new_atoms", "int64", "Those of them that the null pass would not add too.", role="effect"),
        Column("excess_atoms", "int64", "tuned_atoms − null_atoms.", role="effect"),
        Column("n_documents", "int64", "Texts that the tokens are from.", role="count"),
        Column("tuned_documents", "int64", "Texts in which the tuned model added an atom.", role="count"),
        Column("tuned_documents_low", "float64", "Their share: lower end of the exact 95 % interval.", low=0, high=1),
        Column("tuned_documents_high", "float64", "Upper end.", low=0, high=1),
        Column("null_documents", "int64", "Texts in which the null pass would add an atom.", role="count"),
        Column("null_documents_high", "float64", "Their share: upper end of the exact 95 % interval.", low=0, high=1),
        Column("p_value", "float64", "That texts with atoms of the tuned pass alone are as likely as of the null pass alone "
               "(McNemar, exact). Where null_atoms is 0 by construction it is 2^(1 − tuned_documents), at most 1: that tuning changed "
               "anything, not that the change is narrow, which only calibration on null arms tells.", low=0, high=1),
        Column("mean_rotation", "float64", "Mean over base atoms of 1 − cos(atom, the tuned model's vector of its token).", "",
               "effect", low=0, high=2),
        Column("base_fvu", "float64", "Unexplained variance of held-out base vectors in base atoms.", low=0),
        Column("tuned_fvu", "float64", "The same of tuned vectors.", low=0),
        Column("whole_fvu", "float64", "Of tuned vectors in base and added atoms.", low=0),
        Column("excess_fvu", "float64", "tuned_fvu − base_fvu.", "", "effect"),
        Column("difference_fvu", "float64", "Unexplained variance of held-out tuned − base, predicted from the codes of tuned vectors "
               "by what tuning did to their atoms' tokens; null where it does not vary.", nullable=True, low=0),
        Column("base_l0", "float64", "Mean number of atoms per held-out base vector, base atoms.", low=0),
        Column("tuned_l0", "float64", "The same of tuned vectors.", low=0),
        Column("whole_l0", "float64", "Of tuned vectors in base and added atoms.", low=0),
    ),
)  # fmt: skip
PASSES = TableSpec(
    "itda_passes",
    "How a dictionary filled up: atoms after each pass over the tokens.",
    ("layer", "side", "pass"),
    (
        LAYER,
        Column("side", "string", "base; null: one more base pass, not kept; tuned: after the base's; tuned_alone: a dictionary "
               "of its own; base_reordered: the base's tokens in another order.", role="key"),
        Column("pass", "int32", "Number of the pass, from 1; null and tuned follow the last of the base.", role="key", low=1),
        Column("added", "int64", "Atoms added.", role="count"),
        Column("atoms", "int64", "Atoms after it.", role="count"),
    ),
)  # fmt: skip
ATOMS = TableSpec(
    "itda_atoms",
    "Every atom with its source, how far tuning turned it, and the published ordering of base atoms.",
    ("layer", "atom"),
    (
        LAYER,
        ATOM,
        Column("stage", "string", "base, or tuned for those added."),
        Column("source_corpus", "string", "Probe corpus of the token."),
        Column("sequence", "int32", "Its text, counted in that corpus.", low=0),
        Column("position", "int32", "Its position there, from 0.", low=0),
        TOKEN,
        SNIPPET,
        Column("rotation", "float64", "1 − cos of both models' vectors of the token.", "", "effect", low=0, high=2),
        Column("published_delta", "float64", "Mean coefficient in the base's dictionary over held-out tokens, by plain matching "
               "pursuit, tuned − base; null for added atoms.", "", "effect", nullable=True),
        Column("published_rank", "int32", "Place by its size, from 1.", nullable=True, low=1),
        Column("p_value", "float64", "That texts raise and lower it equally often (sign test, exact).", nullable=True, low=0, high=1),
        Column("q_value", "float64", "After Benjamini–Hochberg over the layer's base atoms.", nullable=True, low=0, high=1),
    ),
)  # fmt: skip
NEW_ATOMS = TableSpec(
    "itda_new_atoms",
    "Atoms that only the tuned model needs, by how much of it they make up.",
    ("layer", "atom"),
    (
        LAYER,
        ATOM,
        Column("rank", "int32", "Place by weight (energy, or added energy if so asked), from 1.", low=1),
        TOKEN,
        SNIPPET,
        Column("energy", "float64", "Mean squared contribution to held-out tuned vectors: usage × energy where used.", ENERGY,
               "effect", low=0),
        Column("base_energy", "float64", "The same of base vectors.", ENERGY, "effect", low=0),
        Column("usage", "float64", "Share of held-out tuned vectors whose code has it.", "", "effect", low=0, high=1),
        Column("base_usage", "float64", "The same of base vectors.", "", "effect", low=0, high=1),
        Column("unexpressed", "float64", "1 − cos of the atom with its code in base atoms.", "", "effect", low=0, high=2),
        Column("cluster", "int32", "Number of the leading new atom that it is like; its own if of none.", low=0),
        Column("p_value", "float64", "That it has more energy in tuned as often as in base, over texts (sign test, exact).",
               low=0, high=1),
        Column("q_value", "float64", "After Benjamini–Hochberg over the layer's new atoms.", low=0, high=1),
    ),
)  # fmt: skip
TOKENS = TableSpec(
    "itda_tokens",
    "Tokens that the leading new atoms promote, added up over atoms.",
    ("layer", "rank"),
    (
        LAYER,
        Column("rank", "int32", "1 is promoted most.", role="key", low=1),
        Column("token_id", "int32", "Vocabulary index."),
        TOKEN,
        Column("weight", "float64", "Σ over atoms of weight × p(token), through the tuned model's norm and head, of what tuning "
               "added to the atom's token.", ENERGY, "effect", low=0),
        Column("n_atoms", "int32", "Atoms that list it.", low=1),
        Column("atom", "int32", "The one with the largest part.", low=0),
        SNIPPET,
    ),
)  # fmt: skip
LENS = lens_spec(
    "itda_lens",
    "Tokens that leading new atoms promote or suppress.",
    (
        LAYER,
        ATOM,
        Column("part", "string", "What is read: atom; unexpressed: what base atoms leave of it; shift: tuned − base of its token.",
               role="key"),
    ),
)  # fmt: skip
EXAMPLES = bands_spec(
    "itda_examples",
    "Held-out texts that use a leading new atom, by band of its size in the tuned model.",
    (LAYER, ATOM),
    unit="share of ‖h‖",
)
PATTERNS = TableSpec(
    "itda_patterns",
    "Size of leading new atoms' coefficients along their source snippets.",
    ("layer", "atom", "place"),
    (
        LAYER,
        ATOM,
        Column("place", "int32", "Place relative to the atom's token.", role="key"),
        Column("label", "string", "Layer, rank and token of the atom."),
        Column("token", "string", "Token there. Untrusted."),
        Column("tuned", "float64", "Absolute coefficient in the tuned model's vector, which has length 1.", "share of ‖h‖", "effect"),
        Column("base", "float64", "The same of the base's.", "share of ‖h‖", "effect"),
    ),
)
SIMILARITY = TableSpec(
    "itda_similarity",
    "How alike layers are, of one model and of both: shared atoms of their dictionaries, and linear CKA.",
    ("side", "layer", "other_side", "other_layer"),
    (
        Column("side", "string", "base or tuned.", role="key"),
        LAYER,
        Column("other_side", "string", "base, tuned, or base_reordered: the noise floor, other order of the same tokens.", role="key"),
        Column("other_layer", "int32", "Its block.", role="key"),
        Column("name", "string", "Side and block in one."),
        Column("other_name", "string", "The other's."),
        Column("jaccard", "float64", "Tokens that are atoms of both over those of either, dictionaries of one pass.", low=0, high=1),
        Column("linear_cka", "float64", "Null where the vectors are the same.", nullable=True, low=0, high=1.0001),
    ),
)
ABLATIONS = TableSpec(
    "itda_ablations",
    "KL(tuned ‖ base) when the tuned model runs without new atoms, or without as many random old ones.",
    ("layer", "ablated", "how"),
    (
        LAYER,
        Column("ablated", "string", "new or random atoms.", role="key"),
        Column("how", "string", "omitted: the atoms' part of the code is taken off; turned_back: only what tuning did to their "
               "tokens is.", role="key"),
        Column("n_atoms", "int32", "Atoms left out.", low=0),
        Column("n_documents", "int32", "Held-out texts read.", low=1),
        Column("kl_nats", "float64", "Mean KL of the tuned model as it is.", "nats/token", "effect", low=0),
        Column("ablated_kl_nats", "float64", "Mean KL without the atoms.", "nats/token", "effect", low=0),
        Column("removed", "float64", "1 − ablated_kl_nats / kl_nats; negative if it grew.", "", "effect"),
        Column("removed_low", "float64", "Lower end of the 95 % interval over texts.", "", "effect"),
        Column("removed_high", "float64", "Upper end.", "", "effect"),
        Column("beyond_random", "float64", "removed − that of random atoms, same way.", "", "effect"),
        Column("beyond_random_low", "float64", "Lower end of the 95 % interval over texts.", "", "effect"),
        Column("beyond_random_high", "float64", "Upper end.", "", "effect"),
    ),
)  # fmt: skip
TABLES = (LAYERS, PASSES, ATOMS, NEW_ATOMS, TOKENS, LENS, EXAMPLES, PATTERNS, SIMILARITY, ABLATIONS)
