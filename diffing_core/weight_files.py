"""The safetensors files of one side of a pair, opened: a checkpoint, and what its adapters do to it.

A LoRA adapter gives its factors, ΔW = B A with s = α/r (rsLoRA: α/√r) folded into B, and never the product.
Matrices are oriented as y = W x, rows are outputs.

Suffixes: M rows (outputs), N columns (inputs), R rank.
Reference: Hu et al. 2021 (LoRA), Kalajdzievski 2023 (rsLoRA); names as PEFT writes them.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open

from diffing_core.errors import ModelLoadError, NotComputableError
from diffing_core.lazy import torch
from diffing_core.safetensor_files import tensor_shapes, weight_files
from diffing_core.spectra import Factors
from diffing_core.tensor_names import EMBEDDINGS, HEADS, canonical, place_of

_CONV1D_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_CONV1D = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
_LORA = re.compile(r"(?P<path>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.default)?(\.weight)?")
_BASE_CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_MERGE = "merge it into its base and register the result as kind: full"


@dataclass(frozen=True)
class WeightSide:
    """One model state on disk: a checkpoint folder and the adapters added to it, in order."""

    folder: Path
    adapters: tuple[Path, ...] = ()


class _Checkpoint:
    """The tensors of one folder by canonical name, read one at a time; a tied head is read as the embedding."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = _read_json(folder / "config.json")
        if "quantization_config" in self.config:
            raise NotComputableError(
                f"{folder} holds quantised weights, whose differences are those of the codes; name the unquantised "
                "checkpoint as source"
            )
        self._places = _places(folder)
        self.head = next((name for name in HEADS if name in self._places), HEADS[0])
        self._embedding = next((name for name in EMBEDDINGS if name in self._places), None)

    @property
    def model_type(self) -> str:
        """`model_type` of config.json."""
        return str(self.config.get("model_type", ""))

    @cached_property
    def tied(self) -> bool:
        """Whether the head is the embedding: it is not stored, or stored twice with the same values."""
        if self._embedding is None:
            return False
        if self.head not in self._places:
            return True
        if self._places[self.head].shape != self._places[self._embedding].shape:
            return False
        same_start = torch.equal(*(self._places[name].read(8) for name in (self.head, self._embedding)))
        return same_start and torch.equal(*(self._places[name].read() for name in (self.head, self._embedding)))

    def names(self) -> set[str]:
        """Every tensor once."""
        return self._places.keys() - ({self.head} if self.tied else set())

    def stored_names(self) -> set[str]:
        """Every tensor of the files, a tied head that is stored all the same included."""
        return set(self._places)

    def stored_key(self, name: str) -> str | None:
        """The name under which the files hold a tensor; None if they do not."""
        return self._places[name].key if name in self._places else None

    def place(self, name: str) -> "_Place | None":
        """Where a tensor lies; the head of a tied model lies in the embedding."""
        if name == self.head and name not in self._places and self._embedding:
            return self._places[self._embedding]
        return self._places.get(name)

    def is_conv1d(self, name: str) -> bool:
        """Whether GPT-2's Conv1D holds this weight, as [inputs, outputs]."""
        return self.model_type in _CONV1D_TYPES and place_of(name)[2] in _CONV1D


@dataclass(frozen=True)
class _Place:
    """One tensor in one file."""

    file: Path
    key: str
    shape: tuple[int, ...]

    def read(self, rows: int | None = None) -> Any:
        """The tensor as stored, or its first rows."""
        with safe_open(self.file, "pt") as tensors:
            tensor = tensors.get_tensor(self.key) if rows is None else tensors.get_slice(self.key)[:rows]
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ModelLoadError(f"{self.file}: tensor {self.key} holds NaN or infinite values; save it again")
        return tensor


class _Adapter:
    """A LoRA folder by the canonical names of the base's weights that it changes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = _adapter_config(folder)
        self.lora: dict[str, dict[str, tuple[str, _Place]]] = {}
        self.saved: dict[str, _Place] = {}
        for key, place in _raw_places(folder).items():
            found = _LORA.fullmatch(key)
            if found:
                path = found["path"]
                kind = "embedding" if found["embedding"] else "linear"
                self.lora.setdefault(canonical(f"{path}.weight"), {})[f"{kind}_{found['side']}"] = (path, place)
            elif ".lora_" in key or "token_adapter" in key:
                raise NotComputableError(f"{folder} holds {key}, which is more than a plain LoRA; {_MERGE}")
            else:
                plain = key.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
                self.saved[canonical(plain.replace(".default.", "."))] = place
        halves = [name for name, found in self.lora.items() if len(found) != 2]
        if halves:
            raise ModelLoadError(f"{folder} holds one factor of {halves[0]} and not the other; fetch the adapter again")

    def factors(self, name: str) -> Factors:
        """The change of one weight, oriented as y = W x; an embedding's has a row per token."""
        (a_kind, (path, a_place)), (_, (_, b_place)) = sorted(self.lora[name].items())
        a_RN, b_MR = a_place.read().float(), b_place.read().float()
        if a_RN.ndim != 2 or b_MR.ndim != 2 or b_MR.shape[1] != a_RN.shape[0]:
            raise NotComputableError(
                f"{self.folder}: the factors of {name} have shapes {tuple(b_MR.shape)} and {tuple(a_RN.shape)}, which "
                f"are no matrices to multiply (convolutions and stacked experts are not read); {_MERGE}"
            )
        scaled_MR = b_MR * self.scale(path, a_RN.shape[0])
        return Factors(a_RN.T, scaled_MR.T) if a_kind == "embedding_A" else Factors(scaled_MR, a_RN)

    def shape(self, name: str) -> tuple[int, int]:
        """(M, N) of the change, without reading it."""
        (kind, (_, a_place)), (_, (_, b_place)) = sorted(self.lora[name].items())
        inputs, outputs = a_place.shape[1], b_place.shape[0]
        return (inputs, outputs) if kind == "embedding_A" else (outputs, inputs)

    def scale(self, path: str, rank: int) -> float:
        """α/r, or α/√r with rsLoRA; the factors' own r, and α from the pattern that fits the module's path."""
        patterns = self.config.get("alpha_pattern") or {}
        found = (alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", path))
        alpha = next(found, self.config["lora_alpha"])
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


class OpenSide:
    """One side of the pair, opened: its checkpoint, and what its adapters do to it."""

    def __init__(self, side: WeightSide, checkpoint: _Checkpoint | None = None) -> None:
        self.checkpoint = checkpoint or _Checkpoint(side.folder)
        self.adapters = {folder: _Adapter(folder) for folder in side.adapters}
        self.saved: dict[str, _Place] = {}
        for adapter in self.adapters.values():
            self.saved.update(self._changed(adapter))
            self._check_fits(adapter)

    def touched(self) -> set[str]:
        """Names that the adapters change."""
        return set(self.saved).union(*(adapter.lora for adapter in self.adapters.values()))

    def place(self, name: str) -> "_Place | None":
        """Where the tensor without its low-rank changes lies."""
        return self.saved.get(name) or self.checkpoint.place(name)

    def dense(self, name: str, *, flip: bool = False) -> Any:
        """The whole tensor in float32, transposed if asked, adapters added."""
        tensor = self.place(name).read().float()
        tensor = tensor.T if flip else tensor
        for adapter in self.adapters.values():
            if name in adapter.lora:
                tensor = tensor + adapter.factors(name).dense()
        return tensor

    def _changed(self, adapter: _Adapter) -> Iterator[tuple[str, _Place]]:
        """Stored tensors that differ from the checkpoint's: PEFT also stores untouched embeddings."""
        for name, place in adapter.saved.items():
            own = self.checkpoint.place(name)
            if own is None or own.shape != place.shape or not torch.equal(own.read().float(), place.read().float()):
                yield name, place

    def _check_fits(self, adapter: _Adapter) -> None:
        for name in adapter.lora:
            place, shape = self.place(name), adapter.shape(name)
            if place is None or place.shape not in (shape, shape[::-1]):
                own = f"has it as {place.shape}" if place else "does not have it"
                raise ModelLoadError(
                    f"adapter {adapter.folder} changes {name} of shape {shape}, base {self.checkpoint.folder} {own}; "
                    "it was made for another base model"
                )


def _raw_places(folder: Path) -> dict[str, _Place]:
    """Tensors by key, from the index if there is one, so that a second copy in another layout is not read."""
    files = weight_files(folder)
    by_name = {file.name: file for file in files}
    whole = next((name for name in ("model.safetensors", "adapter_model.safetensors") if name in by_name), None)
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        shards = set(_read_json(indices[0])["weight_map"].values())
        files = [file for file in files if file.name in shards]
    elif whole:
        files = [by_name[whole]]
    return {key: _Place(file, key, shape) for file in files for key, shape in tensor_shapes(file).items()}


def _places(folder: Path) -> dict[str, _Place]:
    """Tensors by canonical name; where two would share one, both keep their full key."""
    raw = _raw_places(folder)
    n_keys = Counter(map(canonical, raw))
    return {canonical(key) if n_keys[canonical(key)] == 1 else key: place for key, place in raw.items()}


def _adapter_config(folder: Path) -> dict[str, Any]:
    """The adapter's settings, if its change is ΔW = s B A and nothing more."""
    config = _read_json(folder / "adapter_config.json")
    if not config:
        raise ModelLoadError(f"{folder} has no adapter_config.json; for a whole checkpoint write kind: full")
    if config.get("peft_type") != "LORA":
        raise ModelLoadError(f"{folder} is of peft_type {config.get('peft_type')!r}; expected LORA: {_MERGE}")
    start = str(config.get("init_lora_weights", "")).lower()
    if config.get("use_dora") or start.startswith(_BASE_CHANGING_STARTS):
        what = "uses DoRA" if config.get("use_dora") else f"was begun with {start}, which also changes the base"
        raise NotComputableError(f"adapter {folder} {what}, so its factors are not the whole change; {_MERGE}")
    return config


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise ModelLoadError(f"{file} is not JSON ({error}); save it again") from error
