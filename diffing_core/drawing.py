"""Drawing tokens by numbers that are fixed in advance, so that no random generator is shared between texts.

Shapes: B rows, V vocabulary.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from diffing_core.lazy import torch


def entropy_of(*identity: str | float | bool | None) -> int:
    """256 bits that depend on these values alone."""
    return int.from_bytes(hashlib.sha256(json.dumps(identity).encode()).digest(), "big")


def uniforms(entropies: Sequence[int], n: int) -> np.ndarray:
    """One uniform number per row and token, [B, n]; a larger n only adds columns."""
    return np.stack([np.random.default_rng(entropy).random(n) for entropy in entropies])


def drawn(probability_BV: Any, uniform_B: Any, top_p: float = 1.0) -> Any:
    """The uniform's quantile of each row's distribution, int64 [B]: the first token whose cumulated share exceeds it.

    Rows need not sum to 1. With `top_p` below 1, of the likeliest tokens of that mass, the likeliest first.
    """
    order_BV = None
    if top_p < 1:
        probability_BV, order_BV = nucleus(probability_BV, top_p)
    cumulated_BV = probability_BV.cumsum(-1, dtype=torch.float64)
    target_B1 = uniform_B[:, None] * cumulated_BV[:, -1:]
    drawn_B1 = torch.searchsorted(cumulated_BV, target_B1, right=True).clamp(max=probability_BV.shape[1] - 1)
    return (drawn_B1 if order_BV is None else order_BV.gather(1, drawn_B1))[:, 0]


def nucleus(probability_BV: Any, top_p: float) -> tuple[Any, Any]:
    """(probabilities, tokens) [B, V], the likeliest first; 0 behind the mass `top_p`. Rows sum to 1."""
    sorted_BV, order_BV = probability_BV.sort(dim=-1, descending=True, stable=True)
    before_BV = sorted_BV.cumsum(-1, dtype=torch.float64) - sorted_BV
    return sorted_BV.where(before_BV < top_p, 0.0), order_BV
