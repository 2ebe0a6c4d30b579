"""KL divergence between the two models' next-token distributions, token by token.

    kl_nats         = Σ_v p_tuned (log p_tuned − log p_base)          KL(tuned ‖ base)
    reverse_kl_nats = Σ_v p_base  (log p_base − log p_tuned)          KL(base ‖ tuned)
    js_nats         = ½ Σ_v m [(1+t) log(1+t) + (1−t) log(1−t)]       m = (p_tuned + p_base)/2, t = (p_tuned − p_base)/2m
    total_variation = ½ Σ_v |p_tuned − p_base|

All in float32 log-softmax, in nats per token; averages over tokens in float64. The vocabulary's mean
share Σ_t p_tuned (log p_tuned − log p_base) / n of each token is what the findings rank: it names the
tokens on which the divergence is spent.

Reference: Kullback and Leibler 1951; Lin 1991 for JS (written so that equal inputs give exactly 0).
"""

from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from diffing_core.blocks import StreamContext, TokenBlock
from diffing_core.corpus import ROLES
from diffing_core.findings import Finding
from diffing_core.methods.base import Method, Need, Tables
from diffing_core.settings import Settings
from diffing_core.sums import GroupedSums, Rows
from diffing_core.tables import Column, TableSpec

NATS = "nats/token"
MEASURES = ("kl_nats", "reverse_kl_nats", "js_nats", "total_variation")
NEARLY_ONE = 1 - 2**-20
TINY = 1e-38


class KlSettings(Settings):
    """Knobs of `kl`."""

    token_rows: int = Field(200_000, ge=0, description="At most this many tokens are written one by one.")
    top_tokens: int = Field(100, ge=1, description="Vocabulary entries listed by their share of the KL.")
    shown: int = Field(40, ge=1, description="Findings shown.")
    min_contexts: int = Field(3, ge=1, description="Times a context token must occur to be listed as hot.")


def _measures(role: str) -> tuple[Column, ...]:
    return (
        Column("kl_nats", "float64", "KL(tuned ‖ base).", NATS, role, low=0),
        Column("reverse_kl_nats", "float64", "KL(base ‖ tuned).", NATS, role, low=0),
        Column("js_nats", "float64", "Jensen–Shannon divergence.", NATS, role, low=0),
        Column("total_variation", "float64", "Half the sum of |p_tuned − p_base|.", "", role, low=0, high=1.0001),
    )


TOKENS = TableSpec(
    "kl_tokens",
    "How far the two models' predictions differ after each probe token.",
    ("sequence", "position"),
    (
        Column("sequence", "int32", "Index of the probe sequence.", role="key"),
        Column("position", "int32", "Position of the token, from 0.", role="key"),
        Column("token", "string", "The token after which both models predict."),
        Column("next_token", "string", "The true next token.", nullable=True),
        Column("speaker", "string", "Role whose turn it is: text, system, user, assistant, tool."),
        Column("is_template", "bool", "Whether the token belongs to the chat template."),
        *_measures("effect"),
        Column("delta_logprob", "float64", "log p of the true next token, tuned − base.", "nats", "effect", True,
               signed=True),
        Column("base_entropy_nats", "float64", "Entropy of the base's prediction.", NATS),
        Column("tuned_entropy_nats", "float64", "Entropy of the tuned model's prediction.", NATS),
        Column("argmax_agrees", "bool", "Whether both models favour the same token."),
        Column("gained_token", "string", "Token with the largest p_tuned (log p_tuned − log p_base)."),
    ),
)
SEQUENCES = TableSpec(
    "kl_sequences",
    "Mean divergence per probe sequence: the sampling unit of every interval.",
    ("sequence",),
    (
        Column("sequence", "int32", "Index of the probe sequence.", role="key"),
        Column("n_tokens", "int32", "Tokens read.", role="count"),
        *_measures("effect"),
        Column("max_kl_nats", "float64", "Largest KL(tuned ‖ base) of a token.", "nats", "effect", low=0),
    ),
)
POSITIONS = TableSpec(
    "kl_positions",
    "Mean divergence by position, speaker and template flag.",
    ("position", "speaker", "is_template"),
    (
        Column("position", "int32", "Position in the sequence, from 0.", role="key"),
        Column("speaker", "string", "Role whose turn it is.", role="key"),
        Column("is_template", "bool", "Whether the tokens belong to the chat template.", role="key"),
        Column("n_tokens", "int64", "Tokens averaged.", role="count"),
        Column("kl_nats", "float64", "KL(tuned ‖ base).", NATS, "effect", low=0),
    ),
)
VOCABULARY = TableSpec(
    "kl_vocabulary",
    "Tokens on which the divergence is spent.",
    ("token_id",),
    (
        Column("token_id", "int32", "Vocabulary index.", role="key"),
        Column("token", "string", "The token as text."),
        Column("contribution_nats", "float64", "Mean of p_tuned (log p_tuned − log p_base).", NATS, "effect"),
        Column("mean_base_probability", "float64", "Mean probability under the base."),
        Column("mean_tuned_probability", "float64", "Mean probability under the tuned model."),
    ),
)
HOT_TOKENS = TableSpec(
    "kl_hot_tokens",
    "Divergence by the token that was just read: which contexts set the tuned model off.",
    ("token_id",),
    (
        Column("token_id", "int32", "Vocabulary index of the context token.", role="key"),
        Column("token", "string", "The token as text."),
        Column("n_contexts", "int64", "Times it occurs in the corpus.", role="count"),
        Column("kl_nats", "float64", "Mean KL(tuned ‖ base) after it.", NATS, "effect", low=0),
    ),
)


class KlFold:
    """Sums per sequence, place, context token and vocabulary entry, and token rows up to a limit."""

    def __init__(self, context: StreamContext, settings: KlSettings) -> None:
        self.layers = ()
        self._context = context
        self._settings = settings
        self._n_listed = context.corpus.sequences_within(settings.token_rows)
        self._rows = Rows()
        self._by_sequence = GroupedSums(*MEASURES)
        self._by_place = GroupedSums("kl_nats")
        self._by_token = GroupedSums("kl_nats")
        self._sums_V = {name: np.zeros(context.vocab_size) for name in ("contribution", "base", "tuned")}

    def update(self, block: TokenBlock) -> None:
        """Adds N tokens."""
        measured, contribution_NV = divergences(block)
        for name, values_NV in (
            ("contribution", contribution_NV),
            ("base", block.base_probability_NV),
            ("tuned", block.tuned_probability_NV),
        ):
            self._sums_V[name] += values_NV.sum(0).double().cpu().numpy()
        self._by_sequence.add(block.sequence_N, measured)
        self._by_place.add(_place(block), measured)
        self._by_token.add(block.token_N.cpu().numpy(), measured)
        self._list(block, measured, contribution_NV)

    def finish(self) -> Tables:
        """The five tables."""
        return {
            TOKENS.name: self._tokens(),
            SEQUENCES.name: self._sequences(),
            POSITIONS.name: self._positions(),
            VOCABULARY.name: self._vocabulary(),
            HOT_TOKENS.name: self._hot_tokens(),
        }

    def _list(self, block: TokenBlock, measured: dict[str, np.ndarray], contribution_NV: Any) -> None:
        listed = block.sequence_N < self._n_listed
        if not listed.any():
            return
        columns = measured | predictions(block, contribution_NV)
        columns |= {
            "sequence": block.sequence_N,
            "position": block.position_N,
            "token_id": block.token_N.cpu().numpy(),
            "next_id": block.next_N.cpu().numpy(),
            "role": block.role_N,
            "is_template": block.template_N,
        }
        self._rows.add({name: values[listed] for name, values in columns.items()})

    def _tokens(self) -> pa.Table:
        rows = self._rows.sorted_by("sequence", "position")
        if not rows:
            return TOKENS.empty()
        at_end = rows["next_id"] < 0
        next_tokens = self._texts(np.where(at_end, 0, rows.pop("next_id")))
        return TOKENS.table(
            rows
            | {
                "token": self._texts(rows.pop("token_id")),
                "next_token": pa.array(next_tokens, mask=at_end),
                "delta_logprob": pa.array(rows["delta_logprob"].astype(np.float64), mask=at_end),
                "speaker": np.take(ROLES, rows.pop("role")),
                "gained_token": self._texts(rows["gained_token"]),
            }
        )

    def _sequences(self) -> pa.Table:
        sums = self._by_sequence
        means = {name: sums.mean(name) for name in MEASURES}
        return SEQUENCES.table(
            means
            | {"sequence": sums.groups, "n_tokens": sums.count(), "max_kl_nats": sums.maximum("kl_nats")}
        )

    def _positions(self) -> pa.Table:
        places = self._by_place.groups
        return POSITIONS.table(
            {
                "position": places // (2 * len(ROLES)),
                "speaker": np.take(ROLES, places // 2 % len(ROLES)),
                "is_template": places % 2 == 1,
                "n_tokens": self._by_place.count(),
                "kl_nats": self._by_place.mean("kl_nats"),
            }
        )

    def _vocabulary(self) -> pa.Table:
        means = {name: sums / self._context.corpus.n_tokens for name, sums in self._sums_V.items()}
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
        enough = self._by_token.count() >= self._settings.min_contexts
        ids = self._by_token.groups[enough]
        return HOT_TOKENS.table(
            {
                "token_id": ids,
                "token": self._texts(ids),
                "n_contexts": self._by_token.count()[enough],
                "kl_nats": self._by_token.mean("kl_nats")[enough],
            }
        )

    def _texts(self, ids: np.ndarray) -> list[str]:
        return self._context.token_texts(ids)


def divergences(block: TokenBlock) -> tuple[dict[str, np.ndarray], Any]:
    """The four measures per token, float32 [N], and p_tuned (log p_tuned − log p_base), [N, V].

    Rounding may leave a sum of a non-negative quantity a hair below zero; it is put to zero.
    """
    p_base_NV, p_tuned_NV = block.base_probability_NV, block.tuned_probability_NV
    delta_NV = block.logprob_difference_NV
    contribution_NV = p_tuned_NV * delta_NV
    total_NV = p_tuned_NV + p_base_NV
    gap_NV = p_tuned_NV - p_base_NV
    tilt_NV = (gap_NV / total_NV.clamp(min=TINY)).clamp(-NEARLY_ONE, NEARLY_ONE)
    js_NV = (1 + tilt_NV) * tilt_NV.log1p() + (1 - tilt_NV) * (-tilt_NV).log1p()
    measured = {
        "kl_nats": contribution_NV.sum(-1),
        "reverse_kl_nats": -(p_base_NV * delta_NV).sum(-1),
        "js_nats": (total_NV * js_NV).sum(-1) / 4,
        "total_variation": gap_NV.abs().sum(-1) / 2,
    }
    return {name: values.clamp(min=0).cpu().numpy() for name, values in measured.items()}, contribution_NV


def predictions(block: TokenBlock, contribution_NV: Any) -> dict[str, np.ndarray]:
    """What each model expects next, [N]: entropies, agreement, the true token's log-ratio, the token gained."""
    base_NV, tuned_NV = block.base.logprobs(), block.tuned.logprobs()
    true_N1 = block.next_N.clamp(min=0)[:, None]
    favoured_N1 = tuned_NV.argmax(-1, keepdim=True)
    found = {
        "delta_logprob": block.logprob_difference_NV.gather(1, true_N1)[:, 0],
        "base_entropy_nats": -(block.base_probability_NV * base_NV).sum(-1),
        "tuned_entropy_nats": -(block.tuned_probability_NV * tuned_NV).sum(-1),
        "argmax_agrees": base_NV.gather(1, favoured_N1)[:, 0] == base_NV.amax(-1),
        "gained_token": contribution_NV.argmax(-1),
    }
    return {name: values.cpu().numpy() for name, values in found.items()}


def findings(tables: Tables, settings: KlSettings) -> list[Finding]:
    """Tokens that gain most of the divergence; none where the models agree."""
    rows = tables[VOCABULARY.name].slice(0, settings.shown).to_pylist()
    return [
        Finding("token", row["token"], row["contribution_nats"], NATS, VOCABULARY.name, {"token_id": row["token_id"]})
        for row in rows
        if row["contribution_nats"] > 0
    ]


def headline(tables: Tables) -> dict[str, float | int | str]:
    """Mean over sequences, with its extremes."""
    kl_S = tables[SEQUENCES.name]["kl_nats"].to_numpy()
    return {"mean_kl_nats": float(kl_S.mean()), "max_sequence_kl_nats": float(kl_S.max()), "n_sequences": len(kl_S)}


def _place(block: TokenBlock) -> np.ndarray:
    return (block.position_N * len(ROLES) + block.role_N) * 2 + block.template_N


METHOD = Method(
    name="kl",
    version="1",
    kind="stream",
    needs=frozenset({Need.LOGPROBS}),
    settings=KlSettings,
    tables=(TOKENS, SEQUENCES, POSITIONS, VOCABULARY, HOT_TOKENS),
    reference="Kullback and Leibler 1951; Lin 1991",
    findings=findings,
    headline=headline,
    start=KlFold,
)
