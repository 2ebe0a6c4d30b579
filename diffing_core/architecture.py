"""Where decoder blocks, final norm and head sit in a language model, and how states become logits.

Everything else asks here, so a new architecture is one line in `_LAYOUTS`, and a layout that this file
gets wrong is found at load, where `Subject.of` compares the readout with the model's own logits.
Shapes: B sequences, T positions, N states, D model width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

from diffing_core.errors import ModelLoadError
from diffing_core.lazy import torch

_LAYOUTS = (  # decoder blocks, final norm
    ("model.layers", "model.norm"),  # Llama, Qwen, Gemma, Mistral, OLMo, Cohere, Granite, Phi-3
    ("model.language_model.layers", "model.language_model.norm"),  # Gemma-3, Qwen-VL and other multimodal models
    ("model.layers", "model.final_layernorm"),  # Phi-1, Phi-2, StableLM-like
    ("transformer.h", "transformer.ln_f"),  # GPT-2, GPT-Neo, GPT-J, Falcon, Bloom
    ("gpt_neox.layers", "gpt_neox.final_layer_norm"),  # GPT-NeoX, Pythia
    ("model.decoder.layers", "model.decoder.final_layer_norm"),  # OPT
)
_PROBE_SCALE = 1024.0  # large beside any norm's epsilon, and exact in every float format


@dataclass(frozen=True)
class Layout:
    """The parts of one plain causal language model."""

    blocks: list[Any]
    norm: Any
    head: Any
    softcap: float | None = None
    multiplier: float = 1.0
    divisor: float = 1.0

    def finish(self, raw_NV: Any) -> Any:
        """From the head's output to the model's logits: Cohere's factor, Granite's divisor, Gemma's soft cap."""
        if self.multiplier != 1.0:
            raw_NV = raw_NV * self.multiplier
        if self.divisor != 1.0:
            raw_NV = raw_NV / self.divisor
        if self.softcap is not None:
            raw_NV = torch.tanh(raw_NV / self.softcap) * self.softcap
        return raw_NV

    def norm_jacobian(self, delta_ND: Any) -> Any:
        """What the final norm does to a direction: times gain, and minus its mean if the norm centres.

        Gain and centring are read off the norm by three probes (zero, a constant, alternating signs), so
        RMSNorm with weight g or 1 + g, LayerNorm and Cohere's variant need no case each.
        """
        ones_D = torch.ones(delta_ND.shape[-1], dtype=delta_ND.dtype, device=delta_ND.device)
        signs_D = ones_D.clone()
        signs_D[1::2] = -1
        bias_D = self.norm(torch.zeros_like(ones_D))
        gain_D = (self.norm(_PROBE_SCALE * signs_D) - bias_D) * signs_D
        of_constant_D = self.norm(_PROBE_SCALE * ones_D) - bias_D
        centres = of_constant_D.abs().max() < 1e-3 * gain_D.abs().max()
        return gain_D * (delta_ND - delta_ND.mean(-1, keepdim=True) if centres else delta_ND)


def layout_of(model: Any) -> Layout:
    """Finds the parts of a plain (not PEFT-wrapped) causal language model.

    Raises:
        ModelLoadError: the class is laid out in a way this file does not know.
    """
    head = model.get_output_embeddings()
    for blocks_path, norm_path in _LAYOUTS:
        blocks, norm = _descend(model, blocks_path), _descend(model, norm_path)
        if head is not None and blocks is not None and norm is not None:
            config = model.config.get_text_config()
            return Layout(
                list(blocks),
                norm,
                head,
                softcap=getattr(config, "final_logit_softcapping", None),
                multiplier=getattr(config, "logit_scale", None) or 1.0,
                divisor=getattr(config, "logits_scaling", None) or 1.0,
            )
    found = [name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    raise ModelLoadError(
        f"{type(model).__name__} is laid out in an unknown way: module lists at {found or 'no path'}, children "
        f"{[name for name, _ in model.named_children()]}, head {type(head).__name__}; expected one of "
        f"{[blocks for blocks, _ in _LAYOUTS]}. Add a line to _LAYOUTS in diffing_core/architecture.py"
    )


def hidden_of(output: Any) -> Any:
    """The hidden state in a block's output, which is a plain tensor or, in some classes, a tuple."""
    return output[0] if isinstance(output, tuple) else output


def _descend(model: Any, path: str) -> Any:
    for name in path.split("."):
        model = getattr(model, name, None)
    return model
