"""The threshold θ that replaces BatchTopK once training is over.

The published running mean of the smallest kept score only begins after 1000 steps, so that short runs end without a
threshold (an L0 of 761 in place of 16 was seen). Here θ is the quantile of scores at which k latents are active per
token on average, over a sample of tokens.

Suffixes: N tokens, F latents.
"""

from collections.abc import Iterable

from diffing_core.lazy import torch
from diffing_core.methods.crosscoder.model import Crosscoder, Pair

SPARE = 4  # a batch may hold this many times its share of the scores above θ


def calibrated_threshold(crosscoder: Crosscoder, batches: Iterable[Pair], k: float) -> float:
    """θ with mean L0 of k over these tokens, one activity at least; 0 where fewer than that are positive.

    Keeps the largest SPARE·k scores per token of each batch, so that memory does not grow with the number of latents.
    """
    kept = []
    n_tokens = 0
    cost_F = crosscoder.cost_F().detach()
    with torch.no_grad():
        for activation_MND in batches:
            score_NF = crosscoder.drive(crosscoder.scaled(activation_MND)).relu_() * cost_F
            n_tokens += len(score_NF)
            n_kept = min(max(2, round(SPARE * k * len(score_NF))), score_NF.numel())
            kept.append(score_NF.view(-1).topk(n_kept, sorted=False).values)
        score_X = torch.cat(kept)
        wanted = max(1, round(k * n_tokens))
        if wanted >= len(score_X):
            return 0.0
        return max(0.0, float(score_X.topk(wanted + 1).values[-1]))
