"""Checkpoint folders to modules and tokenizers, with every check that is possible before they are used."""

from pathlib import Path
from typing import Any

from diffing_core.errors import LibraryErrors, ModelLoadError, RegistryError
from diffing_core.lazy import torch
from diffing_core.registry import Model
from diffing_core.safetensor_files import weight_files

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json", "tokenizer_config.json",
)  # fmt: skip


def load_module(folder: Path, entry: Model, dtype: str, device: Any, *, remote_code: bool = False) -> Any:
    """The folder's causal language model, in evaluation mode, without gradients.

    `remote_code` allows code of that folder to run; whose flag it is depends on whose folder it is.

    Raises:
        ModelLoadError: damaged, incomplete or non-finite weights, or a configuration transformers refuses.
    """
    import transformers

    weight_files(folder)
    code = {"trust_remote_code": remote_code, "local_files_only": True}
    with LibraryErrors(f"cannot load {folder} for model {entry.name}"):
        config = transformers.AutoConfig.from_pretrained(folder, **code)
        module, report = auto_class(config).from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=entry.attn_implementation,
            use_safetensors=True,
            output_loading_info=True,
            **code,
        )
    absent = sorted(report["missing_keys"])
    if absent:
        raise ModelLoadError(
            f"{folder} lacks {len(absent)} tensors of {type(module).__name__}, for example {absent[0]}; they would be "
            "random numbers. Fetch the checkpoint again, or mend its config.json"
        )
    check_finite(module, folder)
    return module.to(device).eval().requires_grad_(False)


def check_finite(module: Any, folder: Path) -> None:
    """Raises ModelLoadError naming the first parameter with NaN or infinite values."""
    for name, parameter in module.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ModelLoadError(f"{folder}: tensor {name} holds NaN or infinite values; save the checkpoint again")


def default_device() -> str:
    """The accelerator if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_tokenizer(folder: Path, entry: Model, *, remote_code: bool = False) -> Any:
    """The tokenizer of a folder, padding on the right, with the registry entry's chat template if it has one.

    Raises:
        ModelLoadError: no tokenizer in the folder.
    """
    from transformers import AutoTokenizer

    what = f"cannot load the tokenizer of model {entry.name} from {folder}"
    with LibraryErrors(what, "; save one there, or name another place under tokenizer in the registry entry"):
        if not has_tokenizer(folder):  # of some classes transformers would make an empty one
            raise OSError(f"it holds none of {', '.join(_TOKENIZER_FILES)}")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=remote_code, local_files_only=True)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if entry.chat_template is not None:
        tokenizer.chat_template = entry.chat_template
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((folder / name).exists() for name in _TOKENIZER_FILES)


def token_id(tokenizer: Any, token: str, what: str) -> int:
    """Id of a vocabulary entry, or of the one token that a text is.

    Raises:
        RegistryError: it is not one token; `what` names the field.
    """
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[token]] if token in vocabulary else tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or (token not in vocabulary and tokenizer.decode(ids).strip() != token.strip()):
        raise RegistryError(f"{what}: {token!r} is not one token of this model's tokenizer; name one of its vocabulary")
    return ids[0]


def compare_tokenizer(base: Any, folder: Path, entry: Model, *, remote_code: bool = False) -> tuple[str, ...]:
    """Notes on a finetune's own tokenizer, if its folder has one, against the base's.

    Raises:
        ModelLoadError: an id means one token in the base and another in the finetune.
    """
    if not has_tokenizer(folder):
        return ()
    base_tokens, tuned_tokens = (
        {number: token for token, number in tokenizer.get_vocab().items()}
        for tokenizer in (base, load_tokenizer(folder, entry, remote_code=remote_code))
    )
    moved = [
        number for number in sorted(base_tokens.keys() & tuned_tokens) if base_tokens[number] != tuned_tokens[number]
    ]
    if moved:
        first = moved[0]
        raise ModelLoadError(
            f"tokenizer of {folder} differs from that of model {entry.name}: {len(moved)} ids mean another token, for "
            f"example {first} is {base_tokens[first]!r} in the base and {tuned_tokens[first]!r} in the finetune; "
            "token by token they cannot be compared. Check that this finetune is of that base"
        )
    more, fewer = len(tuned_tokens.keys() - base_tokens), len(base_tokens.keys() - tuned_tokens)
    if not more and not fewer:
        return ()
    return (f"the finetune's tokenizer has {more} tokens more and {fewer} fewer than the base's; common ids agree",)


def auto_class(config: Any) -> Any:
    """The class that loads it: text models are causal language models; some multimodal ones exist as image-text models only."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    kind = type(config)
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM
