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


def measure(base: Side, tuned: Side, next_N: Any) -> Measures:
    """Divergences of the two sides' final predictions; where `next_N` is −1, delta_logprob means nothing.

    Divergences are within 1e-6 nats of their exact values, and exactly zero for equal inputs: rounding may put
    a sum of a non-negative quantity a hair below zero, and JS above a quarter of the symmetrised KL, which bounds
    it (Lin 1991, theorem 3).
    """
    base_NV, tuned_NV = base.logprobs(), tuned.logprobs()
    p_base_NV, p_tuned_NV = base.probability_NV, tuned.probability_NV
    difference_NV = tuned_NV - base_NV
    term_NV = p_tuned_NV * difference_NV
    gained_N, lost_N = argmax(term_NV), argmin(term_NV)
    kl_N = term_NV.sum(-1).clamp(min=0)
    reverse_kl_N = -torch.linalg.vecdot(p_base_NV, difference_NV).clamp(max=0)
    token = {
        "kl_nats": kl_N,
        "reverse_kl_nats": reverse_kl_N,
        "delta_logprob": _at(difference_NV, next_N.clamp(min=0)),
        "gained_nats": _at(term_NV, gained_N).clamp(min=0),
        "lost_nats": _at(term_NV, lost_N).clamp(max=0),
    }
    favoured = {"base": argmax(base_NV), "tuned": argmax(tuned_NV), "gained": gained_N, "lost": lost_N}
    vocabulary = {"contribution": term_NV.sum(0), "base": p_base_NV.sum(0), "tuned": p_tuned_NV.sum(0)}
    token["total_variation"] = torch.sub(p_tuned_NV, p_base_NV, out=difference_NV).abs_().sum(-1) / 2
    token |= _mixed(base, tuned, spare_NV=(term_NV, difference_NV))
    token["js_nats"] = token["js_nats"].minimum((kl_N + reverse_kl_N) / 4)
    return Measures(token, favoured, vocabulary)


def _mixed(base: Side, tuned: Side, *, spare_NV: tuple[Any, Any]) -> dict[str, Any]:
    """Entropies, and JS = ln 2 + ½ Σ (p_b ln p_b + p_t ln p_t − s ln s) with s = p_b + p_t; `spare_NV` is overwritten."""
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
        "js_nats": (excess_NV.sum(-1) / 2 + log(2)).clamp(min=0),
    }


def _at(value_NV: Any, index_N: Any) -> Any:
    return value_NV.gather(1, index_N[:, None])[:, 0]
