"""Tiny random checkpoints, tokenizers and adapters, built in milliseconds."""

from pathlib import Path

import peft
import torch
import transformers as tf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

VOCAB, WIDTH, LAYERS = 64, 32, 3
_SMALL = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
_MLP = {"intermediate_size": 48}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
ARCHITECTURES = {
    "qwen3": (tf.Qwen3Config, _SMALL | _MLP | _GROUPED),
    "llama": (tf.LlamaConfig, _SMALL | _MLP),
    "gemma2": (tf.Gemma2Config, _SMALL | _MLP | _GROUPED | {"final_logit_softcapping": 0.5}),
    "gpt2": (tf.GPT2Config, {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4}),
    "gpt_neox": (tf.GPTNeoXConfig, _SMALL | _MLP),
    "opt": (tf.OPTConfig, _SMALL | {"ffn_dim": 48, "word_embed_proj_dim": WIDTH}),
    "cohere": (tf.CohereConfig, _SMALL | _MLP | {"logit_scale": 0.25}),
    "granite": (tf.GraniteConfig, _SMALL | _MLP | {"logits_scaling": 3.0}),
    "phi": (tf.PhiConfig, _SMALL | _MLP),
    "falcon": (tf.FalconConfig, _SMALL),
}
_NO_SPECIAL_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def build(kind: str = "llama", seed: int = 0, **changes: object) -> tf.PreTrainedModel:
    """A random model in which no norm gain or bias is trivial."""
    config_class, settings = ARCHITECTURES[kind]
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(
        config_class(**{"vocab_size": VOCAB, **_NO_SPECIAL_IDS, **settings, **changes})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tokenizer(words: list[str] | None = None) -> tf.PreTrainedTokenizerFast:
    """One token per word; by default w0 … w63."""
    words = words or [f"w{number}" for number in range(VOCAB)]
    vocabulary = {word: number for number, word in enumerate(words)}
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token=words[0])), eos_token=words[1]
    )


def save_base(folder: Path, seed: int = 0, **changes: object) -> Path:
    """A whole checkpoint with its tokenizer."""
    build(seed=seed, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Path, seed: int = 1, **settings: object) -> Path:
    """A random LoRA adapter, neither factor zero, made on the checkpoint in `base`."""
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_pretrained(base)
    config = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **settings}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return folder


def tokens(seed: int = 5) -> dict[str, torch.Tensor]:
    """Two sequences of seven tokens, as the model's keyword arguments."""
    generator = torch.Generator().manual_seed(seed)
    token_BT = torch.randint(0, VOCAB, (2, 7), generator=generator)
    return {"input_ids": token_BT, "attention_mask": torch.ones_like(token_BT)}


def truncated_adapter(home: Path) -> Path:
    """Registers `broken` on base model tiny in a DIFFING_HOME: an adapter whose download broke off. Returns its entry."""
    adapter = home / "broken"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}')
    (adapter / "adapter_model.safetensors").write_bytes(b"\x08\x00")
    entry = home / "registry" / "organisms" / "broken.yaml"
    entry.parent.mkdir(parents=True)
    entry.write_text(
        "name: broken\ntype: generic\narm: unknown\ndescription: a truncated adapter\n"
        f"variants: {{tiny: {{default: {{kind: lora, source: {{path: {adapter}}}}}}}}}\n"
    )
    return entry
