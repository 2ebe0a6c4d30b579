"""A LoRA layer's forward that adds the low-rank product in place: y += scale · (x Aᵀ) Bᵀ.

PEFT's own writes three arrays of the output's size per layer (the product, the scaled product, the sum),
which on small models costs more than the adapter's arithmetic. This enters through PEFT's own door for
variants of LoRA (the one DoRA uses) and leaves alone everything that is not plain: DoRA and other variants,
embeddings, convolutions, biases in B, adapters in another dtype than their base.

Shapes: N rows (every leading dimension), I inputs, O outputs, R rank.
"""

from typing import Any


def add_in_place(peft_model: Any, adapter: str) -> int:
    """Gives the adapter's plain linear layers the forward above; returns how many there are."""
    from peft.tuners.lora.layer import Linear

    variant = _variant()
    chosen = [layer for layer in peft_model.modules() if type(layer) is Linear and _is_plain(layer, adapter)]
    for layer in chosen:
        layer.lora_variant[adapter] = variant
    return len(chosen)


def _is_plain(layer: Any, adapter: str) -> bool:
    if adapter not in layer.lora_A or adapter in layer.lora_variant:
        return False
    weights = (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight)
    same_dtype = all(weight.dtype == layer.get_base_layer().weight.dtype for weight in weights)
    return same_dtype and layer.lora_B[adapter].bias is None


def _variant() -> Any:
    from peft.tuners.lora.layer import LoraVariant

    class InPlace(LoraVariant):
        """Plain LoRA, evaluated without dropout."""

        @staticmethod
        def merge_safe(module: Any, active_adapter: str, orig_weight: Any) -> Any:
            return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

        @staticmethod
        def merge_unsafe(module: Any, active_adapter: str, orig_weight: Any) -> None:
            orig_weight.data += module.get_delta_weight(active_adapter).to(orig_weight.dtype)

        @staticmethod
        def unmerge(module: Any, active_adapter: str, orig_weight: Any) -> Any:
            return orig_weight - module.get_delta_weight(active_adapter).to(orig_weight.dtype)

        @staticmethod
        def forward(module: Any, active_adapter: str, x: Any, result: Any, **_: Any) -> Any:
            down_RI = module.lora_A[active_adapter].weight
            up_OR = module.lora_B[active_adapter].weight
            low_NR = x.reshape(-1, x.shape[-1]) @ down_RI.T
            sum_NO = result.view(-1, result.shape[-1])
            sum_NO.addmm_(low_NR, up_OR.T, alpha=module.scaling[active_adapter])
            return result

    return InPlace()
