"""Activation difference lens: what the mean activation difference says through the unembedding.

For each layer and position p, over many texts that have nothing to do with the finetune,

    δ̄_p = mean_i (h_tuned[i, p] − h_base[i, p])        subtracted in float32, summed in float64

is read through the final norm and the head: p⁺ = softmax(W_U γ⊙δ̂), p⁻ = softmax(−W_U γ⊙δ̂), δ̂ of unit
root mean square (see `diffing_core.direction_lens`). Both models' heads decode it. Positions count from the
start of a text, and in a chat from the first token of the answer (negative ones lie in the template before
it); one more vector is the mean over every token. All layers in the same pass. Beside the difference stands what
the mean activations of base and tuned themselves predict, so that one sees what is said by the text alone.

Reference: https://arxiv.org/abs/2510.13900
"""

from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from diffing_core.blocks import StreamContext, TokenBlock, nearest_layers
from diffing_core.direction_lens import DirectionLens
from diffing_core.findings import Finding
from diffing_core.lens_tables import lens_spec, lens_table
from diffing_core.methods.base import Method, Need, Tables
from diffing_core.position_labels import COUNTED_FROM, POSITION, PositionLabels
from diffing_core.settings import Settings
from diffing_core.sums import VectorSums
from diffing_core.tables import Column, TableSpec


class AdlSettings(Settings):
    """Knobs of `adl`."""

    layers: tuple[int | float, ...] | None = Field(None, description="Blocks to read; none means all.")
    positions: int = Field(5, ge=1, description="Positions from the start of the text or of the answer.")
    before_answer: int = Field(3, ge=0, description="In chats, positions before the answer that are read too.")
    top_tokens: int = Field(20, ge=1, description="Tokens listed per vector, head and direction.")
    min_probability: float = Field(
        1e-8, ge=0, le=1, description="Mean probability in some model that lets a token be listed which the corpus lacks."
    )
    shown_layers: tuple[float, ...] = Field((0.5, 0.75, 1.0), description="Depths (the nearest read) whose tokens become findings.")
    shown: int = Field(40, ge=1, description="Findings shown.")


LAYER = Column("layer", "int32", "Block whose output was read, from 0.", role="key")
VECTORS = TableSpec(
    "adl_vectors",
    "Mean activation difference per layer and position.",
    ("layer", "counted_from", "position"),
    (
        LAYER,
        COUNTED_FROM,
        POSITION,
        Column("n_layers", "int32", "Blocks of the model."),
        Column("n_tokens", "int64", "Tokens averaged.", role="count"),
        Column("norm", "float64", "‖δ̄‖.", "activation units", "effect", low=0),
        Column("relative_norm", "float64", "‖δ̄‖ / ‖mean h_base‖.", "", "effect", low=0),
        Column("vector", "list<float32>", "δ̄ itself.", "activation units", "effect", signed=True),
    ),
)
TOKENS = lens_spec(
    "adl_tokens",
    "Tokens that the mean activation difference promotes or suppresses.",
    (LAYER, COUNTED_FROM, POSITION),
)

STATES = TableSpec(
    "adl_states",
    "Tokens that the mean activations themselves predict, each through its own model's norm and head.",
    ("layer", "counted_from", "position", "side", "rank"),
    (
        LAYER,
        COUNTED_FROM,
        POSITION,
        Column("side", "string", "Whose mean activation it is: base or tuned.", role="key"),
        Column("rank", "int32", "1 is likeliest.", role="key"),
        Column("token_id", "int32", "Vocabulary index."),
        Column("token", "string", "The token as text."),
        Column("probability", "float64", "Of all tokens; only readable ones in use are listed.", "", low=0, high=1.0001),
    ),
)


class AdlFold:
    """Sums of δ and of h_base per layer and label."""

    def __init__(self, context: StreamContext, settings: AdlSettings) -> None:
        self._read_layers = context.pick_layers(settings.layers)
        self._lens = DirectionLens(context, settings.min_probability)
        self.layers = tuple(sorted({*self._read_layers, *self._lens.layers}))
        self._context = context
        self._settings = settings
        self._labels = PositionLabels(context.corpus, settings.positions, settings.before_answer)
        self._counts_G = np.zeros(len(self._labels), np.int64)
        shape = len(self._read_layers), len(self._labels), context.d_model
        self._delta, self._base = (VectorSums(*shape, context.base.device) for _ in range(2))

    def update(self, block: TokenBlock) -> None:
        """Adds N tokens at every layer."""
        self._lens.update(block)
        grouping = self._labels.grouping(block)
        self._counts_G[0] += len(block)
        self._counts_G[grouping.groups] += grouping.counts
        for place, layer in enumerate(self._read_layers):
            self._delta.add(place, block.difference(layer), grouping)
            self._base.add(place, block.base.residual(layer).float(), grouping)

    def finish(self) -> Tables:
        """The three tables; labels that no sequence has are left out."""
        kept = np.flatnonzero(self._counts_G)
        delta_XD, base_XD = (
            (sums.numpy()[:, kept] / self._counts_G[kept, None]).reshape(-1, self._context.d_model)
            for sums in (self._delta, self._base)
        )
        labels = [self._labels.labels[number] for number in kept] * len(self._read_layers)
        places = {
            "layer": np.repeat(self._read_layers, len(kept)).tolist(),
            "counted_from": [counted_from for counted_from, _ in labels],
            "position": [position for _, position in labels],
        }
        norm_X = np.linalg.norm(delta_XD, axis=1)
        vectors = VECTORS.table(
            places
            | {
                "n_layers": [self._context.n_layers] * len(labels),
                "n_tokens": np.tile(self._counts_G[kept], len(self._read_layers)),
                "norm": norm_X,
                "relative_norm": norm_X / np.maximum(np.linalg.norm(base_XD, axis=1), 1e-12),
                "vector": delta_XD.astype(np.float32),
            }
        )
        states = {"base": base_XD, "tuned": base_XD + delta_XD}
        return {
            VECTORS.name: vectors,
            TOKENS.name: lens_table(TOKENS, self._lens, self._context, delta_XD, places, self._settings.top_tokens),
            STATES.name: self._state_table(places, states),
        }

    def _state_table(self, places: dict[str, list[Any]], states: dict[str, np.ndarray]) -> pa.Table:
        columns: dict[str, list[Any]] = {name: [] for name in STATES.schema.names}
        for side, mean_XD in states.items():
            listed = self._lens.read_states(side, mean_XD, self._settings.top_tokens)
            n_listed = listed.token_MK.shape[1]
            for name, values in places.items():
                columns[name] += np.repeat(np.asarray(values, object), n_listed).tolist()
            columns["side"] += [side] * listed.token_MK.size
            columns["rank"] += [*range(1, n_listed + 1)] * len(mean_XD)
            columns["token_id"] += listed.token_MK.reshape(-1).tolist()
            columns["probability"] += listed.probability_MK.reshape(-1).tolist()
        columns["token"] = self._context.token_texts(columns["token_id"])
        return STATES.table(columns)


def findings(tables: Tables, settings: AdlSettings) -> list[Finding]:
    """Tokens that the tuned head reads from δ̄, the best of every vector in turn, deeper layers first."""
    vectors = tables[VECTORS.name]
    layers = nearest_layers(settings.shown_layers, set(vectors["layer"].to_pylist()), max(vectors["n_layers"].to_pylist()))
    rows = [
        row
        for row in tables[TOKENS.name].to_pylist()
        if row["layer"] in layers and row["head"] == "tuned" and row["direction"] == "promoted"
    ]
    rows.sort(key=lambda row: (row["rank"], -row["layer"], row["counted_from"], row["position"] or 0))
    return [
        Finding(
            "token", row["token"], row["probability"], "lens probability", TOKENS.name,
            {name: row[name] for name in TOKENS.grain}, layer=row["layer"], position=row["position"],
        )
        for row in rows[: settings.shown]
    ]  # fmt: skip


def headline(tables: Tables) -> dict[str, float | int | str]:
    """The vector that is largest beside the base's own mean."""
    top = max(tables[VECTORS.name].to_pylist(), key=lambda row: row["relative_norm"])
    where = "all tokens" if top["position"] is None else f"position {top['position']} from the {top['counted_from']}"
    return {"max_relative_norm": top["relative_norm"], "at": f"layer {top['layer']}, {where}"}


METHOD = Method(
    name="adl",
    version="4",
    kind="stream",
    needs=frozenset({Need.RESIDUALS}),
    settings=AdlSettings,
    tables=(VECTORS, TOKENS, STATES),
    reference="https://arxiv.org/abs/2510.13900",
    findings=findings,
    headline=headline,
    start=AdlFold,
)
