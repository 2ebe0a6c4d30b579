"""Is there one vector that the finetune adds to every text, and does it say the same tokens wherever it is measured?

A sample is one text: its δ = h_tuned − h_base at a position, or its mean δ over all its tokens. Over n samples
with mean δ̄, per layer and position:

    bias_fraction          = ‖δ̄‖² / mean ‖δ_i‖²                   1 if all δ_i are equal; about 1/n by chance alone
    unbiased_squared_norm  = (n ‖δ̄‖² − mean ‖δ_i‖²) / (n − 1)     expectation ‖μ‖²; scatters about 0 where μ = 0
    unbiased_bias_fraction = unbiased_squared_norm / mean ‖δ_i‖²
    split_half_cosine      = cos(δ̄ of one half of the texts, δ̄ of the other)
    leave_one_out_cosine   = mean_i cos(δ_i, δ̄ of the others)
    p_value                = share of random signs s with ‖Σ s_i δ_i‖² ≥ ‖Σ δ_i‖², the observed signs among them
    eigen_shares           = largest eigenvalues of Σ δ_i δ_iᵀ over their sum (uncentred: the first holds the mean)
    token_agreement        = Jaccard of the tokens that both halves' δ̄ promote most, through the tuned head

All but the last come from the Gram matrix of at most `max_sequences` distinct texts, chosen and halved by a hash
of their tokens. Any two models differ significantly, so no number here is a verdict: the mart `trace_verdicts`
compares the agreement of tokens across corpora with that of null pairs of the same base model.

Reference: https://arxiv.org/abs/2510.13900 (traces in means of differences); sign flips: Fisher 1935.
"""

from typing import Any

import numpy as np
from pydantic import Field

from diffing_core.blocks import StreamContext, TokenBlock, nearest_layers
from diffing_core.corpus import ProbeCorpus
from diffing_core.direction_lens import DirectionLens
from diffing_core.findings import Finding
from diffing_core.lazy import torch
from diffing_core.methods.base import Method, Need, Tables
from diffing_core.position_labels import COUNTED_FROM, POSITION, PositionLabels
from diffing_core.settings import Settings
from diffing_core.sums import Grouping
from diffing_core.tables import Column, TableSpec

EIGEN_SHARES = 5
ROUNDING = 1e-9  # relative; flipping all signs must count as large as flipping none


class ReadableTracesSettings(Settings):
    """Knobs of `readable_traces`."""

    layers: tuple[int | float, ...] | None = Field(None, description="Blocks to read; none means all.")
    positions: int = Field(5, ge=0, description="Positions from the start of the text or of the answer.")
    before_answer: int = Field(3, ge=0, description="In chats, positions before the answer that are read too.")
    max_sequences: int = Field(256, ge=2, description="Texts whose differences are held at a time.")
    memory_mb: int = Field(256, ge=1, description="What they may take; fewer are held if that does not suffice.")
    flips: int = Field(1000, ge=1, description="Random sign patterns behind a p-value.")
    seed: int = Field(0, ge=0, description="Seed of the sign patterns.")
    top_tokens: int = Field(20, ge=1, description="Tokens compared between halves and corpora.")
    min_probability: float = Field(
        1e-8, ge=0, le=1, description="Mean probability in some model that lets a token be listed which the corpus lacks."
    )
    shown_layers: tuple[float, ...] = Field((0.5, 0.75, 1.0), description="Depths (the nearest read) whose tokens become findings.")
    shown: int = Field(40, ge=1, description="Findings shown.")


TRACES = TableSpec(
    "readable_traces",
    "How constant the activation difference is over texts, and whether halves of the texts name the same tokens.",
    ("layer", "counted_from", "position"),
    (
        Column("layer", "int32", "Block whose output was read, from 0.", role="key"),
        COUNTED_FROM,
        POSITION,
        Column("n_layers", "int32", "Blocks of the model."),
        Column("n_sequences", "int32", "Texts, each one sample.", role="count"),
        Column("norm", "float64", "‖δ̄‖.", "activation units", "effect", low=0),
        Column("relative_norm", "float64", "‖δ̄‖ / mean ‖h_base‖.", "", "effect", low=0),
        Column("bias_fraction", "float64", "‖δ̄‖² / mean ‖δ‖².", "", "effect", low=0, high=1.0001),
        Column("unbiased_bias_fraction", "float64", "The same without the 1/n that chance adds; null for one text.", "",
               "effect", True, high=1.0001),
        Column("unbiased_squared_norm", "float64", "Estimate of ‖mean of δ over all texts‖²; null for one text.",
               "activation units²", "effect", True),
        Column("split_half_cosine", "float64", "Cosine between the halves' δ̄; null for one text.", "", "effect", True,
               low=-1.0001, high=1.0001),
        Column("leave_one_out_cosine", "float64", "Mean cosine of a text's δ with the others' mean; null for one text.",
               "", "effect", True, low=-1.0001, high=1.0001),
        Column("p_value", "float64", "Sign-flip test that δ has no constant part.", low=0, high=1),
        Column("eigen_shares", "list<float64>", "Largest eigenvalues of the uncentred covariance of δ over their sum.", "",
               "effect", low=-1e-9, high=1.0001),
        Column("token_agreement", "float64", "Jaccard of both halves' tokens.", "", "effect", low=0, high=1),
        Column("tokens", "list<string>", "Tokens that δ̄ promotes most, likeliest first."),
        Column("tokens_half_1", "list<string>", "The same of the first half of the texts."),
        Column("tokens_half_2", "list<string>", "The same of the second half."),
    ),
)  # fmt: skip


class ReadableTracesFold:
    """δ of the sampled texts at every layer and label, [L, S, G, D]: sums over their tokens until the end."""

    def __init__(self, context: StreamContext, settings: ReadableTracesSettings) -> None:
        self._read_layers = context.pick_layers(settings.layers)
        self._lens = DirectionLens(context, settings.min_probability)
        self.layers = tuple(sorted({*self._read_layers, *self._lens.layers}))
        self._context = context
        self._settings = settings
        self._labels = PositionLabels(context.corpus, settings.positions, settings.before_answer)
        values_of_text = len(self._read_layers) * len(self._labels) * context.d_model
        affordable = settings.memory_mb * 2**20 // (values_of_text * np.float32().nbytes)
        chosen = sampled_sequences(context.corpus, min(settings.max_sequences, max(2, affordable)))
        self._slot_of = np.full(len(context.corpus.sequences), -1)
        self._slot_of[chosen] = np.arange(len(chosen))
        shape = len(self._read_layers), len(chosen), len(self._labels)
        self._delta_LSGD = np.zeros((*shape, context.d_model), np.float32)
        self._base_norm_LSG = np.zeros(shape)
        self._count_SG = np.zeros(shape[1:], np.int64)

    def update(self, block: TokenBlock) -> None:
        """Adds those of N tokens that belong to sampled texts."""
        self._lens.update(block)
        slot_N = self._slot_of[block.sequence_N]
        number_N = self._labels.numbers(block)
        chosen, labelled = np.flatnonzero(slot_N >= 0), np.flatnonzero((slot_N >= 0) & (number_N > 0))
        if not len(chosen):
            return
        group_N = slot_N * len(self._labels)
        parts = [Grouping(group_N[chosen], chosen)]
        if len(labelled):
            parts.append(Grouping((group_N + number_N)[labelled], labelled))
        groups = np.concatenate([part.groups for part in parts])
        n_layers = len(self._read_layers)
        delta_LGD = self._delta_LSGD.reshape(n_layers, -1, self._context.d_model)
        base_norm_LG = self._base_norm_LSG.reshape(n_layers, -1)
        for place, layer in enumerate(self._read_layers):
            delta_ND = block.difference(layer)
            delta_LGD[place, groups] += torch.cat([part.vector_sums(delta_ND) for part in parts]).cpu().numpy()
        norm_LN = torch.stack([block.base.residual(layer).float().norm(dim=-1) for layer in self._read_layers]).cpu().numpy()
        base_norm_LG[:, groups] += np.concatenate([part.sums(norm_LN) for part in parts], axis=1)
        self._count_SG.reshape(-1)[groups] += np.concatenate([part.counts for part in parts])

    def finish(self) -> Tables:
        """The table; labels that no sampled text has are left out."""
        rows: list[dict[str, Any]] = []
        means: list[np.ndarray] = []
        for number, (counted_from, position) in enumerate(self._labels.labels):
            slots = np.flatnonzero(self._count_SG[:, number])
            if not len(slots):
                continue
            count_S = self._count_SG[slots, number]
            sign_FS = signs(self._settings.flips, len(slots), self._settings.seed)
            for place, layer in enumerate(self._read_layers):
                delta_SD = self._delta_LSGD[place, slots, number] / count_S[:, None].astype(np.float64)
                base_norm = float((self._base_norm_LSG[place, slots, number] / count_S).mean())
                measured = constancy(delta_SD @ delta_SD.T, slots % 2 == 0, sign_FS)
                rows.append(
                    {"layer": layer, "counted_from": counted_from, "position": position}
                    | {"n_layers": self._context.n_layers, "n_sequences": len(slots)}
                    | measured
                    | {"relative_norm": measured["norm"] / max(base_norm, 1e-12)}
                )
                means.append(_means_of_halves(delta_SD, slots % 2 == 0))
        self._read_tokens(rows, np.stack(means))
        return {TRACES.name: TRACES.table({name: [row[name] for row in rows] for name in TRACES.schema.names})}

    def _read_tokens(self, rows: list[dict[str, Any]], mean_X3D: np.ndarray) -> None:
        """Adds the tokens of δ̄ and of both halves' δ̄; where that is exactly zero it says nothing."""
        mean_YD = mean_X3D.reshape(-1, mean_X3D.shape[-1])
        nonzero = np.flatnonzero(mean_YD.any(1))
        tokens: list[list[str]] = [[] for _ in mean_YD]
        if len(nonzero):
            listed = self._lens.read("tuned", mean_YD[nonzero], self._settings.top_tokens)["promoted"]
            for place, token_K in zip(nonzero, listed.token_MK, strict=True):
                tokens[place] = self._context.token_texts(token_K)
        for index, row in enumerate(rows):
            row["tokens"], row["tokens_half_1"], row["tokens_half_2"] = tokens[3 * index : 3 * index + 3]
            row["token_agreement"] = jaccard(row["tokens_half_1"], row["tokens_half_2"])


def sampled_sequences(corpus: ProbeCorpus, limit: int) -> np.ndarray:
    """Indices of at most `limit` distinct texts in the order of a hash of their tokens, whatever their order in the corpus."""
    seen = [index for index, sequence in enumerate(corpus.sequences) if len(sequence) > corpus.first_seen_S[index]]
    _, first = np.unique(corpus.key_S[seen], return_index=True)
    return np.asarray(seen)[first[:limit]]


def signs(flips: int, n: int, seed: int) -> np.ndarray:
    """Random signs [flips + 1, n]; the first row is the observed one, all +1."""
    sign_FS = np.random.default_rng(seed).choice([-1.0, 1.0], (flips + 1, n))
    sign_FS[0] = 1
    return sign_FS


def constancy(gram_SS: np.ndarray, in_first_S: np.ndarray, sign_FS: np.ndarray) -> dict[str, Any]:
    """The statistics of the module's docstring from G_ij = δ_i · δ_j, float64; zero where there is no difference."""
    n, own_S = len(gram_SS), np.diag(gram_SS)
    squared_mean, mean_square = max(float(gram_SS.mean()), 0.0), float(own_S.mean())
    flipped_F = np.einsum("fs,fs->f", sign_FS @ gram_SS, sign_FS)
    eigenvalues = np.linalg.eigvalsh(gram_SS)[::-1][:EIGEN_SHARES]
    unbiased = (n * squared_mean - mean_square) / (n - 1) if n > 1 else None
    return {
        "norm": squared_mean**0.5,
        "bias_fraction": _ratio(squared_mean, mean_square),
        "unbiased_squared_norm": unbiased,
        "unbiased_bias_fraction": None if unbiased is None else _ratio(unbiased, mean_square),
        "split_half_cosine": _split_half_cosine(gram_SS, in_first_S),
        "leave_one_out_cosine": _leave_one_out_cosine(gram_SS),
        "p_value": float((flipped_F >= flipped_F[0] * (1 - ROUNDING)).mean()),
        "eigen_shares": [_ratio(max(float(value), 0.0), n * mean_square) for value in eigenvalues],
    }


def jaccard(left: list[str], right: list[str]) -> float:
    """Shared over all, 0 if there are none."""
    return len({*left} & {*right}) / max(len({*left} | {*right}), 1)


def _split_half_cosine(gram_SS: np.ndarray, in_first_S: np.ndarray) -> float | None:
    first, second = np.flatnonzero(in_first_S), np.flatnonzero(~in_first_S)
    if not (len(first) and len(second)):
        return None
    product, of_first, of_second = (gram_SS[np.ix_(*pair)].sum() for pair in ((first, second), (first, first), (second, second)))
    return float(_ratio(product, np.sqrt(max(of_first, 0.0) * max(of_second, 0.0))))


def _leave_one_out_cosine(gram_SS: np.ndarray) -> float | None:
    if len(gram_SS) < 2:
        return None
    own_S, row_S = np.diag(gram_SS), gram_SS.sum(1)
    of_others_S = np.maximum(gram_SS.sum() - 2 * row_S + own_S, 0)
    size_S = np.sqrt(own_S * of_others_S)
    return float(np.divide(row_S - own_S, size_S, out=np.zeros_like(size_S), where=size_S > 0).mean())


def _means_of_halves(delta_SD: np.ndarray, in_first_S: np.ndarray) -> np.ndarray:
    """δ̄ of all texts, of the first half and of the second, [3, D]; zero for an empty half."""
    parts = delta_SD, delta_SD[in_first_S], delta_SD[~in_first_S]
    return np.stack([part_SD.sum(0) / max(len(part_SD), 1) for part_SD in parts])


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def findings(tables: Tables, settings: ReadableTracesSettings) -> list[Finding]:
    """Tokens that both halves of the texts name, the best of every trace in turn, deeper layers first."""
    rows = tables[TRACES.name].to_pylist()
    layers = nearest_layers(settings.shown_layers, {row["layer"] for row in rows}, rows[0]["n_layers"]) if rows else set()
    named = [
        (rank, row, token)
        for row in rows
        if row["layer"] in layers and (row["unbiased_bias_fraction"] or 0) > 0
        for rank, token in enumerate(row["tokens"])
        if token in row["tokens_half_1"] and token in row["tokens_half_2"]
    ]
    named.sort(key=lambda each: (each[0], -each[1]["layer"], each[1]["counted_from"], each[1]["position"] or 0))
    return [
        Finding(
            "token", token, row["unbiased_bias_fraction"], "bias fraction", TRACES.name,
            {name: row[name] for name in TRACES.grain}, layer=row["layer"], position=row["position"], p_value=row["p_value"],
        )
        for _, row, token in named[: settings.shown]
    ]  # fmt: skip


def headline(tables: Tables) -> dict[str, float | int | str]:
    """The trace whose halves agree best; before an answer, where every chat has the same template, all do."""
    rows = [row for row in tables[TRACES.name].to_pylist() if (row["position"] or 0) >= 0]
    top = max(rows, key=lambda row: (row["token_agreement"], row["bias_fraction"]))
    where = "all tokens" if top["position"] is None else f"position {top['position']} from the {top['counted_from']}"
    return {"max_token_agreement": top["token_agreement"], "bias_fraction": top["bias_fraction"],
            "at": f"layer {top['layer']}, {where}"}  # fmt: skip


METHOD = Method(
    name="readable_traces",
    version="3",
    kind="stream",
    needs=frozenset({Need.RESIDUALS}),
    settings=ReadableTracesSettings,
    tables=(TRACES,),
    reference="https://arxiv.org/abs/2510.13900",
    findings=findings,
    headline=headline,
    start=ReadableTracesFold,
)
