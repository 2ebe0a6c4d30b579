"""What a tensor's name says: its block, its part of the model and its projection.

place_of("model.layers.0.mlp.up_proj.weight") is (0, "mlp", "up_proj"); classes wrap the same tensor in different
leading words, which `canonical` takes off.
"""

import re
from typing import Literal

Part = Literal["attn", "mlp", "norm", "embed", "head", "other"]

HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
EMBEDDINGS = (
    "embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "wte.weight",
    "gpt_neox.embed_in.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
)
_WRAPPERS = frozenset({"base_model", "model", "transformer", "language_model", "text_model"})
_OTHER_TOWERS = ("vision", "visual", "audio", "multi_modal", "image")
_PART_WORDS: tuple[tuple[Part, tuple[str, ...]], ...] = (
    ("attn", ("attn", "self_attn", "linear_attn", "attention", "self_attention", "mixer")),
    ("mlp", ("mlp", "feed_forward", "ffn", "moe", "experts", "fc1", "fc2", "block_sparse_moe")),
)
WRITERS = frozenset(  # projections whose outputs are added to the residual stream
    {"o_proj", "down_proj", "c_proj", "out_proj", "dense", "dense_4h_to_h", "fc2", "fc_out", "wo", "w2",
     "output_linear"}
)
POSITIONS = ("wpe", "embed_positions", "position_embeddings")


def place_of(name: str) -> tuple[int | None, Part, str]:
    """(layer, part, projection) that a tensor's name says; what is not recognised is part "other"."""
    words = canonical(name).split(".")
    projection = words[-2] if words[-1] in ("weight", "bias") and len(words) > 1 else words[-1]
    if words[0].startswith(_OTHER_TOWERS):
        return None, "other", projection
    layer = next((int(word) for word in words if word.isdigit()), None)
    if "norm" in projection or re.fullmatch(r"ln_\w+", projection):
        return layer, "norm", projection
    if layer is None and f"{projection}.weight" in HEADS:
        return layer, "head", projection
    if layer is None and (
        any(known.endswith(f"{projection}.weight") for known in EMBEDDINGS) or projection in POSITIONS
    ):
        return layer, "embed", projection
    for part, known in _PART_WORDS:
        if any(word in known for word in words):
            return layer, part, projection
    return layer, "other", projection


def module_of(name: str) -> str:
    """Its path within the block, without `.weight` and the numbers of experts: attn.c_proj, mlp.c_proj.bias, mlp.experts.up_proj."""
    words = canonical(name).split(".")
    numbered = [place for place, word in enumerate(words) if word.isdigit()]
    inside = [word for word in words[numbered[0] + 1 if numbered else 0 :] if not word.isdigit()]
    return ".".join(inside[:-1] if inside[-1:] == ["weight"] and len(inside) > 1 else inside) or name


def canonical(name: str) -> str:
    """The name without leading wrappers, which depend on the class that saved the file."""
    words = name.split(".")
    while len(words) > 2 and words[0] in _WRAPPERS:
        words = words[1:]
    return ".".join(words)


def model_order(name: str) -> tuple:
    """Embeddings, blocks by number, then the rest; names in a block by alphabet."""
    layer, part, _ = place_of(name)
    numbered = [(1, int(word), "") if word.isdigit() else (0, 0, word) for word in name.split(".")]
    return (0 if part == "embed" else 1 if layer is not None else 2, layer or 0, numbered)
