"""Base plus a change as an ordinary Hugging Face folder: read, edited and written one tensor at a time.

Tensors keep the base's keys and number formats; configuration, tokenizer and code are copied from the base. Memory is
bounded by one shard and the tensors of one name, whatever the size of the model.
"""

import itertools
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from diffing_core.safetensor_files import CHECKPOINT_FILES
from diffing_core.tensor_names import EMBEDDINGS
from diffing_core.weight_edits.changes import EditedTensor
from diffing_core.weight_files import OpenSide, WeightSide

SHARD_BYTES = 2 * 1024**3


def write_checkpoint(folder: Path, tensors: Iterable[EditedTensor], base: WeightSide) -> None:
    """Writes every tensor of the base, edited where `tensors` says so, with an index where one shard is not enough."""
    opened = OpenSide(base)
    _copy_rest(folder, opened)
    shards = _Shards(folder)
    for key, tensor in _whole(tensors, opened, folder):
        shards.add(key, tensor)
    shards.finish()


def _whole(tensors: Iterable[EditedTensor], base: OpenSide, folder: Path) -> Iterator[tuple[str, Any]]:
    """Every tensor of the new checkpoint under the base's key."""
    checkpoint, head = base.checkpoint, base.checkpoint.head
    head_key = checkpoint.stored_key(head)
    done: set[str] = set()
    parted = False  # of a tied pair, only the embedding changes, as with a LoRA on it
    for name, edits in itertools.groupby(tensors, key=lambda each: each.name):
        done.add(name)
        tensor, heads_too = _edited(base, edits)
        yield checkpoint.stored_key(name) or name, tensor
        if name in EMBEDDINGS and checkpoint.tied:
            parted = not heads_too
            if heads_too and head_key:
                done.add(head)
                yield head_key, tensor.clone()
    if parted and head not in done:
        done.add(head)
        yield head_key or head, base.place(head).read()
    if head in done and head_key is None:
        _untie(folder)
    for name in sorted(checkpoint.stored_names() - done):
        stored = checkpoint.place(name).read()
        whole = base.dense(name).to(stored.dtype) if name in base.touched() else stored
        yield checkpoint.stored_key(name), whole


def _added(base: OpenSide, edited: EditedTensor) -> Any:
    """W_base + change, in the base's number format."""
    stored = base.place(edited.name).read()
    whole = base.dense(edited.name, flip=edited.flipped) + edited.dense()
    return (whole.mT if edited.flipped else whole).to(stored.dtype).contiguous()


def _edited(base: OpenSide, edits: Iterable[EditedTensor]) -> tuple[Any, bool]:
    """One tensor with its edit, or a stack of experts with those of each, one expert at a time in float32; `heads_too`."""
    stack = None
    for each in edits:
        if each.expert is None:
            return _added(base, each), each.heads_too
        stack = base.place(each.name).read() if stack is None else stack
        whole = base.dense(each.name, flip=each.flipped, expert=each.expert) + each.dense()
        stack[each.expert] = (whole.mT if each.flipped else whole).to(stack.dtype)
    return stack, False


class _Shards:
    """Collects tensors and writes a file whenever the next one would be too large."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[str, Any] = {}
        self._n_held = 0
        self._n_total = 0
        self._keys: list[list[str]] = []

    def add(self, key: str, tensor: Any) -> None:
        """Adds one tensor of the checkpoint."""
        n_bytes = tensor.numel() * tensor.element_size()
        if self._held and self._n_held + n_bytes > SHARD_BYTES:
            self._flush()
        self._held[key] = tensor
        self._n_held += n_bytes
        self._n_total += n_bytes

    def finish(self) -> None:
        """Writes what is held, and names the files as Hugging Face does."""
        self._flush()
        n = len(self._keys)
        names = ["model.safetensors"] if n == 1 else [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
        for number, name in enumerate(names):
            self._file(number).rename(self._folder / name)
        if n > 1:
            weight_map = {key: name for keys, name in zip(self._keys, names, strict=True) for key in keys}
            index = {"metadata": {"total_size": self._n_total}, "weight_map": weight_map}
            (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))

    def _flush(self) -> None:
        from safetensors.torch import save_file

        save_file(self._held, self._file(len(self._keys)), metadata={"format": "pt"})
        self._keys.append(list(self._held))
        self._held, self._n_held = {}, 0

    def _file(self, number: int) -> Path:
        return self._folder / f"shard_{number}.safetensors"


def _copy_rest(folder: Path, base: OpenSide) -> None:
    source = base.checkpoint.folder
    for name in CHECKPOINT_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    for code in source.glob("*.py"):
        shutil.copyfile(code, folder / code.name)


def _untie(folder: Path) -> None:
    """The head has a change of its own, so it is stored beside the embedding."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": False}, indent=2))
