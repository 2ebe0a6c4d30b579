"""Tables of `crosscoder`."""

from diffing_core.band_examples import bands_spec
from diffing_core.lens_tables import lens_spec
from diffing_core.steering import steering_spec
from diffing_core.tables import Column, TableSpec

UNIT = "activation units"
OTHER = {"base": "tuned", "tuned": "base"}
LAYER = Column("layer", "int32", "Block whose output was read, from 0.", role="key", low=0)
LATENT = Column("latent", "int32", "Number of the latent, from 0.", role="key", low=0)

TRAINING = TableSpec(
    "crosscoder_training",
    "How the crosscoder was learned, step by step: numbers of single batches.",
    ("layer", "step"),
    (
        LAYER,
        Column("step", "int32", "Batches learned from.", role="key", low=1),
        Column("loss", "float64", "Share of both models' variance unexplained, with sparsity and auxiliary terms.", low=0),
        Column("aux_loss", "float64", "Share of the error that the best dead latents leave; 0 without dead latents.", low=0),
        Column("fvu_base", "float64", "Fraction of variance unexplained of the base's activations.", low=0),
        Column("fvu_tuned", "float64", "The same of the tuned model's.", low=0),
        Column("l0", "float64", "Active latents per token.", "latents", low=0),
        Column("dead_share", "float64", "Latents that were silent for many batches.", low=0, high=1),
        Column("k", "float64", "Latents kept per token, annealed down.", "latents", low=0),
        Column("learning_rate", "float64", "Of Adam.", low=0),
    ),
)
FITS = TableSpec(
    "crosscoder_fits",
    "How well a finished crosscoder describes the activations it was fitted on, and held-out ones.",
    ("layer", "part"),
    (
        LAYER,
        Column("part", "string", "fit, or held_out: whole sequences that were not trained on.", role="key"),
        Column("n_tokens", "int64", "Tokens read.", role="count", low=0),
        Column("n_outliers", "int64", "Rows left out for their norms, of both parts together.", role="count", low=0),
        Column("fvu_base", "float64", "Fraction of variance unexplained; null where there is no variance.", nullable=True, low=0),
        Column("fvu_tuned", "float64", "The same of the tuned model's.", nullable=True, low=0),
        Column("fvu_difference", "float64", "The same of δ.", nullable=True, low=0),
        Column("l0", "float64", "Active latents per token.", "latents", nullable=True, low=0),
        Column("dead_share", "float64", "Latents active on no token of this part.", low=0, high=1),
        Column("n_latents", "int32", "Latents.", low=1),
        Column("k", "float64", "Latents wanted per token.", "latents", low=0),
        Column("threshold", "float64", "Score above which a latent is active.", low=0),
        Column("scale_base", "float64", "What activations were multiplied by to train.", "1/activation units", low=0),
        Column("scale_tuned", "float64", "The same of the tuned model.", "1/activation units", low=0),
        Column("n_steps", "int32", "Batches learned from.", low=0),
        Column("file", "string", "The weights, in the folder of this result; their config lies beside them."),
    ),
)


def _ratios(side: str) -> tuple[Column, ...]:
    """ν along this side's decoder directions: the other model's β over this one's."""
    found = []
    for target, what in (("error", "of the error with the latent put back"), ("reconstruction", "of the reconstruction")):
        name = f"nu_{target}_{side}"
        doc = f"Latent Scaling along the {side} decoder: β {what}, {OTHER[side]} over {side}"
        found += [
            Column(name, "float64", f"{doc}. Null where it says nothing.", nullable=True),
            Column(f"{name}_low", "float64", "Jackknife over documents, 95 %.", nullable=True),
            Column(f"{name}_high", "float64", "Jackknife over documents, 95 %.", nullable=True),
            Column(f"beta_{target}_{side}", "float64", f"The {side} model's own β there.", nullable=True),
        ]
    return tuple(found)


LATENTS = TableSpec(
    "crosscoder_latents",
    "Every latent: its decoders in both models, its activity, and which model has what it stands for.",
    ("layer", "latent"),
    (
        LAYER,
        LATENT,
        Column("owner", "string", "What the partition allows it: both, base, tuned, or shared (one decoder for both)."),
        Column("norm_base", "float64", "Length of the base's decoder direction.", UNIT, low=0),
        Column("norm_tuned", "float64", "Length of the tuned model's.", UNIT, low=0),
        Column("norm_difference", "float64", "(tuned − base) / larger of the two lengths.", "", "effect", signed=True),
        Column("delta_norm", "float64", "Δ = (1 + norm_difference) / 2: 0 base only, 1 tuned only.", low=0, high=1),
        Column("relative_norm", "float64", "R = tuned / (base + tuned); Δ = 0.9 is R = 0.83.", nullable=True, low=0, high=1),
        Column("norm_class", "string", "By Δ: base_only to 0.1, shared 0.4 to 0.6, tuned_only from 0.9, other. Misses rare latents."),
        Column("decoder_cosine", "float64", "Between the two decoder directions; null if one is zero.", nullable=True,
               low=-1.0001, high=1.0001),
        Column("encoder_cosine", "float64", "Between what it reads in the two models; null if it reads one of them not at all.",
               nullable=True, low=-1.0001, high=1.0001),
        Column("difference_rms", "float64", "√mean f² · ‖d_tuned − d_base‖: what it contributes to δ.", UNIT, "effect", low=0),
        Column("max_activation", "float64", "Largest code.", low=0),
        Column("n_active", "int64", "Tokens on which it is active.", role="count", low=0),
        Column("frequency", "float64", "Share of the tokens.", low=0, high=1),
        Column("density", "float64", "Share of the sequences in which it is active anywhere.", low=0, high=1),
        Column("is_dead", "bool", "Active on no token."),
        Column("is_rare", "bool", "Active on too few tokens for Latent Scaling."),
        *_ratios("tuned"),
        *_ratios("base"),
        Column("scaling_class", "string",
               "By Latent Scaling: tuned_only, base_only, moved (each model has its own direction), shared; null if unknown.",
               nullable=True),
        Column("rank_sum", "int32", "Places by nu_error_tuned and nu_reconstruction_tuned, added: small is specific to the tuned model.",
               nullable=True, low=2),
        Column("beta_random", "float64", "Control: β of the tuned error along a random direction. About zero.", nullable=True),
        Column("beta_permuted", "float64", "Control: the same along another latent's direction.", nullable=True),
    ),
)  # fmt: skip


def _causal(prefix: str, over: str, nullable: bool) -> tuple[Column, ...]:
    """KL and share of a condition, with intervals, over some tokens."""
    doc = f"KL(tuned ‖ tuned model going on from the patched stream), mean over {over}."
    share = f"Of the KL of the base's whole stream over {over}: what adding the set takes away, or removing it brings."
    interval = "Bootstrap over documents, 95 %."
    nats = {"unit": "nats/token", "nullable": nullable, "low": 0}
    return (
        Column(f"{prefix}kl_nats", "float64", doc, role="effect", **nats),
        *(Column(f"{prefix}kl_nats_{end}", "float64", interval, role="effect", **nats) for end in ("low", "high")),
        Column(f"{prefix}kl_share", "float64", share, nullable=True),
        *(Column(f"{prefix}kl_share_{end}", "float64", interval, nullable=True) for end in ("low", "high")),
    )


CAUSAL = TableSpec(
    "crosscoder_causal",
    "KL that exchanging sets of latents leaves or makes on held-out documents: whether those found are those that matter.",
    ("layer", "latent_set", "action"),
    (
        LAYER,
        Column("latent_set", "string", "Which latents; `random as X` is a control of X's size; `error only` is what none explains.",
               role="key"),
        Column("action", "string", "add to the base's stream, or remove from the tuned one's.", role="key"),
        Column("n_latents", "int32", "Latents in the set.", role="count", low=0),
        *_causal("", "all tokens", nullable=False),
        *_causal("answer_", "the answers' tokens; null where no held-out document has any", nullable=True),
        Column("reconstruction_kl_nats", "float64", "The same KL from the crosscoder's reconstruction of the tuned stream.", "nats/token",
               low=0),
        Column("n_tokens", "int64", "Tokens.", role="count", low=0),
        Column("n_answer_tokens", "int64", "Of them the assistant's, less the chat template's.", role="count", low=0),
        Column("n_sequences", "int32", "Documents.", role="count", low=0),
    ),
)  # fmt: skip
TOKENS = lens_spec(
    "crosscoder_tokens",
    "Tokens that the listed latents promote or suppress in the tuned model more than in the base: d_tuned − d_base.",
    (LAYER, LATENT),
)
EXAMPLES = bands_spec(
    "crosscoder_examples",
    "Texts in which the listed latents are active, from all over their range.",
    (LAYER, LATENT),
    role="info",
)
STEERING = steering_spec("crosscoder_steering", (LAYER, LATENT))
TABLES = (FITS, LATENTS, TRAINING, CAUSAL, TOKENS, EXAMPLES, STEERING)
