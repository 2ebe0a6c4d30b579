"""Settings and tables of `sae_diff`."""

from typing import Literal

from pydantic import Field

from diffing_core.band_examples import bands_spec
from diffing_core.lens_tables import lens_spec
from diffing_core.row_settings import RowSettings
from diffing_core.steering import SteeringSettings, steering_spec
from diffing_core.tables import Column, TableSpec

Target = Literal["difference", "base", "tuned"]
UNIT = "activation units"


class SaeDiffSettings(SteeringSettings, RowSettings):
    """Knobs of `sae_diff`."""

    layers: tuple[int | float, ...] | None = Field(
        (1.0,), description="Stored blocks to read; a fraction r means floor(r · (L − 1)); none means all that are stored."
    )
    targets: tuple[Target, ...] = Field(
        ("difference",), min_length=1, description="What is trained on, an autoencoder each: difference, base, tuned."
    )
    expansion: float = Field(2.0, gt=0, description="Latents per dimension of the residual stream; fewer where tokens are.")
    k: int | None = Field(
        None, ge=1, description="Latents that fire per token, on average; none means a sixteenth of the width, 4 to 100."
    )
    batch_rows: int = Field(2048, ge=16, description="Tokens per step; down to a sixteenth of it on small corpora.")
    epochs: float = Field(4.0, gt=0, description="Times each token is trained on.")
    max_tokens: int = Field(100_000_000, ge=1, description="Tokens trained on, at most, but at least 20 batches.")
    learning_rate: float | None = Field(
        None, gt=0, description="Of Adam; none means dictionary-learning's 2e-4 / sqrt(latents / 2^14)."
    )
    held_out_share: float = Field(0.1, gt=0, lt=1, description="Share of the sequences on which the fit is measured.")
    seed: int = Field(0, ge=0, description="Of the first weights and of the order of tokens.")
    listed: int = Field(50, ge=1, description="Latents read through the lens, those that carry most of what is rebuilt.")
    top_tokens: int = Field(10, ge=1, description="Tokens listed per latent, head and sign.")
    examples_of: int = Field(10, ge=0, description="Latents whose texts are shown.")
    per_band: int = Field(2, ge=1, description="Texts per latent and band of its activation.")
    shown: int = Field(40, ge=1, description="Tokens shown as findings.")


LAYER = Column("layer", "int32", "Block whose output was read, from 0.", role="key")
TARGET = Column("target", "string", "What is rebuilt: difference (tuned − base), base or tuned.", role="key")
LATENT = Column("latent", "int32", "Number of the latent, from 0.", role="key", low=0)

FIT = TableSpec(
    "sae_diff_fit",
    "How each autoencoder was trained and how well it rebuilds tokens of sequences that were held out.",
    ("layer", "target"),
    (
        LAYER,
        TARGET,
        Column("n_fit_tokens", "int64", "Tokens to train on.", role="count"),
        Column("n_held_out_tokens", "int64", "Tokens held out.", role="count"),
        Column("n_outliers", "int64", "Rows left out for their norms.", role="count", low=0),
        Column("difference_energy", "float64", "Mean ‖tuned − base‖² of the tokens to train on.", f"({UNIT})²", "effect", low=0),
        Column("variance", "float64", "Total variance of what is rebuilt; nothing is trained where all rows are equal.",
               f"({UNIT})²", low=0),
        Column("n_latents", "int32", "Latents; 0 if nothing was trained.", role="count"),
        Column("k", "int32", "Latents that should fire per token.", role="count"),
        Column("steps", "int32", "Steps of training.", role="count"),
        Column("n_trained_tokens", "int64", "Steps times tokens per step.", role="count"),
        Column("fvu", "float64", "Squared error on held-out tokens over their variance; null without them.", "", nullable=True,
               low=0),
        Column("l0", "float64", "Latents that fire per held-out token.", "", nullable=True, low=0),
        Column("dead_share", "float64", "Share of latents that fire on no held-out token.", "", nullable=True, low=0, high=1),
        Column("threshold", "float64", "Activations above it count.", UNIT, nullable=True, low=0),
    ),
)  # fmt: skip
TRAINING = TableSpec(
    "sae_diff_training",
    "The course of each training, measured on a sample of held-out tokens.",
    ("layer", "target", "step"),
    (
        LAYER,
        TARGET,
        Column("step", "int32", "Steps done.", role="key", low=1),
        Column("loss", "float64", "Loss of that step's batch, of rows with total variance 1: squared error + aux / 32."),
        Column("fvu", "float64", "Squared error over variance; null without held-out tokens.", "", nullable=True, low=0),
        Column("l0", "float64", "Latents that fire per token.", "", nullable=True, low=0),
        Column("dead_share", "float64", "Share of latents that do not fire on the sample.", "", nullable=True, low=0, high=1),
        Column("n_dead", "int32", "Latents that the auxiliary loss trained, silent for a tenth of the run.", role="count"),
        Column("threshold", "float64", "The trainer's running threshold; null before it is set.", UNIT, nullable=True),
    ),
)
LATENTS = TableSpec(
    "sae_diff_latents",
    "What each latent does over all tokens, and how much of its direction either model has where it fires.",
    ("layer", "target", "latent"),
    (
        LAYER,
        TARGET,
        LATENT,
        Column("rank", "int32", "1 has the largest energy share.", low=1),
        Column("n_fires", "int64", "Tokens on which it fires.", role="count"),
        Column("frequency", "float64", "Share of tokens on which it fires.", low=0, high=1),
        Column("mean_activation", "float64", "Mean activation where it fires; null where it never does.", UNIT, nullable=True,
               low=0),
        Column("max_activation", "float64", "Largest activation.", UNIT, low=0),
        Column("energy_share", "float64", "Sum of squared activations over that of ‖x − c‖²; overlapping latents share.", low=0),
        Column("beta_base", "float64", "Least-squares multiple of f d in the base's activations.", nullable=True),
        Column("beta_tuned", "float64", "The same in the tuned model's.", nullable=True),
        Column("beta_ratio", "float64", "beta_base / beta_tuned: about 1 if both models have the direction, 0 if only the tuned "
               "one; null where the latent fires on few tokens or beta_tuned is near 0.", nullable=True),
        Column("beta_ratio_low", "float64", "Lower end of its 95 % interval (jackknife over texts).", nullable=True),
        Column("beta_ratio_high", "float64", "Upper end.", nullable=True),
    ),
)  # fmt: skip
TOKENS = TableSpec(
    "sae_diff_tokens",
    "Tokens that the listed latents of the difference promote, over all of them.",
    ("layer", "token_id"),
    (
        LAYER,
        Column("token_id", "int32", "Vocabulary index.", role="key"),
        Column("token", "string", "The token as text."),
        Column("score", "float64", "Sum over latents of energy share × p⁺ of the token in the latent's list.", "", "effect", low=0),
        Column("n_latents", "int32", "Latents whose list it is in.", role="count"),
        Column("strongest_latent", "int32", "The one that adds most to the score."),
    ),
)  # fmt: skip
LENS = lens_spec(
    "sae_diff_lens", "Tokens that the decoder direction of a latent promotes or suppresses.", (LAYER, TARGET, LATENT)
)
EXAMPLES = bands_spec(
    "sae_diff_examples",
    "Texts in which a latent fires, from all over the range of its activation.",
    (LAYER, TARGET, LATENT),
    unit=UNIT,
    role="info",
)
STEERED = steering_spec("sae_diff_steering", (LAYER, TARGET, LATENT))
TABLES = (FIT, TRAINING, LATENTS, TOKENS, LENS, EXAMPLES, STEERED)
