"""What sets of latents do: the tuned model goes on from a residual stream in which only they were exchanged.

    add      h = h_base  + Σ_{j∈S} f_j (d_j^tuned − d_j^base)      the base's stream with their contribution
    remove   h = h_tuned − Σ_{j∈S} f_j (d_j^tuned − d_j^base)      the tuned model's own without it
    δ̂        h = h_base  + ĥ_tuned − ĥ_base                        `add` of all latents and of the decoders' biases
    error    h = h_base  + (h_tuned − ĥ_tuned) − (h_base − ĥ_base)   what no latent explains: δ without δ̂
    ĥ        h = ĥ_tuned                                           what the crosscoder itself loses, for comparison

The tuned model's blocks above the layer run on h, and KL(p_tuned ‖ p_patched) is averaged over the tokens; S empty and
`add` is the base's stream as it is. Of its KL a set accounts for what adding it takes away, or what removing it brings.
Only held-out documents are read, and where they have answers the same is also averaged over the answers' tokens alone.
Intervals are of a bootstrap over documents. Tokens that the crosscoder does not read have no active latent.

Reference: https://arxiv.org/abs/2504.02922, section 3.3.

Suffixes: B sequences of a batch, T positions, N tokens, S sequences, D width, F latents, C conditions.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from diffing_core.activation_pairs import Outliers
from diffing_core.capture import capture_residuals
from diffing_core.corpus import ROLES, ProbeCorpus, ProbeSequence, TokenBatch
from diffing_core.fit_reading import TOKENS_PER_BATCH, FitReading
from diffing_core.interventions import edited_residual
from diffing_core.lazy import torch
from diffing_core.methods.crosscoder.model import Crosscoder
from diffing_core.sampling import position_hash
from diffing_core.stats import LEVEL, Interval

RESAMPLES = 2000
ERROR = "error only"
WHOLE = ("all and biases", ERROR, "reconstruction")
ANSWER = ROLES.index("assistant")


class Condition(NamedTuple):
    """Which latents are exchanged, and how; the name tells the set."""

    name: str
    action: str
    latents: np.ndarray


class Measured(NamedTuple):
    """The effect of each condition over some of the tokens; none where there is no such token."""

    effects: "list[Effect]"
    n_tokens: int
    n_sequences: int


class Effect(NamedTuple):
    """Mean KL per token over sequences, and the share of the base's KL that the set accounts for, with intervals."""

    kl_nats: float
    kl_interval: Interval
    share: float | None
    share_interval: Interval | None


def conditions(sets: Mapping[str, np.ndarray], candidates: np.ndarray, everything: np.ndarray, seed: int) -> list[Condition]:
    """All that is tried: nothing, everything, each set, and beside it as many random latents of `candidates` not in it; the error.

    The first is `none`, the last the reconstruction.
    """
    draw = np.random.default_rng(seed)
    found = [Condition("none", "add", everything[:0])]
    for name, latents in {"all": everything, **sets}.items():
        found += [Condition(name, action, latents) for action in ("add", "remove")]
        others = np.setdiff1d(candidates, latents)
        if name != "all" and len(latents) and len(others):
            control = np.sort(draw.permutation(others)[: len(latents)])
            found += [Condition(f"random as {name}", action, control) for action in ("add", "remove")]
    whole = [Condition("all and biases", "add", everything), Condition(ERROR, "add", everything[:0])]
    return [*found, *whole, Condition("reconstruction", "replace", everything)]


def causal_effects(
    crosscoder: Crosscoder, reading: FitReading, layer: int, tried: Sequence[Condition], tokens: "Read"
) -> tuple[Measured, Measured]:
    """The effect of each condition over all tokens, and over those of answers. The first is `none`, `add`."""
    sums_KCS: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    counts_KS: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    with torch.inference_mode():
        for batch, read_N, seen_N, answer_N in tokens.batches(reading.context.corpus):
            kl_CN, row_N = _patched(crosscoder, reading, layer, tried, batch, read_N, tokens.outliers)
            n_rows = len(batch.sequences)
            for sums_CS, counts_S, weight_N in zip(sums_KCS, counts_KS, (seen_N * 1.0, answer_N * 1.0), strict=True):
                counts_S.append(np.bincount(row_N, weight_N, n_rows))
                sums_CS.append(np.stack([np.bincount(row_N, kl_N * weight_N, n_rows) for kl_N in kl_CN]))
    whole, answers = (
        _measured(tried, np.concatenate(sums_CS, axis=1), np.concatenate(counts_S), tokens.seed)
        for sums_CS, counts_S in zip(sums_KCS, counts_KS, strict=True)
    )
    return whole, answers


def _measured(tried: Sequence[Condition], sum_CS: np.ndarray, count_S: np.ndarray, seed: int) -> Measured:
    """Of the documents that have any of the tokens."""
    has_S = count_S > 0
    effects = _effects(tried, sum_CS[:, has_S], count_S[has_S], seed) if has_S.any() else []
    return Measured(effects, int(count_S.sum()), int(has_S.sum()))


class Read(NamedTuple):
    """Which tokens: whole held-out sequences from all over the corpora, `n_tokens` at most or one; which of them are encoded.

    `held_out_S` says which sequences of all corpora are held out; without it all are read.
    """

    n_tokens: int
    first_position: int
    outliers: Outliers | None
    seed: int
    roles: tuple[str, ...] | None = None
    template: bool = True
    held_out_S: np.ndarray | None = None

    def batches(self, corpus: ProbeCorpus) -> Iterator[tuple[TokenBatch, np.ndarray, np.ndarray, np.ndarray]]:
        """The sequences, the same in every run; which of their tokens are encoded unless they are outliers, which methods see
        at all, and which of these are of answers (the assistant's, less the template's), bool [N] each."""
        every = corpus.sequences
        order = np.argsort(position_hash(np.arange(len(every)), np.zeros(len(every), np.int64), self.seed))
        if self.held_out_S is not None:
            order = order[self.held_out_S[order]]
        n_tokens = np.cumsum([len(every[index]) for index in order])
        n_sequences = max(1, np.searchsorted(n_tokens, self.n_tokens, side="right"))
        chosen = tuple(every[index] for index in order[:n_sequences])
        for batch in replace(corpus, sequences=chosen).batches(TOKENS_PER_BATCH):
            sequences = [chosen[index] for index in batch.sequences]
            seen = [np.arange(len(sequence)) >= max(sequence.start, corpus.skip_first_tokens) for sequence in sequences]
            seen_N = np.concatenate(seen)
            yield batch, seen_N & self._encoded(sequences), seen_N, seen_N & _answers(sequences)

    def _encoded(self, sequences: list[ProbeSequence]) -> np.ndarray:
        kept_N = np.concatenate([np.arange(len(sequence)) for sequence in sequences]) >= self.first_position
        if self.roles is not None:
            wanted = [ROLES.index(role) for role in self.roles]
            kept_N &= np.isin(np.concatenate([sequence.role_T for sequence in sequences]), wanted)
        return kept_N if self.template else kept_N & ~np.concatenate([sequence.template_T for sequence in sequences])


def _answers(sequences: list[ProbeSequence]) -> np.ndarray:
    return np.concatenate([(sequence.role_T == ANSWER) & ~sequence.template_T for sequence in sequences])


def _patched(
    crosscoder: Crosscoder, reading: FitReading, layer: int, tried: Sequence[Condition], batch: TokenBatch, read_N: np.ndarray,
    outliers: Outliers | None,
) -> tuple[list[np.ndarray], np.ndarray]:  # fmt: skip
    """KL(p_tuned ‖ p_patched) of every condition at the valid tokens, and their rows in the batch."""
    context = reading.context
    base_ND, tuned_ND = (capture_residuals(side, batch, (layer,))[layer] for side in (context.base, context.tuned))
    row_N = np.nonzero(batch.mask_BT)[0]
    for state_ND, most in zip((base_ND, tuned_ND), outliers.most_M if outliers else (np.inf, np.inf), strict=True):
        read_N = read_N & (state_ND.float().norm(dim=1) <= most).cpu().numpy()
    read_N1 = torch.from_numpy(read_N).to(base_ND.device)[:, None]
    pair = [state_ND.to(crosscoder.bias_F.device) for state_ND in (base_ND, tuned_ND)]
    code_NF = crosscoder.encode(pair) * read_N1.to(crosscoder.bias_F.device)
    own_NV = _logprobs(reading, layer, batch, tuned_ND)
    kl = []
    for condition in tried:
        state_ND = _state(crosscoder, condition, base_ND.float(), tuned_ND.float(), code_NF)
        if condition.name in WHOLE:  # has a part of its own at tokens that the crosscoder does not read
            explains = condition.action == "add" and condition.name != ERROR
            own_ND = base_ND if explains else tuned_ND  # there nothing is explained, and the error is all of the difference
            state_ND = torch.where(read_N1, state_ND, own_ND.float())
        patched_NV = _logprobs(reading, layer, batch, state_ND.to(tuned_ND))
        kl_N = (own_NV.exp() * (own_NV - patched_NV)).sum(-1).clamp(min=0)
        kl.append(kl_N.cpu().double().numpy())
    return kl, row_N


def _state(crosscoder: Crosscoder, condition: Condition, base_ND: Any, tuned_ND: Any, code_NF: Any) -> Any:
    if condition.name in WHOLE:
        rebuilt_MND = [each_ND.to(tuned_ND) for each_ND in crosscoder.reconstruct(code_NF)]
        if condition.name == ERROR:
            return base_ND + ((tuned_ND - rebuilt_MND[1]) - (base_ND - rebuilt_MND[0]))
        return rebuilt_MND[1] if condition.action == "replace" else base_ND + (rebuilt_MND[1] - rebuilt_MND[0])
    chosen = torch.from_numpy(np.asarray(condition.latents, np.int64)).to(code_NF.device)
    base_FD, tuned_FD = crosscoder.directions()
    moved_ND = (code_NF[:, chosen] @ (tuned_FD[chosen] - base_FD[chosen])).to(base_ND)
    return base_ND + moved_ND if condition.action == "add" else tuned_ND - moved_ND


def _logprobs(reading: FitReading, layer: int, batch: TokenBatch, state_ND: Any) -> Any:
    """log p of the tuned model when block `layer` gives these states at the valid tokens, float32 [N, V]."""
    tuned, n_seen = reading.context.tuned, reading.context.vocab_size
    if layer == reading.context.n_layers - 1:  # nothing above it but norm and head
        return tuned.readout(state_ND)[:, :n_seen].float().log_softmax(-1)
    token_BT = torch.from_numpy(batch.token_BT).to(tuned.device)
    mask_BT = torch.from_numpy(batch.mask_BT).to(tuned.device)
    valid_N = torch.from_numpy(np.flatnonzero(batch.mask_BT)).to(tuned.device)

    def edit(hidden_BTD: Any) -> Any:
        return hidden_BTD.flatten(0, 1).index_copy(0, valid_N, state_ND).view_as(hidden_BTD)

    with edited_residual(tuned, layer, edit):
        hidden_BTD = tuned.backbone(token_BT, mask_BT)
    logits_NV = tuned.logits(hidden_BTD.flatten(0, 1).index_select(0, valid_N))
    return logits_NV[:, :n_seen].float().log_softmax(-1)


def _effects(tried: Sequence[Condition], sum_CS: np.ndarray, count_S: np.ndarray, seed: int) -> list[Effect]:
    drawn_RS = np.random.default_rng(seed).multinomial(len(count_S), np.full(len(count_S), 1 / len(count_S)), RESAMPLES)
    drawn_CR = (sum_CS @ drawn_RS.T) / np.maximum(drawn_RS @ count_S, 1)
    mean_C = sum_CS.sum(1) / count_S.sum()
    usable_R = drawn_CR[0] > 0
    found = []
    for condition, mean, drawn_R in zip(tried, mean_C, drawn_CR, strict=True):
        share = interval = None
        if mean_C[0] > 0 and usable_R.any():
            left, left_R = mean / mean_C[0], drawn_R[usable_R] / drawn_CR[0][usable_R]
            share, share_R = (left, left_R) if condition.action == "remove" else (1 - left, 1 - left_R)
            share, interval = float(share), _percentiles(share_R)
        found.append(Effect(float(mean), _percentiles(drawn_R), share, interval))
    return found


def _percentiles(drawn_R: np.ndarray) -> Interval:
    low, high = np.quantile(drawn_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))
