"""One training loop for the base model and every finetune, deterministic by seed on one thread.

Shapes: N windows, B batch, T positions, D model width, V vocabulary. Documents are packed end to end into windows of
T + 1 tokens, the last one being the target of the T-th. Matrices of a base model are trained by Muon (RMS-matched
updates), everything else by AdamW; finetunes by AdamW alone. The loss is the mean cross entropy in nats per token.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from diffing_core.demo.corpus import END_OF_TEXT
from diffing_core.demo.progress import Progress
from diffing_core.demo.tiers import Schedule

LOSS_CHUNK_TOKENS = (
    512  # logits of so many tokens stay in the CPU's cache: a quarter less time than all at once
)
ENCODED_AT_ONCE = 10_000  # documents; an encoding takes far more memory than its ids
FINAL_LEARNING_RATE_SHARE = 0.05
REPORT_EVERY_S = 2.0


def device() -> torch.device:
    """Return the GPU when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def half_precision() -> AbstractContextManager[None]:
    """Return a bfloat16 autocast where the hardware computes in it, else one that does nothing."""
    place = device().type
    native = place == "cuda" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.autocast(place, torch.bfloat16, enabled=native)


def pack_windows(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerFast, context_tokens: int
) -> Tensor:
    """Return `documents` joined and cut into windows, int64 [N, T + 1]; a last incomplete window is dropped."""
    pieces = []
    for start in range(0, len(documents), ENCODED_AT_ONCE):
        ended = [document + END_OF_TEXT for document in documents[start : start + ENCODED_AT_ONCE]]
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(ended)
        pieces += [torch.tensor(encoding.ids) for encoding in encodings]
    ids = torch.cat(pieces)
    width = context_tokens + 1
    return ids[: len(ids) // width * width].view(-1, width)


def optimizers(model: nn.Module, schedule: Schedule, *, muon: bool) -> list[Optimizer]:
    """Return the optimizers of the trainable parameters; with `muon`, matrices but the embedding go to Muon."""
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    matrices = [
        weight for name, weight in trained if muon and weight.ndim == 2 and "embed" not in name
    ]
    chosen = {id(weight) for weight in matrices}
    others = [weight for _, weight in trained if id(weight) not in chosen]
    adamw = AdamW(
        others, lr=schedule.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    if not matrices:
        return [adamw]
    return [
        Muon(
            matrices, lr=schedule.learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
        ),
        adamw,
    ]


def learning_rate_share(step: int, schedule: Schedule) -> float:
    """Return the share of the peak learning rate at `step`: linear warm-up, then a cosine to 5 %."""
    warm = min(1.0, (step + 1) / schedule.warmup_steps)
    done = max(0, step - schedule.warmup_steps) / max(1, schedule.steps - schedule.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return warm * (FINAL_LEARNING_RATE_SHARE + (1 - FINAL_LEARNING_RATE_SHARE) * cosine)


def backward(model: Qwen3ForCausalLM, windows_BT: Tensor) -> Tensor:
    """Add the gradients of the mean loss over `windows_BT` [B, T + 1] and return that loss, in nats.

    The head runs forward and backward in chunks of tokens, so that logits [B * T, V] never exist as a whole.
    """
    inputs_BT, targets_N = windows_BT[:, :-1], windows_BT[:, 1:].flatten()
    with half_precision():
        hidden_ND = model.model(inputs_BT, use_cache=False).last_hidden_state.flatten(0, 1)
    leaf_ND = hidden_ND.detach().requires_grad_()
    total = torch.zeros((), device=windows_BT.device)
    chunks = zip(leaf_ND.split(LOSS_CHUNK_TOKENS), targets_N.split(LOSS_CHUNK_TOKENS), strict=True)
    for chunk_ND, chunk_targets_N in chunks:
        with half_precision():
            logits_NV = model.lm_head(chunk_ND)
        loss = nn.functional.cross_entropy(
            logits_NV.float(), chunk_targets_N, reduction="sum"
        ) / len(targets_N)
        loss.backward()
        total += loss.detach()
    hidden_ND.backward(leaf_ND.grad)
    return total


def batch_order(n_windows: int, schedule: Schedule) -> Tensor:
    """Return window indices [steps, B]: whole shuffled passes over the windows, one after another."""
    generator = torch.Generator().manual_seed(schedule.seed)
    needed = schedule.steps * schedule.batch_size
    passes = [
        torch.randperm(n_windows, generator=generator) for _ in range(math.ceil(needed / n_windows))
    ]
    return torch.cat(passes)[:needed].view(schedule.steps, schedule.batch_size)


def train(
    model: Qwen3ForCausalLM,
    windows_NT: Tensor,
    schedule: Schedule,
    *,
    muon: bool,
    report: Callable[[Progress], None],
) -> None:
    """Train the weights of `model` that require a gradient on `windows_NT` [N, T + 1], in place."""
    model.train()
    steppers = optimizers(model, schedule, muon=muon)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    started = reported = time.monotonic()
    for step, indices_B in enumerate(batch_order(len(windows_NT), schedule)):
        loss = backward(model, windows_NT[indices_B].to(device()))
        nn.utils.clip_grad_norm_(weights, 1.0)
        for stepper in steppers:
            for group in stepper.param_groups:
                group["lr"] = schedule.learning_rate * learning_rate_share(step, schedule)
            stepper.step()
            stepper.zero_grad()
        now = time.monotonic()
        if now - reported > REPORT_EVERY_S or step + 1 == schedule.steps:
            reported = now
            report(Progress.after(step + 1, schedule, now - started, loss.item()))
    model.eval()
