"""Two models that write one text together: both read what is written so far, and their logits decide what comes next.

Each model keeps a cache of its own; of a LoRA pair there is one copy of the base, on which the adapter is switched.
Shapes: B texts, T positions, V tokens that both models have. Prefills are padded on the left.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffing_core.drawing import drawn, uniforms
from diffing_core.generation import left_padded
from diffing_core.lazy import torch
from diffing_core.models import ModelPair
from diffing_core.progress import track
from diffing_core.subject import Subject

BATCH_SIZE = 256


@dataclass(frozen=True)
class Arm:
    """Whose difference from the other model is amplified, `tuned` or `base`, and how far; alpha 0 is that model alone."""

    direction: str
    alpha: float


@dataclass(frozen=True)
class Text:
    """Tokens drawn, the one that ends the text included, and their mean log-probability under both plain models."""

    token_ids: tuple[int, ...]
    logprob_tuned_nats: float
    logprob_base_nats: float


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How the next token is drawn from the logits of both models."""

    plausibility: float
    temperature: float
    top_p: float
    max_new_tokens: int


def amplified(toward_BV: Any, away_BV: Any, alpha_B: Any, plausibility: float) -> Any:
    """Logits z + α (z − z′) of the tokens with p >= plausibility · max p under `toward`, −inf elsewhere."""
    least_B1 = toward_BV.amax(-1, keepdim=True) + (math.log(plausibility) if plausibility else -math.inf)
    mixed_BV = toward_BV + alpha_B[:, None] * (toward_BV - away_BV)
    return mixed_BV.where(toward_BV >= least_B1, -torch.inf)


def decode(
    pair: ModelPair,
    rows: Sequence[tuple[list[int], int, Arm]],
    drawing: Drawing,
    stops: Sequence[int],
    pad: int,
    *,
    batch_size: int = BATCH_SIZE,
) -> list[Text]:
    """One text per row of (prefill as token ids, what its uniform numbers come from, arm), in that order."""
    by_length = sorted(range(len(rows)), key=lambda row: len(rows[row][0]))
    made: dict[int, Text] = {}
    with torch.inference_mode(), track(len(rows), "texts", "contrastive decoding") as advance:
        for start in range(0, len(rows), batch_size):
            chosen = by_length[start : start + batch_size]
            made |= dict(zip(chosen, _decode(pair, [rows[row] for row in chosen], drawing, stops, pad), strict=True))
            advance(len(chosen))
    return [made[row] for row in range(len(rows))]


def _decode(
    pair: ModelPair,
    rows: Sequence[tuple[list[int], int, Arm]],
    drawing: Drawing,
    stops: Sequence[int],
    pad: int,
) -> list[Text]:
    device, common = pair.base.device, pair.common_vocab
    token_BT, mask_BT = left_padded([ids for ids, _, _ in rows], device)
    uniform_BT = torch.as_tensor(uniforms([entropy for _, entropy, _ in rows], drawing.max_new_tokens), device=device)
    alpha_B = torch.tensor([arm.alpha for _, _, arm in rows], device=device)
    tuned_B1 = torch.tensor([[arm.direction == "tuned"] for _, _, arm in rows], device=device)
    stop_S = torch.as_tensor(list(stops), dtype=torch.long, device=device)
    readings = _reading(pair.tuned), _reading(pair.base)
    going_B, said, logprobs = torch.ones(len(rows), dtype=torch.bool, device=device), [], []
    for step in range(drawing.max_new_tokens):
        tuned_BV, base_BV = (read(token_BT, mask_BT)[:, :common] for read in readings)
        toward_BV, away_BV = tuned_BV.where(tuned_B1, base_BV), base_BV.where(tuned_B1, tuned_BV)
        mixed_BV = amplified(toward_BV, away_BV, alpha_B, drawing.plausibility)
        drawn_B = drawn((mixed_BV / drawing.temperature).softmax(-1), uniform_BT[:, step], drawing.top_p)
        drawn_B = drawn_B.where(going_B, pad)
        said.append(drawn_B)
        logprobs.append([_logprob(side_BV, drawn_B) for side_BV in (tuned_BV, base_BV)])
        going_B = going_B & ~torch.isin(drawn_B, stop_S)
        if not going_B.any():
            break
        token_BT = drawn_B[:, None]
        mask_BT = torch.cat([mask_BT, torch.ones_like(token_BT)], 1)
    return _texts(torch.stack(said, 1), torch.stack([torch.stack(each) for each in logprobs]), stops)


def _reading(subject: Subject) -> Callable[[Any, Any], Any]:
    """A model as it reads on: new tokens and the mask of all so far -> float32 logits [B, V] of what comes next."""
    cache = None
    placed = "position_ids" in inspect.signature(subject.plain.forward).parameters

    def read(token_BT: Any, mask_BT: Any) -> Any:
        nonlocal cache
        place_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)[:, -token_BT.shape[1] :]
        places = {"position_ids": place_BT} if placed else {}
        with subject.active() as model:
            output = model(
                input_ids=token_BT, attention_mask=mask_BT, past_key_values=cache, use_cache=True, **places
            )
        cache = output.past_key_values
        return output.logits[:, -1].float()

    return read


def _logprob(logits_BV: Any, token_B: Any) -> Any:
    return logits_BV.gather(1, token_B[:, None])[:, 0] - logits_BV.logsumexp(-1)


def _texts(token_BT: Any, logprob_T2B: Any, stops: Sequence[int]) -> list[Text]:
    """Cuts every text behind its first stop token."""
    logprob_2BT = logprob_T2B.permute(1, 2, 0).cpu().double().numpy()
    texts = []
    for row, ids in enumerate(token_BT.tolist()):
        n = next((place + 1 for place, token in enumerate(ids) if token in stops), len(ids))
        tuned, base = (float(np.mean(side_BT[row, :n])) for side_BT in logprob_2BT)
        texts.append(Text(tuple(ids[:n]), tuned, base))
    return texts
