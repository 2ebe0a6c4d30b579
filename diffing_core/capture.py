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


class Room:
    """Arrays for captured residuals, taken once and written over by every batch of a pass.

    On a processor the first touch of new arrays of this size costs more than the copy into them, and between the
    forward's own they keep the heap from being used again: 8 % of two forwards of GPT-2 small's size.
    """

    def __init__(self, n_rows: int) -> None:
        """`n_rows`: the most tokens of a batch."""
        self._n_rows = n_rows
        self._arrays: dict[tuple[int, int], Any] = {}

    def of(self, subject: Subject, layer: int, hidden_XD: Any, n_rows: int) -> Any:
        """[N, D] for the subject's residuals at a layer, of the dtype and on the device of `hidden_XD`."""
        key = id(subject), layer
        if key not in self._arrays:
            self._arrays[key] = hidden_XD.new_empty(self._n_rows, hidden_XD.shape[-1])
        return self._arrays[key][:n_rows]


class _EndOfForward(Exception):  # noqa: N818 - not an error: it ends a forward whose rest nobody reads
    """Raised by the hook on the last asked block."""


def capture_residuals(
    subject: Subject, batch: TokenBatch, layers: Sequence[int], place_N: np.ndarray | None = None, room: Room | None = None
) -> dict[int, Any]:
    """Outputs of the asked blocks, {layer: [N, D]} in the model's dtype. The forward ends after the last asked block.

    Args:
        place_N: the tokens to read, as indices into the flattened batch; all valid ones, row by row, if not given.
        room: where to put them, over what the last call with it put there; new arrays if not given.
    """
    if not layers:
        return {}
    token_BT = torch.from_numpy(batch.token_BT).to(subject.device)
    mask_BT = torch.from_numpy(batch.mask_BT).to(subject.device)
    wanted = np.flatnonzero(batch.mask_BT) if place_N is None else place_N
    wanted_N = torch.from_numpy(wanted).to(subject.device)
    captured: dict[int, Any] = {}
    last = max(layers)

    def keep(layer: int) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            hidden_XD = hidden_of(output).flatten(0, 1)
            out = None if room is None else room.of(subject, layer, hidden_XD, len(wanted))
            captured[layer] = torch.index_select(hidden_XD, 0, wanted_N, out=out)
            if layer == last:
                raise _EndOfForward

        return hook

    handles = [subject.blocks[layer].register_forward_hook(keep(layer)) for layer in layers]
    try:
        subject.backbone(token_BT, mask_BT)
    except _EndOfForward:
        return captured
    finally:
        for handle in handles:
            handle.remove()
    return captured
