"""What safetensors files hold, read without torch: names, shapes, completeness and a content hash of their folder.

A file is 8 bytes of header length (little endian), a JSON header {name: {dtype, shape, data_offsets}}
and the data (https://huggingface.co/docs/safetensors). Reading the header finds a truncated file at
once instead of in the middle of a load.
"""

import json
from pathlib import Path

from diffing_core.errors import ModelLoadError
from diffing_core.file_hash import files_hash

_CONFIGS = ("config.json", "adapter_config.json", "generation_config.json")
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
CHECKPOINT_FILES = ("config.json", "generation_config.json", *_TOKENIZER)  # what a checkpoint's folder holds beside its weights
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".gguf")
_HEADER_LIMIT = 100_000_000


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in one file.

    Raises:
        ModelLoadError: the file is not safetensors or is shorter than its header promises.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(size - 8, _HEADER_LIMIT):
            raise ModelLoadError(f"{file} is not a complete safetensors file ({size:,} bytes); fetch it again")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise ModelLoadError(f"{file} has a damaged safetensors header ({error}); fetch it again") from error
    header.pop("__metadata__", None)
    promised = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size < promised:
        raise ModelLoadError(f"{file} is truncated: {size:,} bytes, its header promises {promised:,}; fetch it again")
    return {name: tuple(entry["shape"]) for name, entry in header.items()}


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files, each checked for completeness.

    Raises:
        ModelLoadError: no such folder, other formats only, a shard of the index is missing, or a file is damaged.
    """
    if not folder.is_dir():
        raise ModelLoadError(f"no folder {folder}; build or fetch it first, or mend the source in the registry")
    files = sorted(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index.json"):
        shards = set(json.loads(index.read_text())["weight_map"].values())
        missing = sorted(shards - {file.name for file in files})
        if missing:
            raise ModelLoadError(f"{folder} lacks {', '.join(missing)}, which {index.name} names; fetch them again")
    if not files:
        others = sorted(file.name for file in folder.iterdir() if file.suffix in _OTHER_FORMATS)
        raise ModelLoadError(
            f"{folder} holds no .safetensors file (found {', '.join(others) or 'no weights'}); pickled weights are "
            "not loaded because they can run code: convert them where you trust them, with "
            "from_pretrained(folder).save_pretrained(new_folder)"
        )
    for file in files:
        tensor_shapes(file)
    return files


def content_hash(folder: Path) -> str:
    """Identity of what a model or adapter folder holds: weights, configuration, tokenizer, chat template and code."""
    others = _present(folder, _CONFIGS + _TOKENIZER)
    return files_hash([*weight_files(folder), *others, *folder.glob("*.py")], folder)


def tokenizer_hash(folder: Path) -> str:
    """Identity of a folder as a tokenizer's; it may hold no weights.

    Raises:
        ModelLoadError: no file of a tokenizer is there.
    """
    files = _present(folder, _TOKENIZER)
    if not files:
        raise ModelLoadError(f"{folder} holds no file of a tokenizer; mend tokenizer in the registry entry")
    return files_hash(files, folder)


def _present(folder: Path, names: tuple[str, ...]) -> list[Path]:
    return [folder / name for name in names if (folder / name).exists()]
