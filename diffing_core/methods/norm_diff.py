"""How far the residual stream moved: norm and direction of δ = h_tuned − h_base at every token.

    norm            = ‖δ‖₂                     subtracted in float32, never in the models' bf16
    relative_norm   = ‖δ‖₂ / ‖h_base‖₂
    cosine_distance = 1 − cos(h_base, h_tuned)  from ‖ĥ_tuned − ĥ_base‖²/2, exactly 0 for equal vectors

Quantiles come from a logarithmic histogram (relative error at most 0.5 %). It says how much and where,
seldom what: its findings are the layers that moved most and the tokens that moved them.
"""

from typing import Any

import numpy as np
from pydantic import Field

from diffing_core.blocks import StreamContext, TokenBlock
from diffing_core.corpus import ROLES
from diffing_core.findings import Finding
from diffing_core.lazy import functional
from diffing_core.methods.base import Method, Need, Tables
from diffing_core.settings import Settings
from diffing_core.sums import GroupedSums, LogHistogram
from diffing_core.tables import Column, TableSpec

QUANTILES = (0.5, 0.9, 0.99)
MEASURES = ("norm", "relative_norm", "cosine_distance", "base_norm")


class NormDiffSettings(Settings):
    """Knobs of `norm_diff`."""

    layers: tuple[int | float, ...] | None = Field(None, description="Blocks to read; none means all.")
    top_tokens: int = Field(50, ge=1, description="Context tokens listed per layer.")
    min_contexts: int = Field(3, ge=1, description="Times a token must occur to be listed.")
    shown: int = Field(30, ge=1, description="Findings shown.")


def _means(doc_of: str) -> tuple[Column, ...]:
    return (
        Column("mean_norm", "float64", f"Mean ‖δ‖ {doc_of}.", "activation units", "effect", low=0),
        Column("mean_relative_norm", "float64", f"Mean ‖δ‖/‖h_base‖ {doc_of}.", "", "effect", low=0),
    )


LAYERS = TableSpec(
    "norm_diff_layers",
    "Size of the activation difference per layer.",
    ("layer",),
    (
        Column("layer", "int32", "Block whose output was read, from 0.", role="key"),
        Column("n_layers", "int32", "Blocks of the model."),
        Column("n_tokens", "int64", "Tokens averaged.", role="count"),
        *_means("over tokens"),
        Column("mean_cosine_distance", "float64", "Mean 1 − cos(h_base, h_tuned).", "", "effect"),
        Column("norm_p50", "float64", "Median of ‖δ‖.", "activation units", "effect", low=0),
        Column("norm_p90", "float64", "90th percentile of ‖δ‖.", "activation units", "effect", low=0),
        Column("norm_p99", "float64", "99th percentile of ‖δ‖.", "activation units", "effect", low=0),
        Column("max_norm", "float64", "Largest ‖δ‖.", "activation units", "effect", low=0),
        Column("mean_base_norm", "float64", "Mean ‖h_base‖.", "activation units"),
    ),
)
POSITIONS = TableSpec(
    "norm_diff_positions",
    "Size of the activation difference by layer, position, speaker and template flag.",
    ("layer", "position", "speaker", "is_template"),
    (
        Column("layer", "int32", "Block whose output was read, from 0.", role="key"),
        Column("position", "int32", "Position in the sequence, from 0.", role="key"),
        Column("speaker", "string", "Role whose turn it is.", role="key"),
        Column("is_template", "bool", "Whether the tokens belong to the chat template.", role="key"),
        Column("n_tokens", "int64", "Tokens averaged.", role="count"),
        *_means("over these tokens"),
    ),
)
TOKENS = TableSpec(
    "norm_diff_tokens",
    "Tokens at which the residual stream moved most, per layer.",
    ("layer", "token_id"),
    (
        Column("layer", "int32", "Block whose output was read, from 0.", role="key"),
        Column("token_id", "int32", "Vocabulary index of the token read.", role="key"),
        Column("token", "string", "The token as text."),
        Column("n_contexts", "int64", "Times it occurs.", role="count"),
        *_means("at this token"),
    ),
)


class NormDiffFold:
    """Per layer: sums over everything, per place and per token, and a histogram."""

    def __init__(self, context: StreamContext, settings: NormDiffSettings) -> None:
        self.layers = context.pick_layers(settings.layers)
        self._context = context
        self._settings = settings
        self._whole = {layer: GroupedSums(*MEASURES) for layer in self.layers}
        self._by_place = {layer: GroupedSums("norm", "relative_norm") for layer in self.layers}
        self._by_token = {layer: GroupedSums("norm", "relative_norm") for layer in self.layers}
        self._histograms = {layer: LogHistogram() for layer in self.layers}

    def update(self, block: TokenBlock) -> None:
        """Adds N tokens at every layer."""
        place_N = (block.position_N * len(ROLES) + block.role_N) * 2 + block.template_N
        token_N = block.token_N.cpu().numpy()
        for layer in self.layers:
            measured = movement(block.base.residual(layer).float(), block.tuned.residual(layer).float())
            self._whole[layer].add(np.zeros(len(block), np.int64), measured)
            self._by_place[layer].add(place_N, measured)
            self._by_token[layer].add(token_N, measured)
            self._histograms[layer].add(measured["norm"])

    def finish(self) -> Tables:
        """The three tables."""
        layers = [self._layer_row(layer) for layer in self.layers]
        return {
            LAYERS.name: LAYERS.table({name: [row[name] for row in layers] for name in LAYERS.schema.names}),
            POSITIONS.name: POSITIONS.table(_stacked([self._place_columns(layer) for layer in self.layers])),
            TOKENS.name: TOKENS.table(_stacked([self._token_columns(layer) for layer in self.layers])),
        }

    def _layer_row(self, layer: int) -> dict[str, Any]:
        whole = self._whole[layer]
        quantiles = {f"norm_p{share * 100:.0f}": self._histograms[layer].quantile(share) for share in QUANTILES}
        return quantiles | {
            "layer": layer,
            "n_layers": self._context.n_layers,
            "n_tokens": int(whole.count()[0]),
            "max_norm": float(whole.maximum("norm")[0]),
            **{f"mean_{name}": float(whole.mean(name)[0]) for name in MEASURES},
        }

    def _place_columns(self, layer: int) -> dict[str, Any]:
        sums = self._by_place[layer]
        places = sums.groups
        return _mean_columns(sums, np.ones(len(places), bool), layer) | {
            "position": places // (2 * len(ROLES)),
            "speaker": np.take(ROLES, places // 2 % len(ROLES)),
            "is_template": places % 2 == 1,
            "n_tokens": sums.count(),
        }

    def _token_columns(self, layer: int) -> dict[str, Any]:
        sums = self._by_token[layer]
        often = sums.count() >= self._settings.min_contexts
        order = np.argsort(-sums.mean("relative_norm"), kind="stable")
        listed = order[often[order]][: self._settings.top_tokens]
        ids = sums.groups[listed]
        return _mean_columns(sums, listed, layer) | {
            "token_id": ids,
            "token": np.asarray(self._context.token_texts(ids), dtype=object),
            "n_contexts": sums.count()[listed],
        }


def movement(base_ND: Any, tuned_ND: Any) -> dict[str, np.ndarray]:
    """The four measures per token, float32 [N], from residuals in float32."""
    norm_N = (tuned_ND - base_ND).norm(dim=-1)
    base_norm_N = base_ND.norm(dim=-1)
    turned_ND = functional.normalize(tuned_ND, dim=-1) - functional.normalize(base_ND, dim=-1)
    measured = {
        "norm": norm_N,
        "relative_norm": norm_N / base_norm_N.clamp(min=1e-12),
        "cosine_distance": turned_ND.square().sum(-1) / 2,
        "base_norm": base_norm_N,
    }
    return {name: values.cpu().numpy() for name, values in measured.items()}


def findings(tables: Tables, settings: NormDiffSettings) -> list[Finding]:
    """Tokens at which the last layer moved most, then the layers, if anything moved at all."""
    layers = tables[LAYERS.name].to_pylist()
    if not any(row["mean_norm"] > 0 for row in layers):
        return []
    last = max(row["layer"] for row in layers)
    tokens = [row for row in tables[TOKENS.name].to_pylist() if row["layer"] == last and row["mean_relative_norm"] > 0]
    shown = [
        Finding(
            "token", row["token"], row["mean_relative_norm"], "relative norm", TOKENS.name,
            {"layer": last, "token_id": row["token_id"]}, layer=last,
        )
        for row in tokens[: settings.shown]
    ]  # fmt: skip
    return shown + [
        Finding(
            "layer", f"layer {row['layer']}", row["mean_relative_norm"], "relative norm", LAYERS.name,
            {"layer": row["layer"]}, layer=row["layer"],
        )
        for row in sorted(layers, key=lambda row: -row["mean_relative_norm"])
    ]  # fmt: skip


def headline(tables: Tables) -> dict[str, float | int | str]:
    """The layer that moved most."""
    top = max(tables[LAYERS.name].to_pylist(), key=lambda row: row["mean_relative_norm"])
    return {"max_mean_relative_norm": top["mean_relative_norm"], "at_layer": top["layer"]}


def _mean_columns(sums: GroupedSums, chosen: np.ndarray, layer: int) -> dict[str, Any]:
    means = {f"mean_{name}": sums.mean(name)[chosen] for name in ("norm", "relative_norm")}
    return means | {"layer": np.full(len(means["mean_norm"]), layer)}


def _stacked(parts: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


METHOD = Method(
    name="norm_diff",
    version="1",
    kind="stream",
    needs=frozenset({Need.RESIDUALS}),
    settings=NormDiffSettings,
    tables=(LAYERS, POSITIONS, TOKENS),
    reference="activation analysis: norm and cosine of paired residuals",
    findings=findings,
    headline=headline,
    start=NormDiffFold,
)
