"""The arithmetic of `kl`: everything that two next-token distributions say of one another, token by token.

Shapes: N tokens, V vocabulary. Float32 throughout. Temporaries are overwritten in place: on a processor, a
new array of this size costs more than the arithmetic done on it.
"""

from dataclasses import dataclass
from math import log as ln
from typing import Any

from diffing_core.blocks import Side
from diffing_core.elementwise import argmax, argmin, dot, log
from diffing_core.lazy import torch

TINY = 1e-38
FAR_NATS = 8.0  # of both KLs: beyond it what rounding leaves of JS exceeds what it leaves of entropies
DIVERGENCES = ("kl_nats", "reverse_kl_nats", "js_nats", "total_variation")


@dataclass(frozen=True)
class Measures:
    """What `measure` finds.

    Attributes:
        token: float32 [N] by name: DIVERGENCES, delta_logprob (of the true next token), base_entropy_nats,
            tuned_entropy_nats, gained_nats and lost_nats (the largest and the smallest term of the KL).
        favoured: int64 [N] by name: base and tuned (likeliest next token), gained and lost (tokens of those terms).
        vocabulary: float32 [V] by name, summed over the tokens: contribution, base, tuned (probabilities).
    """

    token: dict[str, Any]
    favoured: dict[str, Any]
    vocabulary: dict[str, Any]


def measure(base: Side, tuned: Side, difference_NV: Any, next_N: Any) -> Measures:
    """Divergences of the two sides' final predictions.

    KL and reverse KL are sums of p ln(p/q) − p + q: float32 probabilities of a large vocabulary add up to 1 only within
    some 1e-5, which would hide a small divergence. JS is the sum of both sides' p ln(p/m) with m = (p_b + p_t) / 2, or, where
    they are far apart and its terms cancel, the entropy of m less the mean entropy.
    Exactly zero for equal inputs: rounding may put a sum of a non-negative quantity a hair below zero, and JS
    above ln 2 or a quarter of the symmetrised KL, which bound it (Lin 1991, theorem 3).
    Entropies are as inexact as the probabilities, within some 1e-5 of their values.

    Args:
        difference_NV: log p_tuned − log p_base.
        next_N: the true next token; where it is −1, delta_logprob means nothing.
    """
    p_base_NV, p_tuned_NV = base.probability_NV, tuned.probability_NV
    term_NV = p_tuned_NV * difference_NV
    gained_N, lost_N = argmax(term_NV), argmin(term_NV)
    favoured = {"base": argmax(base.logprobs()), "tuned": argmax(tuned.logprobs()), "gained": gained_N, "lost": lost_N}
    vocabulary = {"contribution": term_NV.sum(0), "base": base.summed_probability_V, "tuned": tuned.summed_probability_V}
    token = {
        "delta_logprob": _at(difference_NV, next_N.clamp(min=0)),
        "gained_nats": _at(term_NV, gained_N).clamp(min=0),
        "lost_nats": _at(term_NV, lost_N).clamp(max=0),
    }
    term_N = term_NV.sum(-1)
    moved_NV = torch.sub(p_tuned_NV, p_base_NV, out=term_NV)
    excess_N = moved_NV.sum(-1)
    mixed_NV = torch.add(p_base_NV, moved_NV, alpha=0.5)
    token["kl_nats"] = (term_N - excess_N).clamp(min=0)
    token["reverse_kl_nats"] = (excess_N - dot(p_base_NV, difference_NV)).clamp(min=0)
    token["total_variation"] = moved_NV.abs_().sum(-1) / 2
    token["base_entropy_nats"] = -dot(p_base_NV, base.logprobs())
    token["tuned_entropy_nats"] = -dot(p_tuned_NV, tuned.logprobs())
    both_N = token["kl_nats"] + token["reverse_kl_nats"]
    js_N = term_N / 2 + _dot_with_log_ratio(mixed_NV, base.logprobs(), spare_NV=term_NV)
    far_F = torch.nonzero(both_N > FAR_NATS)[:, 0]
    if len(far_F):
        mean_entropy_F = (token["base_entropy_nats"] + token["tuned_entropy_nats"])[far_F] / 2
        js_N[far_F] = _entropy(mixed_NV[far_F]) - mean_entropy_F
    token["js_nats"] = js_N.clamp(min=0, max=ln(2)).minimum(both_N / 4)
    return Measures(token, favoured, vocabulary)


def _dot_with_log_ratio(mixed_NV: Any, base_logprob_NV: Any, *, spare_NV: Any) -> Any:
    """Σ m ln(p_b/m), [N]; `spare_NV` is overwritten. A token that both rule out, by the least number there is, adds 0."""
    log(torch.clamp(mixed_NV, min=TINY, out=spare_NV), out=spare_NV)
    ratio_NV = torch.sub(base_logprob_NV, spare_NV, out=spare_NV)
    return dot(mixed_NV, ratio_NV)


def _entropy(probability_FV: Any) -> Any:
    return -dot(probability_FV, log(probability_FV.clamp(min=TINY), out=torch.empty_like(probability_FV)))


def _at(value_NV: Any, index_N: Any) -> Any:
    return value_NV.gather(1, index_N[:, None])[:, 0]
