"""What the tables say of trained autoencoders: lists, tokens, texts and steered samples of their leading latents.

Suffixes: N rows, D model width, F latents, X chosen latents.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from diffing_core.activation_pairs import PairedRows
from diffing_core.band_examples import examples_by_band
from diffing_core.fit_reading import FitReading
from diffing_core.lens_tables import lens_table
from diffing_core.methods.sae_diff.declaration import EXAMPLES, LATENTS, LENS, STEERED, TOKENS, TRAINING, SaeDiffSettings
from diffing_core.methods.sae_diff.fitted import Fitted
from diffing_core.models import ModelPair
from diffing_core.steering import steering_table


def training_table(every: Sequence[Fitted]) -> pa.Table:
    """The logs."""
    rows = [{"layer": each.material.layer, "target": each.material.target} | row for each in every for row in each.log]
    return TRAINING.table({name: [row[name] for row in rows] for name in TRAINING.schema.names})


def latent_table(every: Sequence[Fitted]) -> pa.Table:
    """All latents, dead ones too."""
    parts: list[dict[str, Any]] = []
    for each in every:
        latents = each.latents
        n_latents = len(latents.n_fires_F)
        rank_F = np.empty(n_latents, np.int32)
        rank_F[np.argsort(-latents.energy_share_F, kind="stable")] = np.arange(1, n_latents + 1)
        ratio = latents.ratio
        parts.append(
            each.keys(np.arange(n_latents))
            | {
                "rank": rank_F.tolist(),
                "n_fires": latents.n_fires_F.tolist(),
                "frequency": latents.frequency_F.tolist(),
                "mean_activation": _or_null(latents.mean_F),
                "max_activation": latents.max_F.tolist(),
                "energy_share": latents.energy_share_F.tolist(),
                "beta_base": _or_null(latents.beta_base_F),
                "beta_tuned": _or_null(latents.beta_tuned_F),
                "beta_ratio": _or_null(ratio.value_F),
                "beta_ratio_low": _or_null(ratio.low_F),
                "beta_ratio_high": _or_null(ratio.high_F),
            }
        )
    return LATENTS.table({name: [value for part in parts for value in part[name]] for name in LATENTS.schema.names})


def lens_of(every: Sequence[Fitted], reading: FitReading, settings: SaeDiffSettings) -> pa.Table:
    """Tokens of the leading latents."""
    chosen = [(each, each.leading(settings.listed)) for each in every]
    if not chosen:
        return LENS.empty()
    direction_XD = np.concatenate([each.directions(latent_X) for each, latent_X in chosen])
    return lens_table(LENS, reading.lens, reading.context, direction_XD, _together(chosen), settings.top_tokens)


def token_table(every: Sequence[Fitted], lens: pa.Table) -> pa.Table:
    """What the latents of the difference promote, read with the tuned model's head."""
    energy_share = {
        (each.material.layer, latent): float(each.latents.energy_share_F[latent])
        for each in every
        if each.material.target == "difference"
        for latent in each.order_F.tolist()
    }
    found: dict[tuple[int, int], list[tuple[float, int]]] = {}
    text: dict[int, str] = {}
    for row in lens.to_pylist():
        if (row["target"], row["head"], row["direction"]) == ("difference", "tuned", "promoted"):
            text[row["token_id"]] = row["token"]
            share = energy_share[row["layer"], row["latent"]] * row["probability"]
            found.setdefault((row["layer"], row["token_id"]), []).append((share, row["latent"]))
    rows = [
        {
            "layer": layer,
            "token_id": token,
            "token": text[token],
            "score": sum(share for share, _ in shares),
            "n_latents": len(shares),
            "strongest_latent": max(shares)[1],
        }
        for (layer, token), shares in found.items()
    ]
    rows.sort(key=lambda row: (-row["score"], row["layer"], row["token_id"]))
    return TOKENS.table({name: [row[name] for row in rows] for name in TOKENS.schema.names})


def example_table(every: Sequence[Fitted], reading: FitReading, settings: SaeDiffSettings) -> pa.Table:
    """Texts of the leading latents."""
    parts = []
    for each in every:
        latent_X = each.leading(settings.examples_of)
        if len(latent_X):
            read = _activations(each, latent_X)
            parts.append(examples_by_band(EXAMPLES, reading, read, each.keys(latent_X), settings.per_band))
    return pa.concat_tables(parts).combine_chunks() if parts else EXAMPLES.empty()


def steered_table(every: Sequence[Fitted], pair: ModelPair, settings: SaeDiffSettings) -> pa.Table:
    """Samples written with the leading latents' directions added."""
    chosen = [(each, each.leading(settings.steered)) for each in every]
    direction_XD = np.concatenate([each.directions(latent_X) for each, latent_X in chosen]) if chosen else np.zeros((0, 1))
    if not len(direction_XD):
        return STEERED.empty()
    norm = {each.material.layer: each.material.rows.base_norm() for each in every}
    at_X = [(each.material.layer, norm[each.material.layer]) for each, latent_X in chosen for _ in latent_X]
    return steering_table(STEERED, pair, direction_XD, at_X, _together(chosen), settings)


def _activations(each: Fitted, latent_X: np.ndarray) -> Any:
    """Reads all rows with the chosen latents' activations, float32 [X, N]."""

    def read() -> Iterator[tuple[PairedRows, np.ndarray]]:
        chosen = each.dictionary.only(latent_X)
        for rows in each.material.rows.watched(f"sae_diff, {each.material.name}: examples"):
            yield rows, chosen.encode(each.material.vectors(rows).to(chosen.bias_F.device)).T.cpu().numpy()

    return read


def _together(chosen: Sequence[tuple[Fitted, np.ndarray]]) -> Mapping[str, list[Any]]:
    parts = [each.keys(latent_X) for each, latent_X in chosen]
    return {name: [value for part in parts for value in part[name]] for name in ("layer", "target", "latent")}


def _or_null(values_F: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values_F]
