"""The fold of `kl`: sums per sequence, place, token and vocabulary entry, and token rows up to a limit."""

from typing import Any

import numpy as np
import pyarrow as pa

from diffing_core.blocks import StreamContext, TokenBlock
from diffing_core.corpus import ROLES
from diffing_core.examples import TopExamples
from diffing_core.lazy import torch
from diffing_core.methods.base import Tables
from diffing_core.methods.kl.declaration import (
    EXAMPLES,
    HOT_TOKENS,
    POSITIONS,
    SEQUENCES,
    TOKENS,
    VOCABULARY,
    KlSettings,
)
from diffing_core.methods.kl.measures import DIVERGENCES, Measures, measure
from diffing_core.sums import GroupedSums, Rows, float64_device

EXAMPLES_OF = DIVERGENCES[:2]
AVERAGED = (*DIVERGENCES, "argmax_differs", "delta_logprob", "base_entropy_nats", "tuned_entropy_nats")
TILES_TOGETHER = 64


class KlFold:
    """Sums and short lists; memory grows with sequences, places, vocabulary and listed rows only."""

    def __init__(self, context: StreamContext, settings: KlSettings) -> None:
        self.layers = ()
        self._context = context
        self._settings = settings
        self._n_listed = context.corpus.sequences_within(settings.token_rows)
        self._waiting: list[dict[str, np.ndarray]] = []
        self._rows = Rows()
        self._by_sequence, self._by_place = (GroupedSums(*AVERAGED, "followed") for _ in range(2))
        self._by_token = {place: GroupedSums("kl_nats", "square") for place in ("read", "next")}
        self._sums_V: dict[str, Any] = {}
        self._examples = TopExamples(len(EXAMPLES_OF), settings.examples)

    def update(self, block: TokenBlock) -> None:
        """Adds N tokens."""
        found = self._measure(block)
        for name, sum_V in found.vocabulary.items():
            if name not in self._sums_V:
                self._sums_V[name] = torch.zeros(len(sum_V), dtype=torch.float64, device=float64_device(sum_V.device))
            self._sums_V[name] += sum_V.to(self._sums_V[name].device)
        read = {"token_id": block.token_N, "next_id": block.next_N}
        columns = _to_host(found.token) | _to_host(found.favoured | read)
        columns |= {
            "sequence": block.sequence_N,
            "position": block.position_N,
            "role": block.role_N,
            "is_template": block.template_N,
        }
        self._waiting.append(columns)
        if len(self._waiting) == TILES_TOGETHER:
            self._add_waiting()

    def finish(self) -> Tables:
        """The six tables."""
        self._add_waiting()
        return {
            TOKENS.name: self._tokens(),
            SEQUENCES.name: self._sequences(),
            POSITIONS.name: self._positions(),
            VOCABULARY.name: self._vocabulary(),
            HOT_TOKENS.name: self._hot_tokens(),
            EXAMPLES.name: self._examples.table(EXAMPLES, self._context, {"statistic": EXAMPLES_OF}),
        }

    def _measure(self, block: TokenBlock) -> Measures:
        temperature = self._settings.temperature
        if temperature == 1:
            return measure(block.base, block.tuned, block.logprob_difference_NV, block.next_N)
        base, tuned = block.base.cooled(temperature), block.tuned.cooled(temperature)
        return measure(base, tuned, tuned.logprobs() - base.logprobs(), block.next_N)

    def _add_waiting(self) -> None:
        """Groups what several tiles measured: per tile, grouping would cost as much as measuring."""
        if not self._waiting:
            return
        rows = {name: np.concatenate([columns[name] for columns in self._waiting]) for name in self._waiting[0]}
        self._waiting = []
        rows["argmax_differs"] = rows["base"] != rows["tuned"]
        rows["followed"] = rows["next_id"] >= 0
        rows["delta_logprob"] = np.where(rows["followed"], rows["delta_logprob"], 0)
        self._by_sequence.add(rows["sequence"], rows)
        self._by_place.add((rows["position"] * len(ROLES) + rows["role"]) * 2 + rows["is_template"], rows)
        kl = {"kl_nats": rows["kl_nats"], "square": rows["kl_nats"].astype(np.float64) ** 2}
        follows = rows["followed"]
        self._by_token["read"].add(rows["token_id"], kl)
        self._by_token["next"].add(rows["next_id"][follows], {name: values[follows] for name, values in kl.items()})
        self._examples.add(rows["sequence"], rows["position"], np.stack([rows[name] for name in EXAMPLES_OF]))
        listed = rows["sequence"] < self._n_listed
        if listed.any():
            self._rows.add({name: values[listed] for name, values in rows.items()})

    def _tokens(self) -> pa.Table:
        rows = self._rows.sorted_by("sequence", "position")
        if not rows:
            return TOKENS.empty()
        at_end = rows["next_id"] < 0
        next_tokens = self._texts(np.where(at_end, 0, rows["next_id"]))
        shown = rows | {
            "token": self._texts(rows["token_id"]),
            "next_token": pa.array(next_tokens, mask=at_end),
            "delta_logprob": pa.array(rows["delta_logprob"].astype(np.float64), mask=at_end),
            "speaker": np.take(ROLES, rows["role"]),
            "argmax_agrees": ~rows["argmax_differs"],
            "gained_token": self._texts(rows["gained"]),
            "lost_token": self._texts(rows["lost"]),
        }
        return TOKENS.table({name: shown[name] for name in TOKENS.schema.names})

    def _sequences(self) -> pa.Table:
        sums = self._by_sequence
        return SEQUENCES.table(
            _means(sums) | {"sequence": sums.groups, "n_tokens": sums.count(), "max_kl_nats": sums.maximum("kl_nats")}
        )

    def _positions(self) -> pa.Table:
        places = self._by_place.groups
        return POSITIONS.table(
            _means(self._by_place)
            | {
                "position": places // (2 * len(ROLES)),
                "speaker": np.take(ROLES, places // 2 % len(ROLES)),
                "is_template": places % 2 == 1,
                "n_tokens": self._by_place.count(),
            }
        )

    def _vocabulary(self) -> pa.Table:
        means = {name: sums.cpu().numpy() / self._context.corpus.n_tokens for name, sums in self._sums_V.items()}
        ids = np.argsort(-means["contribution"], kind="stable")
        ids = ids[self._context.readable_V[ids]][: self._settings.top_tokens]
        return VOCABULARY.table(
            {
                "token_id": ids,
                "token": self._texts(ids),
                "contribution_nats": means["contribution"][ids],
                "mean_base_probability": means["base"][ids],
                "mean_tuned_probability": means["tuned"][ids],
            }
        )

    def _hot_tokens(self) -> pa.Table:
        parts = [self._hot(place, sums) for place, sums in self._by_token.items()]
        return HOT_TOKENS.table({name: np.concatenate([part[name] for part in parts]) for name in HOT_TOKENS.schema.names})

    def _hot(self, place: str, sums: GroupedSums) -> dict[str, np.ndarray]:
        enough = sums.count() >= self._settings.min_contexts
        ids, mean_nats = sums.groups[enough], sums.mean("kl_nats")[enough]
        variance = np.maximum(sums.mean("square")[enough] - mean_nats**2, 0)
        return {
            "place": np.full(len(ids), place, dtype=object),
            "token_id": ids,
            "token": np.asarray(self._texts(ids), dtype=object),
            "n_contexts": sums.count()[enough],
            "kl_nats": mean_nats,
            "sd_kl_nats": np.sqrt(variance),
        }

    def _texts(self, ids: np.ndarray) -> list[str]:
        return self._context.token_texts(ids)


def _means(sums: GroupedSums) -> dict[str, Any]:
    """Means of AVERAGED by group; that of delta_logprob over the tokens that another one follows."""
    followed = sums.mean("followed")
    delta = sums.mean("delta_logprob") / np.where(followed > 0, followed, 1)
    means = {name: sums.mean(name) for name in AVERAGED}
    return means | {"delta_logprob": pa.array(delta, mask=followed == 0)}


def _to_host(columns: dict[str, Any]) -> dict[str, np.ndarray]:
    """Columns of one type in one copy: on a device each copy waits for all work before it."""
    return dict(zip(columns, torch.stack(list(columns.values())).cpu().numpy(), strict=True))
