"""Functions over large tensors that NumPy computes two to ten times faster than torch on a processor.

On any other device they are torch's own. Accuracy on a processor: exp within 2e-7 relative, log within 1e-7
absolute for probabilities. Tensors are float32 and contiguous.
"""

from typing import Any

import numpy as np

from diffing_core.lazy import torch


def exp(value: Any) -> Any:
    """eˣ of every element, as a new tensor."""
    return torch.from_numpy(np.exp(value.numpy())) if _on_processor(value) else value.exp()


def log(value: Any, *, out: Any) -> Any:
    """ln x of every element, put in `out`."""
    if not _on_processor(value):
        return torch.log(value, out=out)
    np.log(value.numpy(), out=out.numpy())
    return out


def argmax(value_NV: Any) -> Any:
    """Index of the largest value of each row, int64 [N]; the first of equal ones."""
    return torch.from_numpy(value_NV.numpy().argmax(-1)) if _on_processor(value_NV) else value_NV.argmax(-1)


def argmin(value_NV: Any) -> Any:
    """Index of the smallest value of each row, int64 [N]; the first of equal ones."""
    return torch.from_numpy(value_NV.numpy().argmin(-1)) if _on_processor(value_NV) else value_NV.argmin(-1)


def dot(one_NV: Any, other_NV: Any) -> Any:
    """Dot products of rows, float32 [N]. On a processor nothing of shape [N, V] is made."""
    if not _on_processor(one_NV):
        return torch.linalg.vecdot(one_NV, other_NV)
    return torch.from_numpy(np.vecdot(one_NV.numpy(), other_NV.numpy()))


def _on_processor(value: Any) -> bool:
    return value.device.type == "cpu"
