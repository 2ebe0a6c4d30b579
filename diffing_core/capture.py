"""Reading the residual stream: the one place that hooks into a model's forward.

Plain forward hooks, because they cost least and are bit-equal to the alternatives;
interventions go through nnsight.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from diffing_core.architecture import hidden_of
from diffing_core.corpus import TokenBatch
from diffing_core.lazy import torch
from diffing_core.models import Subject


class _EndOfForward(Exception):  # noqa: N818 - not an error: it ends a forward whose rest nobody reads
    """Raised by the hook on the last asked block."""


def capture_residuals(subject: Subject, batch: TokenBatch, layers: Sequence[int]) -> dict[int, Any]:
    """Outputs of the asked blocks at the valid tokens, {layer: [N, D]} in the model's dtype.

    Rows follow the batch row by row. The forward ends after the last asked block.
    """
    if not layers:
        return {}
    token_BT = torch.from_numpy(batch.token_BT).to(subject.device)
    mask_BT = torch.from_numpy(batch.mask_BT).to(subject.device)
    valid_N = torch.from_numpy(np.flatnonzero(batch.mask_BT)).to(subject.device)
    captured: dict[int, Any] = {}
    last = max(layers)
    handles = [
        subject.blocks[layer].register_forward_hook(_keep(captured, layer, valid_N, ends=layer == last))
        for layer in layers
    ]
    try:
        subject.backbone(token_BT, mask_BT)
    except _EndOfForward:
        return captured
    finally:
        for handle in handles:
            handle.remove()
    return captured


def _keep(captured: dict[int, Any], layer: int, valid_N: Any, *, ends: bool) -> Callable[..., None]:
    def hook(_module: Any, _inputs: Any, output: Any) -> None:
        captured[layer] = hidden_of(output).flatten(0, 1).index_select(0, valid_N)
        if ends:
            raise _EndOfForward

    return hook
