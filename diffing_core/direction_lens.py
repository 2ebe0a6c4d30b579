"""What directions of the residual stream say through norm and head: the lens for differences, not for states.

A norm is not linear; what it does to a direction is its gain, and for LayerNorm the removal of the mean.
RMSNorm's scale is one positive factor, so the order of tokens is that of head(γ⊙δ), whatever the size of δ:
directions are brought to unit root mean square, and biases of norm and head are dropped (`Subject.lens_of_difference`).

Untrained rows of a head dominate raw lenses, so only tokens are read that occur at least twice in the probe
corpus, or that some model expects at all (mean probability over a sample of the corpus).

Shapes: M directions, D width, V vocabulary, K tokens listed.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from diffing_core.blocks import StreamContext, TokenBlock
from diffing_core.lazy import torch
from diffing_core.sampling import sampled

SAMPLED_TOKENS = 128
READ_TOGETHER = 2**22  # logits held at a time
MIN_COUNT = 2


class Listed(NamedTuple):
    """The likeliest tokens of M directions, best first: ids and probabilities, [M, K]."""

    token_MK: np.ndarray
    probability_MK: np.ndarray


class DirectionLens:
    """Reads directions through either side's norm and head; is fed the corpus to learn which tokens are in use."""

    def __init__(self, context: StreamContext, min_probability: float, *, share: float | None = None) -> None:
        """`share`: of the tokens it is fed, that it reads; by default SAMPLED_TOKENS of the corpus."""
        self.layers = (context.n_layers - 1,)
        self._context = context
        self._min_probability = min_probability
        self._share = min(1.0, SAMPLED_TOKENS / context.corpus.n_tokens) if share is None else share
        self._states: dict[str, list[Any]] = {"base": [], "tuned": []}

    def update(self, block: TokenBlock) -> None:
        """Keeps the last layer's states of the sampled tokens."""
        rows = np.flatnonzero(sampled(self._context.corpus.key_S[block.sequence_N], block.position_N, self._share))
        if len(rows):
            for side, kept in self._states.items():
                kept.append(getattr(block, side).residual(self.layers[0])[rows])

    @cached_property
    def vocabulary(self) -> np.ndarray:
        """Ids of the tokens that may be listed: readable, and in use. To be asked after the last block."""
        size = self._context.vocab_size
        seen = np.concatenate([sequence.token_T for sequence in self._context.corpus.sequences])
        in_use_V = np.bincount(seen, minlength=size)[:size] >= MIN_COUNT
        for side in self._states:
            in_use_V |= self._mean_probability(side) >= self._min_probability
        return np.flatnonzero(in_use_V & self._context.readable_V)

    def read(self, side: str, direction_MD: np.ndarray, top: int) -> dict[str, Listed]:
        """The tokens likeliest in p⁺ (`promoted`) and in p⁻ (`suppressed`) of M directions, none of them zero."""
        unit_MD = direction_MD / np.sqrt(np.square(direction_MD).mean(1, keepdims=True))
        found: dict[str, list[Listed]] = {"promoted": [], "suppressed": []}
        for chunk_MD in self._chunks(torch.from_numpy(unit_MD.astype(np.float32))):
            logits_MV = getattr(self._context, side).lens_of_difference(chunk_MD)[:, : self._context.vocab_size].float()
            found["promoted"].append(self._likeliest(logits_MV, top))
            found["suppressed"].append(self._likeliest(-logits_MV, top))
        return {
            direction: Listed(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
            for direction, parts in found.items()
        }

    def read_states(self, side: str, state_MD: np.ndarray, top: int) -> Listed:
        """The tokens likeliest after M states, through norm and head as they are."""
        subject = getattr(self._context, side)
        parts = [
            self._likeliest(
                subject.readout(chunk_MD.to(subject.device, subject.dtype))[:, : self._context.vocab_size].float(), top
            )
            for chunk_MD in self._chunks(torch.from_numpy(state_MD.astype(np.float32)))
        ]
        return Listed(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def _likeliest(self, logits_MV: Any, top: int) -> Listed:
        log_total_M1 = logits_MV.logsumexp(-1, keepdim=True)
        best = logits_MV[:, torch.from_numpy(self.vocabulary)].topk(min(top, len(self.vocabulary)), dim=-1)
        token_MK = self.vocabulary[best.indices.cpu().numpy()]
        probability_MK = (best.values - log_total_M1).exp().cpu().numpy()
        by_token_id = np.lexsort((token_MK, -best.values.cpu().numpy()), axis=-1)  # among equals the smaller id first
        return Listed(*(np.take_along_axis(each, by_token_id, -1) for each in (token_MK, probability_MK)))

    def _mean_probability(self, side: str) -> np.ndarray:
        """Mean next-token probability over the sampled tokens, float64 [V]."""
        total_V = np.zeros(self._context.vocab_size)
        for state_MD in self._chunks(torch.cat(self._states[side])) if self._states[side] else ():
            logits_MV = getattr(self._context, side).readout(state_MD)[:, : self._context.vocab_size].float()
            total_V += logits_MV.softmax(-1).sum(0).cpu().double().numpy()
        return total_V / max(sum(map(len, self._states[side])), 1)

    def _chunks(self, vector_MD: Any) -> Iterator[Any]:
        yield from vector_MD.split(max(1, READ_TOGETHER // self._context.vocab_size))
