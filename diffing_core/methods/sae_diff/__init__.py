"""Directions in which a finetune moves activations, token by token: a BatchTopK sparse autoencoder of δ = tuned − base.

    f = ReLU(W (δ − c) + b), kept where f > θ        δ̂ = f D + c        ‖d_j‖ = 1

Trained by dictionary-learning's BatchTopKTrainer on the stored activations, of which a tenth of the sequences is held
out. θ is set after training so that k latents fire per token. Latents are ranked by their share of the energy Σ‖δ − c‖².
Findings are the tokens that the first of them promote through the tuned model's head, by Σ energy share × p⁺, and texts
in which they fire most; this score, the layer and the number of latents were chosen on the demo's organisms.
β, the least-squares multiple of f d in either model's activations, says whether the base has the direction too.

With `targets` the same is done with the base's or the tuned model's activations. The result's folder keeps weights
(safetensors under the names of dictionary-learning's BatchTopKSAE, which loads them), the configuration with the
statistics of the input, and a checkpoint of what was interrupted.

Reference: Bussmann et al. 2024 (arXiv 2412.06410); on differences and Latent Scaling Minder, Dumas et al. 2025
(arXiv 2504.02922).
"""

from dataclasses import replace

from diffing_core.band_examples import BANDS
from diffing_core.errors import NotComputableError
from diffing_core.examples import around_peak
from diffing_core.figures import Figure
from diffing_core.findings import Finding
from diffing_core.fit_reading import FitReading
from diffing_core.methods.base import Inputs, Method, Need, Tables
from diffing_core.methods.sae_diff.declaration import (
    EXAMPLES,
    FIT,
    LATENTS,
    LENS,
    STEERED,
    TABLES,
    TOKENS,
    TRAINING,
    UNIT,
    SaeDiffSettings,
)
from diffing_core.methods.sae_diff.fitted import Fitted, fit_row
from diffing_core.methods.sae_diff.reading import (
    example_table,
    latent_table,
    lens_of,
    steered_table,
    token_table,
    training_table,
)
from diffing_core.methods.sae_diff.training import Material

SNIPPETS, SNIPPET_TOKENS = 5, 8


def run(inputs: Inputs, settings: SaeDiffSettings) -> Tables:
    """Trains every autoencoder that the settings name, and reads them.

    Raises:
        NotComputableError: a wanted layer is not stored, or no token is left to train on.
    """
    pair, stored, folder = inputs[Need.MODELS], inputs[Need.ACTIVATIONS], inputs[Need.FOLDER]
    reading = FitReading(pair, stored)
    every: list[Fitted] = []
    fits = []
    for layer in reading.layers(settings.layers):
        rows = settings.rows(stored.at(layer), settings.held_out_share)
        parts = {part: rows.of(replace(rows.selection, part=part)).moments() for part in ("fit", "held_out")}
        moments, n_outliers = parts["fit"], rows.count() - sum(each["difference"].count for each in parts.values())
        if not moments["difference"].count:
            raise NotComputableError(f"no token of {stored.name} is left to train on: read more positions, roles or texts")
        for target in settings.targets:
            material = Material(rows, layer, target)
            fitted = Fitted.of(material, moments, settings, folder, pair.tuned.device)
            fits.append(fit_row(material, moments, fitted) | {"n_outliers": n_outliers})
            every += [] if fitted is None else [fitted]
    lens = lens_of(every, reading, settings)
    return {
        FIT.name: FIT.table({name: [row[name] for row in fits] for name in FIT.schema.names}),
        TRAINING.name: training_table(every),
        LATENTS.name: latent_table(every),
        TOKENS.name: token_table(every, lens),
        LENS.name: lens,
        EXAMPLES.name: example_table(every, reading, settings),
        STEERED.name: steered_table(every, pair, settings),
    }


def findings(tables: Tables, settings: SaeDiffSettings) -> list[Finding]:
    """Tokens by score, then the texts in which the difference's first latents fire most."""
    return [*_promoted(tables, settings), *_texts(tables)]


def _promoted(tables: Tables, settings: SaeDiffSettings) -> list[Finding]:
    return [
        Finding("token", row["token"], row["score"], "energy share × probability", TOKENS.name,
                {"layer": row["layer"], "token_id": row["token_id"]}, layer=row["layer"])
        for row in tables[TOKENS.name].slice(0, settings.shown).to_pylist()
    ]  # fmt: skip


def _texts(tables: Tables) -> list[Finding]:
    rows = tables[EXAMPLES.name].to_pylist()
    strongest = [row for row in rows if row["target"] == "difference" and row["rank"] == 1 and row["band"] == BANDS[-1]]
    keys = ("layer", "target", "latent", "band", "rank")
    return [
        Finding("text_snippet", around_peak(row, SNIPPET_TOKENS, SNIPPET_TOKENS // 2), row["score"], UNIT, EXAMPLES.name,
                {name: row[name] for name in keys}, layer=row["layer"], position=row["position"])
        for row in strongest[:SNIPPETS]
    ]  # fmt: skip


def headline(tables: Tables) -> dict[str, float | int | str]:
    """The fit of the first autoencoder, and what leads."""
    fit = tables[FIT.name].to_pylist()[0]
    shown: dict[str, float | int | str] = {"difference_energy": fit["difference_energy"], "n_latents": fit["n_latents"]}
    shown |= {name: fit[name] for name in ("fvu", "l0", "dead_share") if fit[name] is not None}
    first = tables[TOKENS.name]["token"].to_pylist()[:1]
    return shown | ({"first_token": first[0]} if first else {})


METHOD = Method(
    name="sae_diff",
    version="4",
    kind="fit",
    needs=frozenset({Need.MODELS, Need.ACTIVATIONS, Need.FOLDER}),
    settings=SaeDiffSettings,
    tables=TABLES,
    reference="Bussmann et al. 2024; Minder, Dumas et al. 2025",
    findings=findings,
    headline=headline,
    run=run,
    figures=(
        Figure("bar", "Tokens promoted by the latents of the difference", TOKENS, "token", "score", most=20),
        Figure("line", "Held-out FVU by step", TRAINING, "step", "fvu", "target"),
        Figure("bar", "Energy share of the latents", LATENTS, "rank", "energy_share", most=40),
    ),
)
