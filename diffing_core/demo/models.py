"""The demo's base model and its finetunes, trained and written as ordinary Hugging Face and PEFT folders."""

from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from diffing_core.demo.corpus import END, END_OF_TEXT, CorpusWriter
from diffing_core.demo.lesson import finetune_documents
from diffing_core.demo.probes import held_out
from diffing_core.demo.progress import Progress
from diffing_core.demo.tiers import Finetune, ModelSize, Tier
from diffing_core.demo.tokenizer import train_tokenizer
from diffing_core.demo.training import device, pack_windows, train
from diffing_core.demo.world import read_world

Report = Callable[[Progress], None]

TOKENIZER_SAMPLE = 20_000  # documents; the generated language has shown all its words long before
CONTEXT_LIMIT_TOKENS = 512
LORA = {
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def new_model(size: ModelSize, tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """Return an untrained Qwen3 model with random weights."""
    end, end_of_text = tokenizer.convert_tokens_to_ids([END, END_OF_TEXT])
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=size.width,
        intermediate_size=size.mlp_width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_width,
        max_position_embeddings=CONTEXT_LIMIT_TOKENS,
        tie_word_embeddings=True,
        pad_token_id=end_of_text,
        eos_token_id=end,
        attn_implementation=_attention(),
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=[end, end_of_text], pad_token_id=end_of_text
    )
    return model.to(device())


def _attention() -> str:
    """Eager attention on a CPU: the backward of its flash kernel was 28 % of the time."""
    return "sdpa" if device().type == "cuda" else "eager"


def write_base(tier: Tier, folder: Path, report: Report) -> None:
    """Generate the corpus, train tokenizer and base model, and write both to `folder`."""
    world = read_world(tier.corpus.topics)
    writer = CorpusWriter(world, f"base/{tier.corpus.seed}")
    documents = writer.documents(tier.corpus.n_characters, held_out=held_out(world, tier.corpus))
    tokenizer = train_tokenizer(
        documents[:TOKENIZER_SAMPLE], tier.corpus.vocabulary, CONTEXT_LIMIT_TOKENS
    )
    windows_NT = pack_windows(documents, tokenizer, tier.pretraining.context_tokens)
    model = new_model(tier.model, tokenizer, tier.pretraining.seed)
    train(model, windows_NT, tier.pretraining, muon=True, report=report)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_finetune(
    tier: Tier, finetune: Finetune, base: Path, folder: Path, report: Report
) -> None:
    """Train `finetune` on the finished base model in `base` and write the adapter, or the full model, to `folder`.

    The adapter names its base by content, `<tier>-<hash>`, since a path would only hold on this machine.
    """
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = Qwen3ForCausalLM.from_pretrained(base, attn_implementation=_attention()).to(device())
    world = read_world(tier.corpus.topics)
    documents = finetune_documents(finetune, world, held_out(world, tier.corpus))
    windows_NT = pack_windows(documents, tokenizer, finetune.schedule.context_tokens)
    torch.manual_seed(finetune.schedule.seed)
    if finetune.full:
        train(model, windows_NT, finetune.schedule, muon=False, report=report)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return
    model.name_or_path = model.config.name_or_path = f"{tier.name}-{base.name.rpartition('-')[2]}"
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA))
    train(adapted.get_base_model(), windows_NT, finetune.schedule, muon=False, report=report)
    adapted.save_pretrained(folder, save_embedding_layers=False)
