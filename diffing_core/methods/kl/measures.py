"""The arithmetic of `kl`: everything that two next-token distributions say of one another, token by token.

Shapes: N tokens, V vocabulary. Float32 throughout. Temporaries are overwritten in place: on a processor, a
new array of this size costs more than the arithmetic done on it.
"""

from dataclasses import dataclass
from math import log
from typing import Any

from diffing_core.blocks import Side
from diffing_core.elementwise import argmax, argmin, log_
from diffing_core.lazy import torch

TINY = 1e-38
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

    KL and reverse KL are sums of p ln(p/q) − p + q, whose terms are never negative: float32 probabilities of a large
    vocabulary add up to 1 only within some 1e-5, which would hide a small divergence. JS makes the same correction to
    its sum. Exactly zero for equal inputs: rounding may put a sum of a non-negative quantity a hair below zero, and JS
    above a quarter of the symmetrised KL, which bounds it (Lin 1991, theorem 3). Entropies are as inexact as the
    probabilities, within some 1e-5 of their values.

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
    moved_NV = p_tuned_NV - p_base_NV
    token["kl_nats"] = term_NV.sub_(moved_NV).sum(-1).clamp(min=0)
    reverse_NV = torch.mul(p_base_NV, difference_NV, out=term_NV).sub_(moved_NV)
    token["reverse_kl_nats"] = -reverse_NV.sum(-1).clamp(max=0)
    token["total_variation"] = moved_NV.abs_().sum(-1) / 2
    token |= _mixed(base, tuned, spare_NV=(term_NV, moved_NV))
    token["js_nats"] = token["js_nats"].minimum((token["kl_nats"] + token["reverse_kl_nats"]) / 4)
    return Measures(token, favoured, vocabulary)


def _mixed(base: Side, tuned: Side, *, spare_NV: tuple[Any, Any]) -> dict[str, Any]:
    """Entropies, and JS = ½ Σ (p_b ln p_b + p_t ln p_t − s ln s + s ln 2) with s = p_b + p_t; `spare_NV` is overwritten."""
    both_NV, other_NV = spare_NV
    excess_NV = base.probability_NV * base.logprobs()
    base_entropy_N = -excess_NV.sum(-1)
    torch.mul(tuned.probability_NV, tuned.logprobs(), out=other_NV)
    tuned_entropy_N = -other_NV.sum(-1)
    excess_NV += other_NV
    torch.add(base.probability_NV, tuned.probability_NV, out=both_NV)
    log_(torch.clamp(both_NV, min=TINY, out=other_NV))
    excess_NV.addcmul_(both_NV, other_NV, value=-1)
    return {
        "base_entropy_nats": base_entropy_N,
        "tuned_entropy_nats": tuned_entropy_N,
        "js_nats": ((excess_NV.sum(-1) + log(2) * both_NV.sum(-1)) / 2).clamp(min=0),
    }


def _at(value_NV: Any, index_N: Any) -> Any:
    return value_NV.gather(1, index_N[:, None])[:, 0]
