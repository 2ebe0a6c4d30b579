"""What the lens reads at one layer, summed over tokens, and the rows that are made of it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffing_core.blocks import StreamContext
from diffing_core.lazy import torch
from diffing_core.methods.logit_lens.declaration import LogitLensSettings
from diffing_core.sums import float64_device

SCALARS = ("kl_nats", "js_nats", "cross_kl_nats", "argmax_differs")
VECTORS = ("base_probability", "tuned_probability", "cross_probability", "delta_logprob")


class LayerReading:
    """Sums over tokens, in float64: scalars, and vectors over the vocabulary."""

    def __init__(self, layer: int, vocab_size: int, device: Any) -> None:
        self.layer = layer
        self._n_tokens = 0
        kept = {"dtype": torch.float64, "device": float64_device(device)}
        self._scalars = {name: torch.zeros((), **kept) for name in (*SCALARS, "delta_logprob", "with_next")}
        self._vectors = {name: torch.zeros(vocab_size, **kept) for name in VECTORS}

    def add(self, n_tokens: int, scalars: Mapping[str, Any], vectors: Mapping[str, Any]) -> None:
        """Adds sums over some tokens."""
        self._n_tokens += n_tokens
        for sums, added in ((self._scalars, scalars), (self._vectors, vectors)):
            for name, value in added.items():
                sums[name] += value.to(sums[name].device)

    def mean_V(self, name: str) -> np.ndarray:
        """Mean of one of VECTORS over tokens."""
        return self._vectors[name].cpu().numpy() / max(self._n_tokens, 1)

    def change_V(self, criterion: str) -> np.ndarray:
        """Mean change, tuned − base, by which tokens are ranked: probability, logprob or cross_probability."""
        if criterion == "logprob":
            return self.mean_V("delta_logprob")
        return self.mean_V({"probability": "tuned_probability"}.get(criterion, criterion)) - self.mean_V("base_probability")

    def row(self) -> dict[str, Any]:
        """The scalars' means."""
        sums = {name: value.item() for name, value in self._scalars.items()}
        means = {name: max(sums[name] / max(self._n_tokens, 1), 0.0) for name in SCALARS}
        return means | {
            "layer": self.layer,
            "n_tokens": self._n_tokens,
            "delta_logprob": sums["delta_logprob"] / max(sums["with_next"], 1),
        }

    def listable(self, context: StreamContext, settings: LogitLensSettings) -> np.ndarray:
        """Ids of readable tokens that at least one model thinks possible."""
        likely_V = np.maximum(self.mean_V("base_probability"), self.mean_V("tuned_probability"))
        return np.flatnonzero((likely_V >= settings.min_probability) & context.readable_V)

    def best(self, criterion: str, sign: int, context: StreamContext, settings: LogitLensSettings) -> np.ndarray:
        """Ids of the tokens with the largest change of one sign, best first."""
        ids, signed_V = self.listable(context, settings), sign * self.change_V(criterion)
        ids = ids[np.argsort(-signed_V[ids], kind="stable")][: settings.top_tokens]
        return ids[signed_V[ids] > 0]


def token_rows(
    reading: LayerReading, criteria: Sequence[str], context: StreamContext, settings: LogitLensSettings
) -> list[dict[str, Any]]:
    """Tokens gained and lost at one layer by every criterion."""
    rank_V = {side: _ranks(reading.mean_V(f"{side}_probability")) for side in ("base", "tuned")}
    changes = {name: reading.change_V(name) for name in criteria}
    rows = []
    for criterion in criteria:
        shown_V = changes["cross_probability" if criterion == "cross_probability" else "probability"]
        for direction, sign in (("gained", 1), ("lost", -1)):
            ids = reading.best(criterion, sign, context, settings)
            rows += [
                {
                    "layer": reading.layer,
                    "criterion": criterion,
                    "direction": direction,
                    "rank": rank,
                    "token_id": int(token_id),
                    "token": text,
                    "base_rank": int(rank_V["base"][token_id]),
                    "tuned_rank": int(rank_V["tuned"][token_id]),
                    "delta_probability": float(shown_V[token_id]),
                    "delta_logprob": float(changes["logprob"][token_id]),
                }
                for rank, (token_id, text) in enumerate(zip(ids, context.token_texts(ids), strict=True), start=1)
            ]
    return rows


def emergence_rows(
    readings: Sequence[LayerReading], context: StreamContext, settings: LogitLensSettings
) -> list[dict[str, Any]]:
    """For the tokens gained at the deepest layer: from which layer on they are there."""
    ids = readings[-1].best("probability", 1, context, settings)
    change_V = readings[-1].change_V("probability")
    gained = [set(reading.best("probability", 1, context, settings).tolist()) for reading in readings]
    likely = {
        side: [set(np.argsort(-reading.mean_V(f"{side}_probability"), kind="stable")[: settings.top_tokens].tolist())
               for reading in readings]
        for side in ("base", "tuned")
    }  # fmt: skip
    layers = [reading.layer for reading in readings]
    return [
        {
            "token_id": token_id,
            "token": text,
            "rank": rank,
            "delta_probability": float(change_V[token_id]),
            "gained_layer": _stays_from(token_id, gained, layers),
            "tuned_layer": _stays_from(token_id, likely["tuned"], layers),
            "base_layer": _stays_from(token_id, likely["base"], layers),
        }
        for rank, (token_id, text) in enumerate(zip(ids.tolist(), context.token_texts(ids), strict=True), start=1)
    ]


def _stays_from(token_id: int, members: Sequence[set[int]], layers: Sequence[int]) -> int | None:
    """First layer from which on the token is in every set; None if it is not in the last one."""
    found = None
    for layer, here in zip(reversed(layers), reversed(members), strict=True):
        if token_id not in here:
            break
        found = layer
    return found


def _ranks(value_V: np.ndarray) -> np.ndarray:
    """Place of each entry in descending order, from 1; equal ones by index."""
    rank_V = np.empty(len(value_V), np.int64)
    rank_V[np.argsort(-value_V, kind="stable")] = np.arange(1, len(value_V) + 1)
    return rank_V
