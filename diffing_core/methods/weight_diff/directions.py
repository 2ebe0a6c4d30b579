"""The directions that modules write into the residual stream, and the tokens that these point to.

Suffixes: K directions, D model width, V vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffing_core.lazy import torch
from diffing_core.methods.weight_diff.declaration import WeightDiffSettings
from diffing_core.spectra import Lens
from diffing_core.tensor_names import Part
from diffing_core.vocabulary import Vocabulary
from diffing_core.weight_files import OpenSide
from diffing_core.weights import WeightPair

FINAL_NORMS = (
    "norm.weight",
    "final_layernorm.weight",
    "ln_f.weight",
    "gpt_neox.final_layer_norm.weight",
    "decoder.final_layer_norm.weight",
    "norm_f.weight",
    "backbone.norm_f.weight",
    "embedding_norm.weight",
)
GAIN_ABOVE_ONE = frozenset(  # files hold gain − 1
    {
        "gemma", "gemma2", "gemma3", "gemma3_text", "minimax_m3_vl", "minimax_m3_vl_text", "muse_glimmer", "muse_glimmer_text",
        "nemotron", "paligemma", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "qwen4_exp",
        "qwen4_exp_text", "recurrent_gemma", "step3p5", "step3p7", "vaultgemma",
    }
)  # fmt: skip
CENTRED_WITHOUT_BIAS = ("cohere",)
MODULES_AT_ONCE = 8


@dataclass(frozen=True, eq=False)
class Written:
    """The leading directions that one module writes, [K, D], their sizes, and how much more the tuned model writes."""

    name: str
    expert: int | None
    layer: int | None
    part: Part
    direction_KD: Any
    sigma_K: Any
    energy_K: Any
    gain_K: Any

    @property
    def title(self) -> str:
        """The tensor's name, with the number of the expert."""
        return self.name if self.expert is None else f"{self.name}[{self.expert}]"


def read_directions(
    pair: WeightPair, written: list[Written], settings: WeightDiffSettings
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of directions with the tokens at their ends, and of tokens over all; none where no head is known."""
    side = OpenSide(pair.base) if written else None
    if side is None or _final_norm(side) is None or side.place(side.checkpoint.head) is None:
        return [], []
    vocabulary = Vocabulary(pair.tokenizer(), side.place(side.checkpoint.head).shape[0])
    lens = _lens_of(side, vocabulary.readable_V)
    width = side.place(side.checkpoint.head).shape[1]
    written = [module for module in written if module.direction_KD.shape[1] == width]  # others write elsewhere
    if not written:
        return [], []
    rows: list[dict[str, Any]] = []
    score_V = torch.zeros(len(vocabulary.text_V), dtype=torch.float64)
    net_V, best_V = torch.zeros_like(score_V), torch.zeros_like(score_V)
    best_module_V = torch.zeros(len(score_V), dtype=torch.int64)
    for number, (module, z_KV) in enumerate(_lenses(lens, written)):
        rows += _direction_rows(module, z_KV, vocabulary, settings.direction_tokens)
        share_KV = z_KV.double() ** 2 * module.sigma_K[:, None]
        share_V = (share_KV * module.gain_K[:, None]).sum(0)
        score_V += share_KV.sum(0)
        net_V += share_V
        best_module_V[share_V.abs() > best_V] = number
        best_V = torch.maximum(best_V, share_V.abs())
    for sum_V in (score_V, net_V):
        sum_V /= sum(module.sigma_K.sum() for module in written)
    order_V = net_V.abs().masked_fill(~lens.readable_V, -1).argsort(descending=True, stable=True)
    ids = order_V[: min(settings.top_tokens, int(lens.readable_V.sum()))]
    return rows, [
        {
            "token_id": token,
            "token": vocabulary.text_V[token],
            "net_score": net_V[token].item(),
            "score": score_V[token].item(),
            "strongest_module": written[int(best_module_V[token])].title,
        }
        for token in ids.tolist()
    ]


def _lenses(lens: Lens, written: list[Written]) -> Iterable[tuple[Written, Any]]:
    """Every module with its z [K, V]; the head is read once for many modules."""
    for start in range(0, len(written), MODULES_AT_ONCE):
        modules = written[start : start + MODULES_AT_ONCE]
        z_KV = lens.standardised(torch.cat([module.direction_KD for module in modules]))
        yield from zip(modules, z_KV.split([len(module.sigma_K) for module in modules]), strict=True)


def _lens_of(side: OpenSide, readable_V: np.ndarray) -> Lens:
    """The lens of a model on disk whose norm and head are known."""
    norm = _final_norm(side)
    kind = side.checkpoint.model_type
    centred = side.place(norm.replace(".weight", ".bias")) is not None or kind.startswith(CENTRED_WITHOUT_BIAS)
    gain_D = side.dense(norm) + (1 if kind in GAIN_ABOVE_ONE else 0)
    return Lens(side.place(side.checkpoint.head).read(), gain_D, readable_V, centred=centred)


def _direction_rows(module: Written, z_KV: Any, vocabulary: Vocabulary, n_tokens: int) -> list[dict[str, Any]]:
    hidden_V = torch.as_tensor(~vocabulary.readable_V)
    n_tokens = min(n_tokens, int(vocabulary.readable_V.sum()))
    ends = []
    for sign in (1, -1):
        z, ids = (sign * z_KV).masked_fill(hidden_V, -torch.inf).topk(n_tokens)
        ends.append([(z[0].item(), vocabulary.of(row.tolist())) for z, row in zip(z, ids, strict=True)])
    rows = []
    for number, pair_of_ends in enumerate(zip(*ends, strict=True)):
        (far, far_tokens), (near, near_tokens) = sorted(pair_of_ends, key=lambda end: -end[0])
        rows.append(
            {
                "name": module.name,
                "expert": module.expert,
                "direction": number + 1,
                "layer": module.layer,
                "part": module.part,
                "side": "write",
                "sigma": module.sigma_K[number].item(),
                "energy_share": module.energy_K[number].item(),
                "gain": module.gain_K[number].item(),
                "positive_tokens": far_tokens,
                "negative_tokens": near_tokens,
                "positive_z": max(far, 0.0),
                "negative_z": max(near, 0.0),
            }
        )
    return rows


def _final_norm(side: OpenSide) -> str | None:
    return next((name for name in FINAL_NORMS if side.place(name)), None)
