"""One layer: its crosscoder is fitted, read over all tokens, put to the causal test, and written down in tables."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from diffing_core.activation_pairs import StoredPair
from diffing_core.band_examples import examples_by_band
from diffing_core.fit_reading import FitReading
from diffing_core.lens_tables import lens_table
from diffing_core.methods.crosscoder.causal import Effect, Read, causal_effects, conditions
from diffing_core.methods.crosscoder.checkpoint import WEIGHTS
from diffing_core.methods.crosscoder.fitting import Fitted, fit
from diffing_core.methods.crosscoder.latents import SPECIFIC, latent_table
from diffing_core.methods.crosscoder.reading import PARTS, STREAMS, Reading
from diffing_core.methods.crosscoder.schema import CAUSAL, EXAMPLES, FITS, LATENTS, STEERING, TOKENS, TRAINING
from diffing_core.methods.crosscoder.settings import CrosscoderSettings
from diffing_core.models import ModelPair
from diffing_core.steering import steering_table
from diffing_core.sums import float64_device

logger = logging.getLogger(__name__)


class Layer:
    """A crosscoder fitted on one layer and read once; `tables` says all that was found."""

    def __init__(
        self, layer: int, stored: StoredPair, pair: ModelPair, reading: FitReading, settings: CrosscoderSettings, folder: Path
    ) -> None:
        self._layer, self._reading, self._settings, self._pair = layer, reading, settings, pair
        self._rows = settings.rows(stored.at(layer), settings.held_out_share)
        self._file = f"layer{layer}/{WEIGHTS}"
        self._fitted: Fitted = fit(self._rows, settings, folder / f"layer{layer}", pair.tuned.device)
        self._crosscoder = self._fitted.crosscoder.to(float64_device(pair.tuned.device))
        self._seen = Reading.of(
            self._crosscoder,
            self._rows,
            settings.selection("held_out", settings.held_out_share),
            reading,
            self._fitted.sample.mean_MD,
            f"crosscoder, layer {layer}: reading",
        )
        self._latents = latent_table(layer, self._crosscoder, self._seen, settings)

    def tables(self) -> dict[str, pa.Table]:
        """All of them, by name."""
        listed = self._listed()
        base_FD, tuned_FD = (each_FD.cpu().numpy() for each_FD in self._crosscoder.directions())
        moved_GD = (tuned_FD - base_FD)[listed]
        keys = {"layer": [self._layer] * len(listed), "latent": listed.tolist()}
        steered = slice(0, self._settings.steered)
        context, norm = self._reading.context, self._rows.base_norm()
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
        some = self._crosscoder.only(latents)
        for rows in self._rows.watched(f"crosscoder, layer {self._layer}: examples") if len(latents) else ():
            yield rows, some.encode((rows.base_ND, rows.tuned_ND)).T.cpu().numpy()

    def _fit_table(self) -> pa.Table:
        crosscoder, plan, seen = self._crosscoder, self._fitted.plan, self._seen
        found, n_outliers = seen.explained, self._rows.count() - seen.n_tokens
        active = {"fit": seen.fit_active_F, "held_out": seen.held_out_active_F}
        rows = [
            {
                "layer": self._layer,
                "part": part,
                "n_tokens": int(found.n_tokens_P[number]),
                **{f"fvu_{stream}": found.fvu(stream, number) for stream in STREAMS},
                "l0": float(found.n_active_P[number] / found.n_tokens_P[number]) if found.n_tokens_P[number] else None,
                "dead_share": float((active[part] == 0).double().mean()),
                "n_outliers": n_outliers,
                "n_latents": crosscoder.n_latents,
                "k": float(plan.k),
                "threshold": crosscoder.threshold,
                "scale_base": crosscoder.scale_M[0],
                "scale_tuned": crosscoder.scale_M[1],
                "n_steps": plan.steps,
                "file": self._file,
            }
            for number, part in enumerate(PARTS)
        ]
        return FITS.table({name: [row[name] for row in rows] for name in FITS.schema.names})

    def _training_table(self) -> pa.Table:
        rows = [{"layer": self._layer, **row} for row in self._fitted.log]
        return TRAINING.table({name: [row[name] for row in rows] for name in TRAINING.schema.names})

    def _causal_table(self) -> pa.Table:
        settings = self._settings
        alive = np.flatnonzero(~self._latents["is_dead"].to_numpy(zero_copy_only=False))
        tried = conditions(self._sets(), alive, alive, settings.seed)
        corpus = self._reading.context.corpus
        seen_S = np.asarray([len(sequence) for sequence in corpus.sequences]) > corpus.first_seen_S
        held_out_S = seen_S & self._reading.held_out_S(settings.held_out_share)
        if not held_out_S.any():
            logger.warning("no text with a token to see is held out at held_out_share=%s: no causal test", settings.held_out_share)
            return CAUSAL.empty()
        tokens = Read(
            settings.causal_tokens, settings.first_position, self._rows.selection.outliers, settings.seed, settings.roles,
            settings.template, held_out_S,
        )  # fmt: skip
        whole, answers = causal_effects(self._crosscoder, self._reading, self._layer, tried, tokens)
        of_answers = answers.effects or [None] * len(tried)
        rows = [
            {
                "layer": self._layer,
                "latent_set": condition.name,
                "action": condition.action,
                "n_latents": len(condition.latents),
                **_effect_columns("", effect),
                **_effect_columns("answer_", of_answer),
                "reconstruction_kl_nats": whole.effects[-1].kl_nats,
                "n_tokens": whole.n_tokens,
                "n_answer_tokens": answers.n_tokens,
                "n_sequences": whole.n_sequences,
            }
            for condition, effect, of_answer in zip(tried[:-1], whole.effects[:-1], of_answers[:-1], strict=True)
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


def _effect_columns(prefix: str, effect: Effect | None) -> dict[str, float | None]:
    share = effect and effect.share_interval
    return {
        f"{prefix}kl_nats": effect and effect.kl_nats,
        f"{prefix}kl_nats_low": effect and effect.kl_interval.low,
        f"{prefix}kl_nats_high": effect and effect.kl_interval.high,
        f"{prefix}kl_share": effect and effect.share,
        f"{prefix}kl_share_low": share and share.low,
        f"{prefix}kl_share_high": share and share.high,
    }
