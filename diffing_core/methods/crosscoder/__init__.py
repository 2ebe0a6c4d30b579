"""Crosscoder: a dictionary learned on both models at once, in which latents of one model alone can be told.

    f = ReLU(Σ_m x_m W_enc^m + b)        x̂_m = f D^m + b_dec^m        BatchTopK (or L1) on f_j Σ_m ‖d_j^m‖

A latent that only the tuned model has gets no decoder in the base. Because decoder norms mislead for rare latents and
under shrinkage, every latent is also measured by Latent Scaling along its decoder, in both directions, with intervals
over documents; and sets of latents are put to the test by exchanging them and measuring KL. Differences are tuned −
base: tokens are read from d_tuned − d_base. With identical models both decoders stay equal to the last bit.

What contributes most to δ (`difference_rms`) is listed first, with tokens, texts and steering.

Reference: https://arxiv.org/abs/2504.02922; partitions https://arxiv.org/abs/2602.11729.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from diffing_core.activation_pairs import PairedRows, StoredPair
from diffing_core.band_examples import BANDS, examples_by_band
from diffing_core.figures import Figure
from diffing_core.findings import Finding
from diffing_core.fit_reading import FitReading
from diffing_core.lens_tables import lens_table
from diffing_core.methods.base import Inputs, Method, Need, Tables
from diffing_core.methods.crosscoder.causal import Read, causal_effects, conditions
from diffing_core.methods.crosscoder.checkpoint import WEIGHTS
from diffing_core.methods.crosscoder.declaration import (
    CAUSAL,
    EXAMPLES,
    FITS,
    LATENTS,
    STEERING,
    TABLES,
    TOKENS,
    TRAINING,
)
from diffing_core.methods.crosscoder.fitting import Fitted, fit, selection
from diffing_core.methods.crosscoder.latents import latent_table
from diffing_core.methods.crosscoder.reading import Reading
from diffing_core.methods.crosscoder.settings import CrosscoderSettings
from diffing_core.models import ModelPair
from diffing_core.steering import steering_table

SPECIFIC = ("tuned_only", "moved")
TOKEN_UNIT = "lens probability × activation units"
SNIPPET_TOKENS = 16  # each way


class _Layer:
    """A fitted layer and its tables."""

    def __init__(
        self, layer: int, stored: StoredPair, pair: ModelPair, reading: FitReading, settings: CrosscoderSettings, folder: Path
    ) -> None:
        self._layer, self._reading, self._settings, self._pair = layer, reading, settings, pair
        self._activations = stored.at(layer)
        self._file = f"layer{layer}/{WEIGHTS}"
        self._fitted: Fitted = fit(self._activations, settings, folder / f"layer{layer}", pair.tuned.device)
        self._rows = self._activations.of(selection(settings, "all"))
        self._seen = Reading.of(
            self._fitted.crosscoder,
            self._rows,
            selection(settings, "held_out"),
            self._fitted.sample.outliers,
            reading,
            self._fitted.sample.mean_MD,
        )
        self._latents = latent_table(layer, self._fitted.crosscoder, self._seen, settings)

    def tables(self) -> dict[str, pa.Table]:
        """All of them, by name."""
        listed = self._listed()
        base_FD, tuned_FD = (each_FD.cpu().numpy() for each_FD in self._fitted.crosscoder.directions())
        moved_GD = (tuned_FD - base_FD)[listed]
        keys = {"layer": [self._layer] * len(listed), "latent": listed.tolist()}
        steered = slice(0, self._settings.steered)
        context, norm = self._reading.context, self._reading.mean_norm(self._layer)
        return {
            FITS.name: self._fit_table(),
            LATENTS.name: self._latents,
            TRAINING.name: self._training_table(),
            CAUSAL.name: self._causal_table(),
            TOKENS.name: lens_table(TOKENS, self._reading.lens, context, moved_GD, keys, self._settings.top_tokens),
            EXAMPLES.name: examples_by_band(EXAMPLES, self._reading, lambda: self._codes(listed), keys, self._settings.per_band),
            STEERING.name: steering_table(
                STEERING,
                self._pair,
                moved_GD[steered],
                [(self._layer, norm)] * len(moved_GD[steered]),
                {name: values[steered] for name, values in keys.items()},
                self._settings,
            ),
        }

    def _listed(self) -> np.ndarray:
        """Latents that contribute to δ, most first."""
        size_F = self._latents["difference_rms"].to_numpy()
        order = np.argsort(-size_F, kind="stable")[: self._settings.listed]
        return order[size_F[order] > 0]

    def _codes(self, latents: np.ndarray) -> Any:
        """The rows that were read, and the code of these latents, [G, N]."""
        some = self._fitted.crosscoder.only(latents)
        for rows in self._rows.blocks() if len(latents) else ():
            rows: PairedRows = self._fitted.sample.outliers.kept(rows)
            if len(rows):
                yield rows, some.encode((rows.base_ND, rows.tuned_ND)).T.cpu().numpy()

    def _fit_table(self) -> pa.Table:
        crosscoder, plan, seen = self._fitted.crosscoder, self._fitted.plan, self._seen
        active = {"fit": seen.fit_active_F, "held_out": seen.held_out_active_F}
        rows = [
            {
                "layer": self._layer,
                "part": part,
                "n_tokens": found.n_tokens,
                "fvu_base": found.fvu("base"),
                "fvu_tuned": found.fvu("tuned"),
                "fvu_difference": found.fvu("difference"),
                "l0": found.n_active / found.n_tokens if found.n_tokens else None,
                "dead_share": float((active[part] == 0).double().mean()),
                "n_latents": crosscoder.n_latents,
                "k": float(plan.k),
                "threshold": crosscoder.threshold,
                "scale_base": crosscoder.scale_M[0],
                "scale_tuned": crosscoder.scale_M[1],
                "n_steps": plan.steps,
                "file": self._file,
            }
            for part, found in seen.fits.items()
        ]
        return FITS.table({name: [row[name] for row in rows] for name in FITS.schema.names})

    def _training_table(self) -> pa.Table:
        rows = [{"layer": self._layer, **row} for row in self._fitted.log]
        return TRAINING.table({name: [row[name] for row in rows] for name in TRAINING.schema.names})

    def _causal_table(self) -> pa.Table:
        settings, sample = self._settings, self._fitted.sample
        alive = np.flatnonzero(~self._latents["is_dead"].to_numpy(zero_copy_only=False))
        tried = conditions(self._sets(), alive, alive, settings.seed)
        tokens = Read(settings.causal_tokens, settings.first_position, sample.outliers, settings.seed)
        effects, n_tokens, n_sequences = causal_effects(self._fitted.crosscoder, self._reading, self._layer, tried, tokens)
        rows = [
            {
                "layer": self._layer,
                "set": condition.name,
                "action": condition.action,
                "n_latents": len(condition.latents),
                "kl_nats": effect.kl_nats,
                "kl_nats_low": effect.kl_interval.low,
                "kl_nats_high": effect.kl_interval.high,
                "removed_share": effect.removed,
                "removed_share_low": effect.removed_interval and effect.removed_interval.low,
                "removed_share_high": effect.removed_interval and effect.removed_interval.high,
                "reconstruction_kl_nats": effects[-1].kl_nats,
                "n_tokens": n_tokens,
                "n_sequences": n_sequences,
            }
            for condition, effect in zip(tried[:-1], effects[:-1], strict=True)
        ]
        return CAUSAL.table({name: [row[name] for row in rows] for name in CAUSAL.schema.names})

    def _sets(self) -> dict[str, np.ndarray]:
        """Latents by Latent Scaling (class, and both ends of its ranks), by decoder norm, and those that are listed; none empty."""
        columns = {name: np.asarray(self._latents[name].to_pylist(), object) for name in ("scaling_class", "norm_class", "rank_sum")}
        ranked = np.flatnonzero(columns["rank_sum"] != None)  # noqa: E711 - elementwise
        ranked = ranked[np.argsort(columns["rank_sum"][ranked].astype(np.int64), kind="stable")]
        end = round(self._settings.causal_share * len(ranked))
        sets = {
            "tuned_only by scaling": np.flatnonzero(np.isin(columns["scaling_class"], SPECIFIC)),
            "tuned_only by norm": np.flatnonzero((columns["norm_class"] == "tuned_only") & (self._seen.n_active_F.cpu().numpy() > 0)),
            "most tuned by scaling": np.sort(ranked[:end]),
            "least tuned by scaling": np.sort(ranked[len(ranked) - end :]),
            "listed": np.sort(self._listed()),
        }
        return {name: latents for name, latents in sets.items() if len(latents)}


def run(inputs: Inputs, settings: CrosscoderSettings) -> Tables:
    """Trains and reads a crosscoder at every wanted layer."""
    stored, pair = inputs[Need.ACTIVATIONS], inputs[Need.MODELS]
    reading = FitReading(pair, stored, settings.min_probability)
    folder = inputs[Need.FOLDER]
    by_layer = [
        _Layer(layer, stored, pair, reading, settings, folder).tables() for layer in reading.layers(settings.layers)
    ]
    return {spec.name: pa.concat_tables([tables[spec.name] for tables in by_layer]) for spec in TABLES}


def findings(tables: Tables, settings: CrosscoderSettings) -> list[Finding]:
    """Tokens that the listed latents promote, by probability × contribution to δ summed over latents; then their texts."""
    size = {(row["layer"], row["latent"]): row["difference_rms"] for row in _listed(tables[LATENTS.name], tables[TOKENS.name])}
    total: Counter[str] = Counter()
    best: dict[str, tuple[float, dict[str, Any]]] = {}
    for row in tables[TOKENS.name].to_pylist():
        if row["head"] == "tuned" and row["direction"] == "promoted":
            share = row["probability"] * size[row["layer"], row["latent"]]
            total[row["token"]] += share
            best[row["token"]] = max(best.get(row["token"], (-1.0, row)), (share, row), key=lambda pair: pair[0])
    tokens = [
        Finding("token", token, score, TOKEN_UNIT, TOKENS.name, {name: best[token][1][name] for name in TOKENS.grain},
                layer=best[token][1]["layer"])
        for token, score in sorted(total.items(), key=lambda pair: (-pair[1], pair[0]))[: settings.shown]
    ]  # fmt: skip
    return tokens + _texts(tables[EXAMPLES.name], size, settings.shown_texts)


def _listed(latents: pa.Table, tokens: pa.Table) -> list[dict[str, Any]]:
    named = set(zip(tokens["layer"].to_pylist(), tokens["latent"].to_pylist(), strict=True))
    return [row for row in latents.to_pylist() if (row["layer"], row["latent"]) in named]


def _texts(examples: pa.Table, size: Mapping[tuple[int, int], float], most: int) -> list[Finding]:
    """Around the strongest activation of the latents that contribute most."""
    rows = [row for row in examples.to_pylist() if row["band"] == BANDS[-1] and row["rank"] == 1]
    rows.sort(key=lambda row: -size[row["layer"], row["latent"]])
    found = []
    for row in rows[:most]:
        at = row["position"] - row["first_position"]
        text = "".join(row["tokens"][max(0, at - SNIPPET_TOKENS) : at + SNIPPET_TOKENS])
        key = {name: row[name] for name in EXAMPLES.grain}
        found.append(
            Finding("text_snippet", text, size[row["layer"], row["latent"]], "activation units", EXAMPLES.name, key,
                    layer=row["layer"], position=row["position"])
        )  # fmt: skip
    return found


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
    version="1",
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
        Figure("bar", "KL removed by sets of latents", CAUSAL, "set", "removed_share"),
    ),
)
