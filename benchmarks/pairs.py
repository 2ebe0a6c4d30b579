"""Random-weight models of a given size with LoRA adapters: what they compute is noise, what it costs is not."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.figure import Clock, cpu_s
from diffing_core.corpus import ProbeCorpus, ProbeSequence, TokenBatch
from diffing_core.lora_forward import add_in_place
from diffing_core.models import ModelPair
from diffing_core.pairs import Pair
from diffing_core.subject import Subject


def cohort(
    n_tuned: int, *, d_model: int, n_layers: int, vocabulary: int, head_dim: int = 64, on: Mapping[str, Any] | None = None
) -> list[ModelPair]:
    """Pairs of one Qwen3-shaped base, adapters of rank 16 on all projections of one resident copy.

    `on`: device and dtype; the processor's float32 if not given.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    n_heads = d_model // head_dim
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=d_model, intermediate_size=3 * d_model, num_hidden_layers=n_layers,
        num_attention_heads=n_heads, num_key_value_heads=n_heads // 2, head_dim=head_dim, tie_word_embeddings=True,
    )  # fmt: skip
    lora = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    names = [f"tuned_{index}" for index in range(n_tuned)]
    module = get_peft_model(Qwen3ForCausalLM(config), lora, adapter_name=names[0])
    for name in names[1:]:
        module.add_adapter(name, lora)
    module.to(**on or {})
    for name in names:
        add_in_place(module, name)
    base = Subject.of(module, None, "base")
    tuned = [Subject.of(module, name, name) for name in names]
    return [
        ModelPair(base, side, Decoder(vocabulary), Pair("bench", name), vocabulary, name)
        for side, name in zip(tuned, names, strict=True)
    ]


def corpus(n_tokens: int, *, vocabulary: int, length: int = 128) -> ProbeCorpus:
    """Random tokens in sequences of one length."""
    draw = np.random.default_rng(0)
    sequences = tuple(
        ProbeSequence(draw.integers(0, vocabulary, length).astype(np.int32), np.zeros(length, np.int8), np.zeros(length, bool))
        for _ in range(n_tokens // length)
    )
    return ProbeCorpus("bench", sequences, len(sequences))


class Decoder:
    """Stands for a tokenizer: names tokens, nothing more."""

    all_special_ids: tuple[int, ...] = ()

    def __init__(self, vocabulary: int) -> None:
        self._names = [f" w{index}" for index in range(vocabulary)]

    def batch_decode(self, ids: list[list[int]]) -> list[str]:
        """One name per token."""
        return [self._names[token] for [token] in ids]


def bare_forwards(pair: ModelPair, batches: Iterable[TokenBatch]) -> None:
    """The floor: both models' plain forwards as Hugging Face and PEFT run them, logits included and thrown away.

    Within `stock_peft`, whose adapter is on.
    """
    import torch

    model = pair.tuned.module.get_base_model()
    with torch.inference_mode():
        for batch in batches:
            token_BT, mask_BT = (torch.from_numpy(each).to(pair.base.device) for each in (batch.token_BT, batch.mask_BT))
            with pair.tuned.module.disable_adapter():
                model(input_ids=token_BT, attention_mask=mask_BT, use_cache=False)
            model(input_ids=token_BT, attention_mask=mask_BT, use_cache=False)


@contextmanager
def stock_peft(pair: ModelPair) -> Iterator[None]:
    """The finetune as PEFT loads it while it lasts: its adapter on, LoRA layers with PEFT's own forward.

    The floor is what a user would run without us.
    """
    layers = [layer for layer in pair.tuned.module.modules() if getattr(layer, "lora_variant", None)]
    ours = [dict(layer.lora_variant) for layer in layers]
    for layer in layers:
        layer.lora_variant.clear()
    try:
        with pair.tuned.active():
            yield
    finally:
        for layer, variants in zip(layers, ours, strict=True):
            layer.lora_variant.update(variants)


@dataclass(frozen=True)
class WithFloor(ProbeCorpus):
    """A corpus that runs the floor on each batch before it gives it away, and keeps the time.

    Pass and floor thus take turns within seconds, and a machine whose speed drifts slows both alike.
    """

    pair: ModelPair | None = None
    clock: Clock = cpu_s
    floor_s: list[float] = field(default_factory=list)

    def batches(self, token_budget: int) -> Iterator[TokenBatch]:
        """The corpus's batches."""
        for batch in super().batches(token_budget):
            with stock_peft(self.pair):
                self.floor_s.append(self.clock(lambda: bare_forwards(self.pair, [batch])))  # noqa: B023 - called at once
            yield batch
