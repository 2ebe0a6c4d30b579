"""A subject: one state of a model that one can run and look into.

Shapes: B sequences, T positions, N states, D model width, V vocabulary. Sequences are padded on the right.
"""

import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from diffing_core.adapters import is_wrapped, switched
from diffing_core.architecture import Layout, hidden_of, layout_of
from diffing_core.errors import ModelLoadError
from diffing_core.lazy import torch
from diffing_core.serving import Served

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_READOUT_TOLERANCE = 1e-3  # the two ways run the same operations, so float32 and bfloat16 both agree far better


@dataclass(frozen=True)
class Subject:
    """One model state that one can run: a resident module with at most one of its adapters on.

    `revision` identifies the weights: content hash or hub commit, `+` adapter hash. `stop_ids` are tokens that
    end its answers, beside those that tokenizer and checkpoint name. `served` is the server that writes its texts;
    None: the module here does. `template_options` are what its registry entry gives the chat template.
    """

    module: Any
    adapter: str | None = None
    revision: str = ""
    stop_ids: tuple[int, ...] = ()
    served: Served | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @classmethod
    def of(
        cls, module: Any, adapter: str | None = None, revision: str = "", stop_ids: tuple[int, ...] = ()
    ) -> "Subject":
        """Wraps a module that is already built, checks its layout, and sets it to evaluation without gradients.

        Raises:
            ModelLoadError: unknown layout, or `readout` disagrees with the model's own logits.
        """
        subject = cls(module.eval().requires_grad_(False), adapter, revision, stop_ids)
        _check_readout(subject)
        return subject

    def active(self) -> AbstractContextManager["PreTrainedModel"]:
        """Context with the plain Hugging Face model, exactly this subject's adapter (or none) switched on."""
        return switched(self.module, self.adapter)

    def local(self) -> "Subject":
        """The same, but all its texts are written anew by the module here: for who hooks it or edits its weights."""
        return replace(self, served=None)

    @functools.cached_property
    def written(self) -> dict[Any, list[int]]:
        """Answers as token ids, by what was asked and how: a base writes once for all its finetunes and methods.

        They are those of the module as it was: whoever changes it in place asks `local()`.
        """
        return {}

    @property
    def plain(self) -> "PreTrainedModel":
        """The Hugging Face model without its PEFT wrapper, whatever adapter is on."""
        return self.module.get_base_model() if is_wrapped(self.module) else self.module

    @functools.cached_property
    def layout(self) -> Layout:
        """Blocks, final norm and head."""
        return layout_of(self.plain)

    @property
    def blocks(self) -> list[Any]:
        """Decoder blocks in order; the output of block i is the residual stream after layer i."""
        return self.layout.blocks

    @property
    def n_layers(self) -> int:
        """Number of decoder blocks."""
        return len(self.layout.blocks)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.plain.config.get_text_config().hidden_size

    @property
    def vocab_size(self) -> int:
        """Rows of the head, padding rows included."""
        return self.layout.head.weight.shape[0]

    @property
    def dtype(self) -> Any:
        """Number format of the weights."""
        return self.plain.dtype

    @property
    def device(self) -> Any:
        """Where the weights lie."""
        return self.plain.device

    def backbone(self, token_BT: Any, mask_BT: Any) -> Any:
        """States [B, T, D] after the final norm; the head is not run, so no logits are materialised."""
        with self.active() as model:
            return model.base_model(input_ids=token_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state

    def normed(self, residual_ND: Any) -> Any:
        """The final norm of residual states [N, D]."""
        with self._readout_active():
            return self.layout.norm(residual_ND)

    def unembed(self, vector_ND: Any) -> Any:
        """The head alone [N, V]: no norm, no soft cap, no scale."""
        with self._readout_active():
            return self.layout.head(vector_ND)

    def logits(self, normed_ND: Any) -> Any:
        """The model's logits [N, V], in its own dtype, of states after the final norm (see `backbone`)."""
        return self.layout.finish(self.unembed(normed_ND))

    def readout(self, residual_ND: Any) -> Any:
        """The model's logits [N, V] if these residual states [N, D] were the last layer's (the logit lens)."""
        return self.logits(self.normed(residual_ND))

    def shares_readout_with(self, other: "Subject") -> bool:
        """Whether norm and head are the very same modules, and no adapter changes either of them."""
        ours, theirs = (side.layout for side in (self, other))
        same = ours.norm is theirs.norm and ours.head is theirs.head
        return same and not self._readout_is_adapted()

    def lens_of_difference(self, delta_ND: Any) -> Any:
        """Head of directions [N, D] -> [N, V]: linear, biases dropped, norm's gain applied, in the model's dtype."""
        with self._readout_active():
            vector_ND = self.layout.norm_jacobian(delta_ND.to(self.device, self.dtype))
            return self.layout.head(vector_ND) - self.layout.head(torch.zeros_like(vector_ND[..., :1, :]))

    def _readout_active(self) -> AbstractContextManager[Any]:
        """Readouts come block by block: adapters are switched (milliseconds) only if norm or head has one."""
        return self.active() if self._readout_is_adapted() else nullcontext()

    def _readout_is_adapted(self) -> bool:
        return any(hasattr(part, "enable_adapters") for part in (self.layout.norm, self.layout.head))


def _check_readout(subject: Subject) -> None:
    """The last block's output, read out, must give the model's own logits on four tokens."""
    token_BT = (torch.arange(4, device=subject.device) % subject.vocab_size)[None]
    caught: list[Any] = []
    hook = subject.blocks[-1].register_forward_hook(lambda _module, _inputs, output: caught.append(hidden_of(output)))
    try:
        with subject.active() as model:
            own_BTV = model(input_ids=token_BT, attention_mask=torch.ones_like(token_BT), use_cache=False).logits
    finally:
        hook.remove()
    name = type(subject.plain).__name__
    if not torch.isfinite(own_BTV).all():
        raise ModelLoadError(
            f"{name} (revision {subject.revision or 'unknown'}) gives NaN or infinite logits in {subject.dtype}; "
            "choose another dtype in the registry entry, for example bfloat16 or float32"
        )
    error = (subject.readout(caught[0]) - own_BTV).abs().max() / own_BTV.abs().max().clamp_min(1e-6)
    if error > _READOUT_TOLERANCE:
        raise ModelLoadError(
            f"{name}: final norm and head of the last block's output differ from the model's own logits by "
            f"{error.item():.2g} of their size; the model does something in between that diffing_core/architecture.py "
            "does not know. Add it to Layout.finish"
        )
