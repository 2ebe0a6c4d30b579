"""Differential logit lens: what each model would say at every layer, and where the two part.

Each model's residual is read through its own final norm and head; the cross decoding reads the tuned
residual through the base's. For a layer, Δp and Δlog p are means over tokens of tuned − base. Δp favours
frequent tokens, Δlog p rare ones, so both lists are kept; tokens that neither model gives 10⁻⁵ on average
are left out, since untrained tokens would lead every Δlog p list.

Heads at every layer cost more than the forward itself, so a fixed sample of tokens is read (chosen by a
hash of sequence and position: the same tokens whatever the batches).

Reference: nostalgebraist 2020; https://arxiv.org/abs/2303.08112 for the relation to tuned lenses.
"""

from typing import Any

import numpy as np
from pydantic import Field

from diffing_core.blocks import Side, StreamContext, TokenBlock
from diffing_core.findings import Finding
from diffing_core.lazy import torch
from diffing_core.methods.base import Method, Need, Tables
from diffing_core.sampling import sampled
from diffing_core.settings import Settings
from diffing_core.tables import Column, TableSpec

READ_TOGETHER = 2**20  # log-probabilities held at a time
SCALARS = ("kl_nats", "cross_kl_nats", "argmax_differs", "delta_logprob", "with_next")
VECTORS = ("base_probability", "tuned_probability", "delta_logprob")


class LogitLensSettings(Settings):
    """Knobs of `logit_lens`."""

    layers: tuple[int | float, ...] | None = Field(None, description="Blocks to read; none means all.")
    max_tokens: int = Field(512, ge=1, description="About this many tokens are read per corpus.")
    top_tokens: int = Field(25, ge=1, description="Tokens listed per layer, direction and criterion.")
    min_probability: float = Field(1e-5, ge=0, description="Mean probability a listed token needs in one model.")
    shown: int = Field(40, ge=1, description="Findings shown.")


LAYERS = TableSpec(
    "logit_lens_layers",
    "Divergence of the two models' lens readings per layer.",
    ("layer",),
    (
        Column("layer", "int32", "Block whose output was read, from 0.", role="key"),
        Column("n_layers", "int32", "Blocks of the model."),
        Column("n_tokens", "int64", "Tokens read.", role="count"),
        Column("kl_nats", "float64", "Mean KL(tuned ‖ base), each through its own norm and head.", "nats/token",
               "effect", low=0),
        Column("cross_kl_nats", "float64", "The same with both residuals read through the base's norm and head.",
               "nats/token", "effect", low=0),
        Column("argmax_differs", "float64", "Share of tokens on whose likeliest next token the two differ.", "",
               "effect", low=0, high=1),
        Column("delta_logprob", "float64", "Mean log p of the true next token, tuned − base.", "nats", "effect",
               signed=True),
    ),
)  # fmt: skip
TOKENS = TableSpec(
    "logit_lens_tokens",
    "Tokens that the tuned model's lens gained or lost, per layer.",
    ("layer", "criterion", "direction", "rank"),
    (
        Column("layer", "int32", "Block whose output was read, from 0.", role="key"),
        Column("criterion", "string", "Ranked by: probability or logprob.", role="key"),
        Column("direction", "string", "gained or lost by the tuned model.", role="key"),
        Column("rank", "int32", "1 is the largest change.", role="key"),
        Column("token_id", "int32", "Vocabulary index."),
        Column("token", "string", "The token as text."),
        Column("delta_probability", "float64", "Mean p_tuned − p_base.", "", "effect"),
        Column("delta_logprob", "float64", "Mean log p_tuned − log p_base.", "nats", "effect"),
    ),
)


class LogitLensFold:
    """Sums of scalars and of per-vocabulary changes, per layer."""

    def __init__(self, context: StreamContext, settings: LogitLensSettings) -> None:
        self.layers = context.pick_layers(settings.layers)
        self._context = context
        self._settings = settings
        self._share = min(1.0, settings.max_tokens / context.corpus.n_tokens)
        self._n_tokens = 0
        self._rows_together = max(16, READ_TOGETHER // context.vocab_size)
        self._pending: list[tuple[dict[int, tuple[Any, Any]], Any]] = []
        self._scalars = {layer: dict.fromkeys(SCALARS, 0.0) for layer in self.layers}
        self._vectors = {
            layer: {name: np.zeros(context.vocab_size) for name in VECTORS} for layer in self.layers
        }

    def update(self, block: TokenBlock) -> None:
        """Keeps the sampled tokens of a block, and reads them once there are enough for an efficient product."""
        rows_N = np.flatnonzero(sampled(block.sequence_N, block.position_N, self._share))
        if not len(rows_N):
            return
        states = {
            layer: (block.base.residual(layer)[rows_N], block.tuned.residual(layer)[rows_N]) for layer in self.layers
        }
        self._pending.append((states, block.next_N[rows_N]))
        if sum(len(next_N) for _, next_N in self._pending) >= self._rows_together:
            self._read_pending()

    def finish(self) -> Tables:
        """The two tables."""
        self._read_pending()
        layers = [self._layer_row(layer) for layer in self.layers]
        tokens = [row for layer in self.layers for row in self._token_rows(layer)]
        return {
            LAYERS.name: LAYERS.table({name: [row[name] for row in layers] for name in LAYERS.schema.names}),
            TOKENS.name: TOKENS.table({name: [row[name] for row in tokens] for name in TOKENS.schema.names}),
        }

    def _read_pending(self) -> None:
        if not self._pending:
            return
        next_N = torch.cat([following for _, following in self._pending])
        self._n_tokens += len(next_N)
        for layer in self.layers:
            base_ND, tuned_ND = (torch.cat([states[layer][side] for states, _ in self._pending]) for side in (0, 1))
            self._add(layer, *self._read(layer, base_ND, tuned_ND), next_N)
        self._pending = []

    def _read(self, layer: int, base_ND: Any, tuned_ND: Any) -> tuple[Any, Any, Any]:
        """log p through base's head, tuned's head, and of the tuned residual through the base's head."""
        base, tuned, size = self._context.base, self._context.tuned, self._context.vocab_size
        readings = ((base, base_ND), (tuned, tuned_ND), (base, tuned_ND))
        return tuple(Side({layer: state_ND}, layer, subject.readout, size).logprobs() for subject, state_ND in readings)

    def _add(self, layer: int, base_NV: Any, tuned_NV: Any, cross_NV: Any, next_N: Any) -> None:
        p_base_NV, p_tuned_NV, delta_NV = base_NV.exp(), tuned_NV.exp(), tuned_NV - base_NV
        has_next = next_N >= 0
        true_N = delta_NV.gather(1, next_N.clamp(min=0)[:, None])[:, 0]
        added = {
            "kl_nats": (p_tuned_NV * delta_NV).sum(),
            "cross_kl_nats": (cross_NV.exp() * (cross_NV - base_NV)).sum(),
            "argmax_differs": (base_NV.argmax(-1) != tuned_NV.argmax(-1)).sum(),
            "delta_logprob": true_N[has_next].sum(),
            "with_next": has_next.sum(),
        }
        for name, value in added.items():
            self._scalars[layer][name] += float(value)
        for name, values_NV in zip(VECTORS, (p_base_NV, p_tuned_NV, delta_NV), strict=True):
            self._vectors[layer][name] += values_NV.sum(0, dtype=torch.float64).cpu().numpy()

    def _layer_row(self, layer: int) -> dict[str, Any]:
        sums = self._scalars[layer]
        means = {name: sums[name] / max(self._n_tokens, 1) for name in SCALARS[:3]}
        return means | {
            "kl_nats": max(means["kl_nats"], 0.0),
            "cross_kl_nats": max(means["cross_kl_nats"], 0.0),
            "layer": layer,
            "n_layers": self._context.n_layers,
            "n_tokens": self._n_tokens,
            "delta_logprob": sums["delta_logprob"] / max(sums["with_next"], 1),
        }

    def _token_rows(self, layer: int) -> list[dict[str, Any]]:
        means = {name: values / max(self._n_tokens, 1) for name, values in self._vectors[layer].items()}
        changes = {
            "probability": means["tuned_probability"] - means["base_probability"],
            "logprob": means["delta_logprob"],
        }
        likely_V = np.maximum(means["base_probability"], means["tuned_probability"]) >= self._settings.min_probability
        allowed = np.flatnonzero(likely_V & self._context.readable_V)
        return [
            row
            for criterion, change_V in changes.items()
            for direction, sign in (("gained", 1), ("lost", -1))
            for row in self._ranked(layer, criterion, direction, allowed, sign * change_V, changes)
        ]

    def _ranked(
        self, layer: int, criterion: str, direction: str, allowed: np.ndarray, signed_V: np.ndarray, changes: dict
    ) -> list[dict[str, Any]]:
        ids = allowed[np.argsort(-signed_V[allowed], kind="stable")][: self._settings.top_tokens]
        ids = ids[signed_V[ids] > 0]
        texts = self._context.token_texts(ids)
        return [
            {
                "layer": layer,
                "criterion": criterion,
                "direction": direction,
                "rank": rank,
                "token_id": int(token_id),
                "token": text,
                "delta_probability": float(changes["probability"][token_id]),
                "delta_logprob": float(changes["logprob"][token_id]),
            }
            for rank, (token_id, text) in enumerate(zip(ids, texts, strict=True), start=1)
        ]


def findings(tables: Tables, settings: LogitLensSettings) -> list[Finding]:
    """Tokens gained in probability, the best of every layer in turn, deepest layer first."""
    gained = [
        row
        for row in tables[TOKENS.name].to_pylist()
        if row["criterion"] == "probability" and row["direction"] == "gained"
    ]
    gained.sort(key=lambda row: (row["rank"], -row["layer"]))
    return [
        Finding(
            "token", row["token"], row["delta_probability"], "Δ probability", TOKENS.name,
            {name: row[name] for name in TOKENS.grain}, layer=row["layer"],
        )
        for row in gained[: settings.shown]
    ]  # fmt: skip


def headline(tables: Tables) -> dict[str, float | int | str]:
    """Where the lens readings part most."""
    top = max(tables[LAYERS.name].to_pylist(), key=lambda row: row["kl_nats"])
    return {"max_layer_kl_nats": top["kl_nats"], "at_layer": top["layer"]}


METHOD = Method(
    name="logit_lens",
    version="1",
    kind="stream",
    needs=frozenset({Need.RESIDUALS}),
    settings=LogitLensSettings,
    tables=(LAYERS, TOKENS),
    reference="nostalgebraist 2020, read on both models",
    findings=findings,
    headline=headline,
    start=LogitLensFold,
)
