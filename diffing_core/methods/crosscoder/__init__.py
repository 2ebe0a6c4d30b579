"""Crosscoder: a dictionary learned on both models at once, in which latents of one model alone can be told.

    f = ReLU(Σ_m x_m W_enc^m + b)        x̂_m = f D^m + b_dec^m        BatchTopK (or L1) on f_j Σ_m ‖d_j^m‖

A latent that only the tuned model has gets no decoder in the base. Because decoder norms mislead for rare latents and
under shrinkage, every latent is also measured by Latent Scaling along its decoder, in both directions, with intervals
over documents; and sets of latents are put to the test by exchanging them and measuring KL. Differences are tuned −
base: tokens are read from d_tuned − d_base. With identical models both decoders stay equal to the last bit.

What contributes most to δ (`difference_rms`) is listed first, with tokens, texts and steering.

Reference: https://arxiv.org/abs/2504.02922; partitions https://arxiv.org/abs/2602.11729.
"""

import pyarrow as pa

from diffing_core.figures import Figure
from diffing_core.fit_reading import FitReading
from diffing_core.methods.base import Inputs, Method, Need, Tables
from diffing_core.methods.crosscoder.evidence import findings
from diffing_core.methods.crosscoder.latents import SPECIFIC
from diffing_core.methods.crosscoder.layer import Layer
from diffing_core.methods.crosscoder.schema import CAUSAL, FITS, LATENTS, TABLES, TRAINING
from diffing_core.methods.crosscoder.settings import CrosscoderSettings


def run(inputs: Inputs, settings: CrosscoderSettings) -> Tables:
    """Trains and reads a crosscoder at every wanted layer."""
    stored, pair = inputs[Need.ACTIVATIONS], inputs[Need.MODELS]
    reading = FitReading(pair, stored, settings.min_probability)
    folder = inputs[Need.FOLDER]
    by_layer = [
        Layer(layer, stored, pair, reading, settings, folder).tables() for layer in reading.layers(settings.layers)
    ]
    return {spec.name: pa.concat_tables([tables[spec.name] for tables in by_layer]) for spec in TABLES}


def headline(tables: Tables) -> dict[str, float | int | str]:
    """Fit on held-out tokens, and how many latents are the tuned model's alone."""
    latents = tables[LATENTS.name]
    fits = [row for row in tables[FITS.name].to_pylist() if row["part"] == "held_out" and row["l0"] is not None]
    found: dict[str, float | int | str] = {
        "n_latents": len(latents),
        "n_tuned_only_by_scaling": sum(each in SPECIFIC for each in latents["scaling_class"].to_pylist()),
        "n_tuned_only_by_norm": latents["norm_class"].to_pylist().count("tuned_only"),
    }
    if fits:
        found |= {f"held_out_{name}": fits[-1][name] for name in ("l0", "dead_share")}
        found |= {f"held_out_{name}": fits[-1][name] for name in ("fvu_base", "fvu_tuned") if fits[-1][name] is not None}
    return found


METHOD = Method(
    name="crosscoder",
    version="6",
    kind="fit",
    needs=frozenset({Need.ACTIVATIONS, Need.MODELS, Need.FOLDER}),
    settings=CrosscoderSettings,
    tables=TABLES,
    reference="https://arxiv.org/abs/2504.02922; https://arxiv.org/abs/2602.11729",
    findings=findings,
    headline=headline,
    run=run,
    figures=(
        Figure("line", "Variance unexplained while learning", TRAINING, "step", "fvu_tuned", "layer", log=True),
        Figure("heatmap", "Share of the KL that sets of latents account for", CAUSAL, "action", "kl_share", "latent_set"),
    ),
)
