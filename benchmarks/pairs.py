"""Random-weight models of a given size with LoRA adapters: what they compute is noise, what it costs is not."""

from typing import Any

import numpy as np

from diffing_core.corpus import ProbeCorpus, ProbeSequence
from diffing_core.lora_forward import add_in_place
from diffing_core.models import ModelPair
from diffing_core.pairs import Pair
from diffing_core.subject import Subject


def cohort(n_tuned: int, *, d_model: int, n_layers: int, vocabulary: int, rank: int = 16) -> list[ModelPair]:
    """Pairs of one Qwen3-shaped base, adapters on all projections of one resident copy."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=d_model, intermediate_size=3 * d_model, num_hidden_layers=n_layers,
        num_attention_heads=d_model // 64, num_key_value_heads=d_model // 128, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", init_lora_weights=False)
    names = [f"tuned_{index}" for index in range(n_tuned)]
    module = get_peft_model(Qwen3ForCausalLM(config), lora, adapter_name=names[0])
    for name in names[1:]:
        module.add_adapter(name, lora)
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


def bare_forwards(pair: ModelPair, probe: ProbeCorpus, tokens_per_batch: int) -> Any:
    """The floor: both models' plain forwards over the same batches, logits included and thrown away."""
    import torch

    with torch.inference_mode():
        for batch in probe.batches(tokens_per_batch):
            token_BT, mask_BT = torch.from_numpy(batch.token_BT), torch.from_numpy(batch.mask_BT)
            for side in (pair.base, pair.tuned):
                with side.active() as model:
                    model(input_ids=token_BT, attention_mask=mask_BT, use_cache=False)
