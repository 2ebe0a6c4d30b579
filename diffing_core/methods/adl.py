"""Activation difference lens: what the mean activation difference says through the unembedding.

For each layer and position label p, over many texts that have nothing to do with the finetune,

    δ̄_p = mean_i (h_tuned[i, p] − h_base[i, p])        summed in float64

is read through the final norm and the head: p⁺ = softmax(W_U γ⊙δ̂), p⁻ = softmax(−W_U γ⊙δ̂), δ̂ of unit
root mean square, norm and head biases dropped (a norm is not linear; its gain is what acts on a
direction). Both models' heads decode it. Labels count from the start of a text, and in a chat from the
first token of the answer (negative labels lie in the template before it); label null is the mean over
all tokens. Every layer in the same pass.

Reference: https://arxiv.org/abs/2510.13900
"""

from typing import Any

import numpy as np
from pydantic import Field

from diffing_core.blocks import StreamContext, TokenBlock
from diffing_core.corpus import ROLES, ProbeSequence
from diffing_core.findings import Finding
from diffing_core.lazy import torch
from diffing_core.methods.base import Method, Need, Tables
from diffing_core.settings import Settings
from diffing_core.tables import Column, TableSpec

ASSISTANT = ROLES.index("assistant")
NO_ANSWER = 2**31


class AdlSettings(Settings):
    """Knobs of `adl`."""

    layers: tuple[int | float, ...] | None = Field(None, description="Blocks to read; none means all.")
    positions: int = Field(5, ge=1, description="Positions from the start of the text or of the answer.")
    before_answer: int = Field(3, ge=0, description="In chats, positions before the answer that are read too.")
    top_tokens: int = Field(20, ge=1, description="Tokens listed per vector, head and direction.")
    shown_layers: tuple[float, ...] = Field((0.5, 0.75, 1.0), description="Depths whose tokens become findings.")
    shown: int = Field(40, ge=1, description="Findings shown.")


POSITION = Column("position", "int32", "Label of the position; null is the mean over all tokens.", role="key",
                  nullable=True)  # fmt: skip
VECTORS = TableSpec(
    "adl_vectors",
    "Mean activation difference per layer and position.",
    ("layer", "position"),
    (
        Column("layer", "int32", "Block whose output was read, from 0.", role="key"),
        POSITION,
        Column("n_layers", "int32", "Blocks of the model."),
        Column("n_tokens", "int64", "Tokens averaged.", role="count"),
        Column("norm", "float64", "‖δ̄‖.", "activation units", "effect", low=0),
        Column("relative_norm", "float64", "‖δ̄‖ / ‖mean h_base‖.", "", "effect", low=0),
        Column("vector", "list<float32>", "δ̄ itself.", "activation units", "effect", signed=True),
    ),
)
TOKENS = TableSpec(
    "adl_tokens",
    "Tokens that the mean activation difference promotes or suppresses.",
    ("layer", "position", "head", "direction", "rank"),
    (
        Column("layer", "int32", "Block whose output was read, from 0.", role="key"),
        POSITION,
        Column("head", "string", "Whose norm and head decode: base or tuned.", role="key"),
        Column("direction", "string", "promoted (p⁺) or suppressed (p⁻).", role="key"),
        Column("rank", "int32", "1 is likeliest.", role="key"),
        Column("token_id", "int32", "Vocabulary index."),
        Column("token", "string", "The token as text."),
        Column("probability", "float64", "p⁺ or p⁻.", "", low=0, high=1.0001),
    ),
)


class AdlFold:
    """Sums of δ and of h_base per layer and label; row 0 is all tokens, the rest are labels."""

    def __init__(self, context: StreamContext, settings: AdlSettings) -> None:
        self.layers = context.pick_layers(settings.layers)
        self._context = context
        self._settings = settings
        self._origin_S = np.asarray([answer_start(sequence) for sequence in context.corpus.sequences])
        self._labels = np.arange(-settings.before_answer, settings.positions)
        rows = 1 + len(self._labels)
        self._counts = torch.zeros(rows, dtype=torch.float64)
        self._sums = {layer: torch.zeros(2, rows, context.d_model, dtype=torch.float64) for layer in self.layers}

    def update(self, block: TokenBlock) -> None:
        """Adds N tokens at every layer."""
        label_N = block.position_N - self._origin_S[block.sequence_N]
        row_N = label_N - self._labels[0] + 1
        labelled = (row_N >= 1) & (row_N <= len(self._labels))
        chosen_N = torch.from_numpy(np.flatnonzero(labelled))
        target_N = torch.from_numpy(row_N[labelled])
        self._counts[0] += len(block)
        self._counts.index_add_(0, target_N, torch.ones(len(target_N), dtype=torch.float64))
        for layer in self.layers:
            for sums_RD, values_ND in zip(
                self._sums[layer], (block.difference(layer), block.base.residual(layer).float()), strict=True
            ):
                sums_RD[0] += values_ND.sum(0).double().cpu()
                sums_RD.index_add_(0, target_N, values_ND[chosen_N].cpu().double())

    def finish(self) -> Tables:
        """The two tables; labels that no sequence has are left out."""
        kept = [row for row in range(len(self._counts)) if self._counts[row] > 0]
        vectors = [self._vector_row(layer, row) for layer in self.layers for row in kept]
        tokens = [row for vector in vectors for row in self._token_rows(vector)]
        return {
            VECTORS.name: VECTORS.table({name: [row[name] for row in vectors] for name in VECTORS.schema.names}),
            TOKENS.name: TOKENS.table({name: [row[name] for row in tokens] for name in TOKENS.schema.names}),
        }

    def _vector_row(self, layer: int, row: int) -> dict[str, Any]:
        delta_D, base_D = self._sums[layer][:, row] / self._counts[row]
        return {
            "layer": layer,
            "position": None if row == 0 else int(self._labels[row - 1]),
            "n_layers": self._context.n_layers,
            "n_tokens": int(self._counts[row]),
            "norm": float(delta_D.norm()),
            "relative_norm": float(delta_D.norm() / base_D.norm().clamp(min=1e-12)),
            "vector": delta_D.float().numpy(),
        }

    def _token_rows(self, vector: dict[str, Any]) -> list[dict[str, Any]]:
        if vector["norm"] == 0:
            return []
        delta_D = torch.from_numpy(vector["vector"])
        unit_D = delta_D / delta_D.square().mean().sqrt()
        return [
            {"layer": vector["layer"], "position": vector["position"], "head": head, "direction": direction, **row}
            for head in ("base", "tuned")
            for direction, sign in (("promoted", 1), ("suppressed", -1))
            for row in self._decoded(getattr(self._context, head), sign * unit_D)
        ]

    def _decoded(self, subject: Any, unit_D: Any) -> list[dict[str, Any]]:
        logits_V = subject.lens_of_difference(unit_D.to(subject.device, subject.dtype)[None])[0]
        probability_V = logits_V[: self._context.vocab_size].float().softmax(-1).cpu().numpy()
        ids = np.argsort(-probability_V, kind="stable")
        ids = ids[self._context.readable_V[ids]][: self._settings.top_tokens]
        texts = self._context.token_texts(ids)
        return [
            {"rank": rank, "token_id": int(token_id), "token": text, "probability": float(probability_V[token_id])}
            for rank, (token_id, text) in enumerate(zip(ids, texts, strict=True), start=1)
        ]


def answer_start(sequence: ProbeSequence) -> int:
    """Position from which labels count: the first token of the answer in a chat, 0 in a text.

    A chat that is cut before its answer has no label: its opening must not be averaged with answers.
    """
    if not sequence.role_T.any():
        return 0
    answer = np.flatnonzero((sequence.role_T == ASSISTANT) & ~sequence.template_T)
    return int(answer[0]) if len(answer) else NO_ANSWER


def findings(tables: Tables, settings: AdlSettings) -> list[Finding]:
    """Tokens that the tuned head reads from δ̄, the best of every vector in turn, deeper layers first."""
    n_layers = max(tables[VECTORS.name]["n_layers"].to_pylist())
    layers = {int(depth * (n_layers - 1)) for depth in settings.shown_layers}
    rows = [
        row
        for row in tables[TOKENS.name].to_pylist()
        if row["layer"] in layers and row["head"] == "tuned" and row["direction"] == "promoted"
    ]
    rows.sort(key=lambda row: (row["rank"], -row["layer"], row["position"] is not None, row["position"] or 0))
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
    where = "all tokens" if top["position"] is None else f"position {top['position']}"
    return {"max_relative_norm": top["relative_norm"], "at": f"layer {top['layer']}, {where}"}


METHOD = Method(
    name="adl",
    version="1",
    kind="stream",
    needs=frozenset({Need.RESIDUALS}),
    settings=AdlSettings,
    tables=(VECTORS, TOKENS),
    reference="https://arxiv.org/abs/2510.13900",
    findings=findings,
    headline=headline,
    start=AdlFold,
)
