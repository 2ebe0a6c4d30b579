"""Changing the residual stream while a model runs: steering adds to it, causal tests take parts of it away.

A plain forward hook, as in capture.py: it costs nothing where nothing is changed, and works inside of `generate`.

Shapes: B sequences, T positions, D model width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from diffing_core.architecture import hidden_of
from diffing_core.subject import Subject


@contextmanager
def edited_residual(subject: Subject, layer: int, edit: Callable[[Any], Any]) -> Iterator[None]:
    """While the block lasts, block `layer` gives edit(hidden [B, T, D]) of the same shape instead of its own output.

    During generation T is 1 after the prompt. Texts written meanwhile must be asked of `subject.local()`.
    """

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        hidden_BTD = edit(hidden_of(output))
        return (hidden_BTD, *output[1:]) if isinstance(output, tuple) else hidden_BTD

    handle = subject.blocks[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
