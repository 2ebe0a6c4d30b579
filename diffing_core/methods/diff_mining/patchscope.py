"""A prompt whose last token is replaced, in the middle of the network, by states from elsewhere.

Suffixes: R states, D width, B batch, T prompt tokens, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffing_core.architecture import hidden_of
from diffing_core.errors import NotComputableError
from diffing_core.lazy import torch
from diffing_core.subject import Subject

PROMPTS_TOGETHER = 64


class PatchedPrompt:
    """One prompt, and the block after which its last token's state is exchanged."""

    def __init__(self, tokenizer: Any, prompt: str, layer: int) -> None:
        self._token_T = tokenizer(prompt)["input_ids"]
        self._layer = layer
        if not self._token_T:
            raise NotComputableError(
                f"the tokenizer makes no token of patchscope_prompt {prompt!r}; give one of words it knows"
            )

    def logits(self, subject: Subject, residual_RD: Any) -> Any:
        """The model's logits at the prompt's last token, once for each state put there, [R, V]."""
        return torch.cat([self._read(subject, each_BD) for each_BD in residual_RD.split(PROMPTS_TOGETHER)])

    def _read(self, subject: Subject, residual_BD: Any) -> Any:
        token_BT = torch.tensor(self._token_T, device=subject.device).expand(len(residual_BD), -1)
        with _last_token_replaced(subject.blocks[self._layer], residual_BD):
            return subject.logits(subject.backbone(token_BT, torch.ones_like(token_BT))[:, -1])


@contextmanager
def _last_token_replaced(block: Any, residual_BD: Any) -> Iterator[None]:
    def put(_module: Any, _inputs: Any, output: Any) -> None:
        hidden_of(output)[:, -1] = residual_BD

    handle = block.register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()
