"""How far the residual stream moved: norm and direction of δ = h_tuned − h_base at every token.

    norm            = ‖δ‖₂                     subtracted in float32, never in the models' bf16
    relative_norm   = ‖δ‖₂ / ‖h_base‖₂
    cosine_distance = 1 − cos(h_base, h_tuned)  = (‖δ‖² − (‖h_tuned‖ − ‖h_base‖)²) / (2 ‖h_base‖ ‖h_tuned‖), where δ is
                                                small; 0 where one of them is zero

Their distributions per layer (with those of ‖h_base‖ and ‖h_tuned‖), means by place, the tokens and the
sequences that moved most, and mean vectors δ̄ over all tokens, at the first positions and at each token of
the chat template. It says how much and where, seldom what: its findings are the layers that moved most
and the tokens that moved them.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from diffing_core.blocks import StreamContext, TokenBlock
from diffing_core.corpus import ROLES, ProbeCorpus
from diffing_core.distributions import Distributions
from diffing_core.elementwise import dot
from diffing_core.examples import TopExamples, examples_spec
from diffing_core.figures import Figure
from diffing_core.findings import Finding
from diffing_core.lazy import torch
from diffing_core.methods.base import Method, Need, Tables
from diffing_core.settings import Settings
from diffing_core.sums import Grouping, SparseSums, VectorSums
from diffing_core.tables import Column, TableSpec

MOVEMENTS = ("norm", "relative_norm", "cosine_distance")
STATISTICS = (*MOVEMENTS, "base_norm", "tuned_norm")
QUANTILES = (0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
TINY = 1e-12


class NormDiffSettings(Settings):
    """Knobs of `norm_diff`."""

    layers: tuple[int | float, ...] | None = Field(None, description="Blocks to read; none means all.")
    top_tokens: int = Field(50, ge=1, description="Context tokens listed per layer.")
    min_contexts: int = Field(3, ge=1, description="Times a token must occur to be listed.")
    examples: int = Field(10, ge=1, description="Sequences listed per layer, statistic and ranking.")
    positions: int = Field(5, ge=0, description="Leading positions with a mean vector of their own.")
    template_tokens: int = Field(32, ge=0, description="Commonest template tokens with a mean vector of their own.")
    exact_values: int = Field(
        2**27, ge=0, description="Values kept for exact quantiles, 4 bytes each, all layers and statistics together."
    )
    shown: int = Field(30, ge=1, description="Findings shown.")


LAYER = Column("layer", "int32", "Block whose output was read, from 0.", role="key")
STATISTIC = Column("statistic", "string", "norm, relative_norm, cosine_distance, base_norm or tuned_norm.", role="key")


def _means(doc_of: str) -> tuple[Column, ...]:
    return (
        Column("mean_norm", "float64", f"Mean ‖δ‖ {doc_of}.", "activation units", "effect", low=0),
        Column("mean_relative_norm", "float64", f"Mean ‖δ‖/‖h_base‖ {doc_of}.", "", "effect", low=0),
        Column("mean_cosine_distance", "float64", f"Mean 1 − cos(h_base, h_tuned) {doc_of}.", "", "effect", low=0),
    )


LAYERS = TableSpec(
    "norm_diff_layers",
    "Size of the activation difference per layer.",
    ("layer",),
    (
        LAYER,
        Column("n_layers", "int32", "Blocks of the model."),
        Column("n_tokens", "int64", "Tokens averaged.", role="count"),
        *_means("over tokens"),
        Column("max_norm", "float64", "Largest ‖δ‖.", "activation units", "effect", low=0),
        Column("mean_base_norm", "float64", "Mean ‖h_base‖.", "activation units"),
        Column("mean_tuned_norm", "float64", "Mean ‖h_tuned‖.", "activation units"),
    ),
)
DISTRIBUTIONS = TableSpec(
    "norm_diff_distributions",
    "Distribution over tokens of each statistic, per layer; norms in activation units.",
    ("layer", "statistic"),
    (
        LAYER,
        STATISTIC,
        Column("n_tokens", "int64", "Tokens.", role="count"),
        Column("mean", "float64", "Mean."),
        Column("std", "float64", "Population standard deviation."),
        Column("min", "float64", "Smallest value."),
        *(Column(f"p{share * 100:.0f}", "float64", f"{share * 100:.0f}th percentile.") for share in QUANTILES),
        Column("max", "float64", "Largest value."),
        Column("exact", "bool", "Whether the percentiles are exact; else their relative error is at most 0.5 %."),
    ),
)
HISTOGRAMS = TableSpec(
    "norm_diff_histograms",
    "Histogram over tokens of each statistic, per layer, in logarithmic bins; empty bins are left out.",
    ("layer", "statistic", "bin"),
    (
        LAYER,
        STATISTIC,
        Column("bin", "int32", "Number of the bin, equal in all runs; bin 0 holds exact zeros.", role="key"),
        Column("low", "float64", "Lower edge, inclusive."),
        Column("high", "float64", "Upper edge."),
        Column("n_tokens", "int64", "Tokens in the bin.", role="count"),
    ),
)
POSITIONS = TableSpec(
    "norm_diff_positions",
    "Size of the activation difference by layer, position, speaker and template flag.",
    ("layer", "position", "speaker", "is_template"),
    (
        LAYER,
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
        LAYER,
        Column("token_id", "int32", "Vocabulary index of the token read.", role="key"),
        Column("token", "string", "The token as text."),
        Column("n_contexts", "int64", "Times it occurs.", role="count"),
        *_means("at this token"),
    ),
)
EXAMPLES = examples_spec(
    "norm_diff_examples",
    "Probe sequences in which the residual stream moved most, or is largest, token by token.",
    (LAYER, STATISTIC),
    role="info",
)
VECTORS = TableSpec(
    "norm_diff_vectors",
    "Mean activation differences: over all tokens, at the first positions, at each token of the chat template.",
    ("layer", "mean_over", "value"),
    (
        LAYER,
        Column("mean_over", "string", "all, position or template_token.", role="key"),
        Column("value", "int32", "The position in the sequence from 0, or the token id; null for all.", role="key",
               nullable=True),
        Column("token", "string", "The template token as text.", nullable=True),
        Column("n_tokens", "int64", "Tokens averaged.", role="count"),
        Column("norm", "float64", "‖δ̄‖.", "activation units", "effect", low=0),
        Column("relative_norm", "float64", "‖δ̄‖ / mean ‖h_base‖ of these tokens.", "", "effect", low=0),
        Column("mean_base_norm", "float64", "Mean ‖h_base‖ of these tokens.", "activation units"),
        Column("vector", "list<float32>", "δ̄ itself.", "activation units", "effect", signed=True),
    ),
    heavy=True,
)  # fmt: skip


class NormDiffFold:
    """Distributions and means of the statistics, top examples, and sums of δ; all layers at once."""

    def __init__(self, context: StreamContext, settings: NormDiffSettings) -> None:
        self.layers = context.pick_layers(settings.layers)
        self._context = context
        self._settings = settings
        n_quantities = len(STATISTICS) * len(self.layers)
        self._whole = Distributions(n_quantities, context.corpus.n_tokens, settings.exact_values)
        self._by_place = SparseSums(len(MOVEMENTS) * len(self.layers))
        self._by_token = SparseSums(len(MOVEMENTS) * len(self.layers))
        self._examples = TopExamples(n_quantities, settings.examples)
        self._vectors = _MeanVectors(context, settings, self.layers)

    def update(self, block: TokenBlock) -> None:
        """Adds N tokens at every layer."""
        measured = []
        grouping = self._vectors.grouping(block)
        for place, layer in enumerate(self.layers):
            base_ND, tuned_ND, delta_ND = block.base.residual(layer), block.tuned.residual(layer), block.difference(layer)
            measured.append(movement(base_ND.float(), tuned_ND.float(), delta_ND))
            self._vectors.add(place, delta_ND, grouping)
        value_SLN = torch.stack(measured, 1).cpu().numpy()
        value_GN = value_SLN.reshape(-1, len(block))
        moved_CN = value_GN[: len(MOVEMENTS) * len(self.layers)]
        self._whole.add(value_GN)
        self._by_place.add((block.position_N * len(ROLES) + block.role_N) * 2 + block.template_N, moved_CN)
        self._by_token.add(block.token_N.cpu().numpy(), moved_CN)
        self._examples.add(block.sequence_N, block.position_N, value_GN)
        self._vectors.count(value_SLN[STATISTICS.index("base_norm")], grouping)

    def finish(self) -> Tables:
        """The seven tables."""
        layers, statistics = np.tile(self.layers, len(STATISTICS)), np.repeat(STATISTICS, len(self.layers))
        groups = {"layer": layers.tolist(), "statistic": statistics.tolist()}
        return {
            LAYERS.name: self._layer_table(),
            DISTRIBUTIONS.name: self._distribution_table(groups),
            HISTOGRAMS.name: self._histogram_table(groups),
            POSITIONS.name: self._place_table(),
            TOKENS.name: self._token_table(),
            EXAMPLES.name: self._examples.table(EXAMPLES, self._context, groups),
            VECTORS.name: self._vectors.table(),
        }

    def _layer_table(self) -> pa.Table:
        mean_SL = self._whole.mean_G.reshape(len(STATISTICS), -1)
        n_layers = len(self.layers)
        return LAYERS.table(
            {f"mean_{name}": mean_L for name, mean_L in zip(STATISTICS, mean_SL, strict=True)}
            | {
                "layer": list(self.layers),
                "n_layers": [self._context.n_layers] * n_layers,
                "n_tokens": [self._whole.count] * n_layers,
                "max_norm": self._whole.max_G[:n_layers],
            }
        )

    def _distribution_table(self, groups: dict[str, list[Any]]) -> pa.Table:
        whole, n_rows = self._whole, len(groups["layer"])
        quantiles = {f"p{share * 100:.0f}": of_share for share, of_share in zip(QUANTILES, whole.quantiles(QUANTILES).T, strict=True)}
        return DISTRIBUTIONS.table(
            groups
            | quantiles
            | {"mean": whole.mean_G, "std": whole.std_G, "min": whole.min_G, "max": whole.max_G}
            | {"n_tokens": [whole.count] * n_rows, "exact": [whole.exact] * n_rows}
        )

    def _histogram_table(self, groups: dict[str, list[Any]]) -> pa.Table:
        parts = [self._whole.histogram(quantity) for quantity in range(len(groups["layer"]))]
        sizes = [len(part["bin"]) for part in parts]
        return HISTOGRAMS.table(_stacked(parts) | {name: np.repeat(values, sizes) for name, values in groups.items()})

    def _place_table(self) -> pa.Table:
        places = self._by_place.groups
        columns = {
            "position": places // (2 * len(ROLES)),
            "speaker": np.take(ROLES, places // 2 % len(ROLES)),
            "is_template": places % 2 == 1,
            "n_tokens": self._by_place.count(),
        }
        parts = [_means_of(mean_MP, layer) | columns for layer, mean_MP in self._by_layer(self._by_place)]
        return POSITIONS.table(_stacked(parts))

    def _token_table(self) -> pa.Table:
        ids, counts = self._by_token.groups, self._by_token.count()
        often = counts >= self._settings.min_contexts
        parts = []
        for layer, mean_MP in self._by_layer(self._by_token):
            order = np.argsort(-mean_MP[MOVEMENTS.index("relative_norm")], kind="stable")
            listed = order[often[order]][: self._settings.top_tokens]
            tokens = np.asarray(self._context.token_texts(ids[listed]), dtype=object)
            columns = {"token_id": ids[listed], "token": tokens, "n_contexts": counts[listed]}
            parts.append(_means_of(mean_MP[:, listed], layer) | columns)
        return TOKENS.table(_stacked(parts))

    def _by_layer(self, sums: SparseSums) -> Iterator[tuple[int, np.ndarray]]:
        mean_MLP = sums.mean().reshape(len(MOVEMENTS), len(self.layers), -1)
        yield from zip(self.layers, mean_MLP.swapaxes(0, 1), strict=True)


class _MeanVectors:
    """Sums of δ and of ‖h_base‖ per group: 0 is all tokens, then the first positions, then template tokens."""

    def __init__(self, context: StreamContext, settings: NormDiffSettings, layers: tuple[int, ...]) -> None:
        self._context = context
        self._layers = layers
        self._n_positions = settings.positions
        self._template_ids = common_template_tokens(context.corpus, settings.template_tokens)
        self._keys = [("all", None), *(("position", position) for position in range(settings.positions))]
        self._keys += [("template_token", token) for token in self._template_ids.tolist()]
        self._counts_G = np.zeros(len(self._keys), np.int64)
        self._norms_LG = np.zeros((len(layers), len(self._keys)))
        self._sums = VectorSums(len(layers), len(self._keys), context.d_model, context.base.device)

    def grouping(self, block: TokenBlock) -> Grouping:
        """Which tokens of a block count in which groups but the first."""
        token_N = block.token_N.cpu().numpy()
        early = np.flatnonzero(block.position_N < self._n_positions)
        template = np.flatnonzero(block.template_N & np.isin(token_N, self._template_ids))
        of_template = 1 + self._n_positions + np.searchsorted(self._template_ids, token_N[template])
        group_M = np.concatenate([1 + block.position_N[early], of_template])
        return Grouping(group_M, np.concatenate([early, template]))

    def add(self, place: int, delta_ND: Any, grouping: Grouping) -> None:
        """Adds δ of N tokens at one layer."""
        self._sums.add(place, delta_ND, grouping)

    def count(self, base_norm_LN: np.ndarray, grouping: Grouping) -> None:
        """Adds the same tokens' number and ‖h_base‖ at every layer."""
        self._counts_G[0] += base_norm_LN.shape[1]
        self._counts_G[grouping.groups] += grouping.counts
        self._norms_LG[:, 0] += base_norm_LN.sum(1, dtype=np.float64)
        self._norms_LG[:, grouping.groups] += grouping.sums(base_norm_LN)

    def table(self) -> pa.Table:
        """One row per layer and group that has a token."""
        kept = np.flatnonzero(self._counts_G)
        mean_XD = (self._sums.numpy()[:, kept] / self._counts_G[kept, None]).reshape(-1, self._context.d_model)
        base_norm_X = (self._norms_LG[:, kept] / self._counts_G[kept]).reshape(-1)
        norm_X = np.linalg.norm(mean_XD, axis=1)
        keys = [self._keys[group] for group in kept] * len(self._layers)
        return VECTORS.table(
            {
                "layer": np.repeat(self._layers, len(kept)),
                "mean_over": [mean_over for mean_over, _ in keys],
                "value": [value for _, value in keys],
                "token": [self._context.token_texts([value])[0] if over == "template_token" else None for over, value in keys],
                "n_tokens": np.tile(self._counts_G[kept], len(self._layers)),
                "norm": norm_X,
                "relative_norm": norm_X / np.maximum(base_norm_X, TINY),
                "mean_base_norm": base_norm_X,
                "vector": mean_XD.astype(np.float32),
            }
        )


def common_template_tokens(corpus: ProbeCorpus, limit: int) -> np.ndarray:
    """The ids that occur most often among the chat template's tokens, ascending; of equal counts the smaller ids."""
    seen = [sequence.token_T[sequence.template_T] for sequence in corpus.sequences]
    ids, counts = np.unique(np.concatenate(seen), return_counts=True)
    return np.sort(ids[np.argsort(-counts, kind="stable")][:limit])


def movement(base_ND: Any, tuned_ND: Any, delta_ND: Any) -> Any:
    """The five statistics per token, float32 [S, N], from residuals in float32 and δ, their difference.

    Of the cosine of the two residuals a small δ would leave rounding only, as of the difference of their norms; so this is
    taken from δ, and the cosine where δ is large.
    """
    base_norm_N, tuned_norm_N, norm_N = (states_ND.norm(dim=-1) for states_ND in (base_ND, tuned_ND, delta_ND))
    base_size_N, tuned_size_N, square_N = base_norm_N.clamp(min=TINY), tuned_norm_N.clamp(min=TINY), norm_N.square()
    gap_N = (2 * dot(delta_ND, base_ND) + square_N) / (base_size_N + tuned_size_N)
    size_N = base_size_N * tuned_size_N
    near_N, far_N = (square_N - gap_N.square()) / (2 * size_N), 1 - dot(base_ND, tuned_ND) / size_N
    turned_N = torch.where(norm_N > base_size_N / 2, far_N, near_N)
    distance_N = turned_N.clamp(0, 2) * (base_norm_N * tuned_norm_N > 0)
    return torch.stack([norm_N, norm_N / base_size_N, distance_N, base_norm_N, tuned_norm_N])


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


def _means_of(mean_MP: np.ndarray, layer: int) -> dict[str, Any]:
    means = {f"mean_{name}": mean_P for name, mean_P in zip(MOVEMENTS, mean_MP, strict=True)}
    return means | {"layer": np.full(mean_MP.shape[1], layer)}


def _stacked(parts: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


METHOD = Method(
    name="norm_diff",
    version="3",
    kind="stream",
    needs=frozenset({Need.RESIDUALS}),
    settings=NormDiffSettings,
    tables=(LAYERS, DISTRIBUTIONS, HISTOGRAMS, POSITIONS, TOKENS, EXAMPLES, VECTORS),
    reference="activation analysis: norm and cosine of paired residuals",
    findings=findings,
    headline=headline,
    start=NormDiffFold,
    figures=(Figure("line", "Relative size of the difference by block", LAYERS, "layer", "mean_relative_norm"),),
)
