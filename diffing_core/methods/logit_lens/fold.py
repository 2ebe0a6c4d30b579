"""The fold of `logit_lens`: collects the sampled tokens' states and reads many at a time."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffing_core.blocks import Side, StreamContext, TokenBlock, rows_per_block, rows_per_tile
from diffing_core.elementwise import exp
from diffing_core.lazy import torch
from diffing_core.methods.base import Tables
from diffing_core.methods.kl.measures import measure
from diffing_core.methods.logit_lens.declaration import EMERGENCE, LAYERS, TOKENS, LogitLensSettings
from diffing_core.methods.logit_lens.reading import LayerReading, emergence_rows, token_rows
from diffing_core.sampling import sampled


class LogitLensFold:
    """Sums of scalars and of per-vocabulary changes, per layer."""

    def __init__(self, context: StreamContext, settings: LogitLensSettings) -> None:
        self.layers = context.pick_layers(settings.layers)
        self._context = context
        self._settings = settings
        self._share = min(1.0, settings.max_tokens / context.corpus.n_tokens)
        self._pending: list[tuple[dict[int, tuple[Any, Any]], Any]] = []
        self._readings = {layer: LayerReading(layer, context.vocab_size, context.base.device) for layer in self.layers}
        self._one_readout = context.base.shares_readout_with(context.tuned)

    def update(self, block: TokenBlock) -> None:
        """Keeps the sampled tokens of a block, and reads them once there are enough for an efficient product."""
        key_N = self._context.corpus.key_S[block.sequence_N]
        rows_N = np.flatnonzero(sampled(key_N, block.position_N, self._share))
        if not len(rows_N):
            return
        row_N = torch.from_numpy(rows_N).to(block.next_N.device)
        states = {
            layer: (block.base.residual(layer)[row_N], block.tuned.residual(layer)[row_N]) for layer in self.layers
        }
        self._pending.append((states, block.next_N[row_N]))
        enough = rows_per_block(self._context.vocab_size, self._context.base.device)
        if sum(len(next_N) for _, next_N in self._pending) >= enough:
            self._read_pending()

    def finish(self) -> Tables:
        """The three tables."""
        self._read_pending()
        readings = [self._readings[layer] for layer in self.layers]
        layers = [reading.row() | {"n_layers": self._context.n_layers} for reading in readings]
        criteria = ("probability", "logprob") if self._one_readout else ("probability", "logprob", "cross_probability")
        tokens = [row for reading in readings for row in token_rows(reading, criteria, self._context, self._settings)]
        emergence = emergence_rows(readings, self._context, self._settings)
        made = ((LAYERS, layers), (TOKENS, tokens), (EMERGENCE, emergence))
        return {spec.name: spec.table({name: [row[name] for row in rows] for name in spec.schema.names}) for spec, rows in made}

    def _read_pending(self) -> None:
        if not self._pending:
            return
        next_N = torch.cat([following for _, following in self._pending])
        for layer in self.layers:
            base_ND, tuned_ND = (torch.cat([states[layer][side] for states, _ in self._pending]) for side in (0, 1))
            self._read(layer, base_ND, tuned_ND, next_N)
        self._pending = []

    def _read(self, layer: int, base_ND: Any, tuned_ND: Any, next_N: Any) -> None:
        """Logits of all rows at once, the rest tile by tile."""
        base, tuned, size = self._context.base, self._context.tuned, self._context.vocab_size
        sides: Mapping[str, Side] = {
            "base": Side({layer: base_ND}, layer, base.readout, size),
            "tuned": Side({layer: tuned_ND}, layer, tuned.readout, size),
        }
        if not self._one_readout:
            sides = {**sides, "cross": Side({layer: tuned_ND}, layer, base.readout, size)}
        for side in sides.values():
            side.logits()
        together = rows_per_tile(size, base.device)
        for start in range(0, len(next_N), together):
            rows = slice(start, start + together)
            tile = {name: side.cut(rows) for name, side in sides.items()}
            self._add(self._readings[layer], tile["base"], tile["tuned"], tile.get("cross"), next_N[rows])

    def _add(self, reading: LayerReading, base: Side, tuned: Side, cross: Side | None, next_N: Any) -> None:
        difference_NV = tuned.logprobs() - base.logprobs()
        found = measure(base, tuned, difference_NV, next_N)
        has_next = next_N >= 0
        scalars = {
            "kl_nats": found.token["kl_nats"].sum(),
            "js_nats": found.token["js_nats"].sum(),
            "argmax_differs": (found.favoured["base"] != found.favoured["tuned"]).sum(),
            "delta_logprob": found.token["delta_logprob"][has_next].sum(),
            "with_next": has_next.sum(),
        }
        vectors = {
            "base_probability": found.vocabulary["base"],
            "tuned_probability": found.vocabulary["tuned"],
            "delta_logprob": difference_NV.sum(0),
        }
        if cross is None:
            scalars["cross_kl_nats"], vectors["cross_probability"] = scalars["kl_nats"], vectors["tuned_probability"]
        else:
            p_cross_NV = exp(cross.logprobs())
            scalars["cross_kl_nats"] = (p_cross_NV * (cross.logprobs() - base.logprobs())).sum()
            vectors["cross_probability"] = p_cross_NV.sum(0)
        reading.add(len(next_N), scalars, vectors)
