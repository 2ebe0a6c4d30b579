"""The safetensors files of one side of a pair, opened: a checkpoint, and what its adapters do to it.

A LoRA adapter gives its factors, ΔW = B A with s = α/r (rsLoRA: α/√r) folded into B, and never the product.
DoRA needs the weight itself, one tensor at a time: W' = m (W + B A) / ‖W + B A‖, the norm per output. Every other
adapter is merged by PEFT into a checkpoint of its own (merged_adapters.py). Matrices are oriented as y = W x, rows
are outputs.

Suffixes: M rows (outputs), N columns (inputs), R rank.
Reference: Hu et al. 2021 (LoRA), Kalajdzievski 2023 (rsLoRA), Liu et al. 2024 (DoRA); names as PEFT writes them.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open

from diffing_core.adapters import BASE_CHANGING_STARTS, read_adapter_config
from diffing_core.errors import ModelLoadError, NotComputableError
from diffing_core.lazy import torch
from diffing_core.merged_adapters import merged
from diffing_core.safetensor_files import tensor_shapes, weight_files
from diffing_core.spectra import Factors
from diffing_core.tensor_names import EMBEDDINGS, HEADS, WRITERS, canonical, place_of

_CONV1D_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_CONV1D = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
_EXPERTS_FLIPPED = frozenset(  # hold each expert as [inputs, outputs]
    {"gpt_oss", "llama4", "llama4_text", "aria", "aria_text", "qwen3_vl_moe", "qwen3_vl_moe_text"}
)
_LORA = re.compile(r"(?P<path>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.default)?(\.weight)?")
_MAGNITUDE = re.compile(r"(?P<path>.+)\.lora_magnitude_vector(\.default)?(\.weight)?")
_CHANGES_MORE = ("target_parameters", "layer_replication", "use_qalora", "use_bdlora", "velora_config", "kasa_config",
                 "alora_invocation_tokens")  # fmt: skip


@dataclass(frozen=True)
class WeightSide:
    """One model state on disk: a checkpoint folder and the adapters added to it, in order.

    `remote_code` allows code of the checkpoint's folder to run, where adapters can only be merged by its model.
    """

    folder: Path
    adapters: tuple[Path, ...] = ()
    remote_code: bool = field(default=False, compare=False)

    def plus(self, adapter: Path) -> "WeightSide":
        """The same with one more adapter."""
        return replace(self, adapters=(*self.adapters, adapter))


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
        same_start = torch.equal(*(self._places[name].read(slice(8)) for name in (self.head, self._embedding)))
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

    def has_flipped_experts(self, name: str) -> bool:
        """Whether this tensor stacks experts that are stored as [inputs, outputs].

        Files of one class may hold either, so the shape decides: what writes into the residual stream has its width as
        outputs, anything else as inputs. Where both sides are equal, or neither is the width, the class is asked.
        """
        _, part, projection = place_of(name)
        if part != "mlp":
            return False
        width = self.config.get("text_config", self.config).get("hidden_size")
        rows, columns = self._places[name].shape[1:]
        if rows != columns and width in (rows, columns):
            return (columns if projection in WRITERS else rows) == width
        return self.model_type in _EXPERTS_FLIPPED


@dataclass(frozen=True)
class _Place:
    """One tensor in one file."""

    file: Path
    key: str
    shape: tuple[int, ...]

    def read(self, rows: slice | None = None) -> Any:
        """The tensor as stored, or these rows of it, without the others."""
        with safe_open(self.file, "pt") as tensors:
            tensor = tensors.get_tensor(self.key) if rows is None else tensors.get_slice(self.key)[rows]
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ModelLoadError(f"{self.file}: tensor {self.key} holds NaN or infinite values; save it again")
        return tensor


@dataclass(frozen=True)
class _Lora:
    """The tensors of one weight's low-rank change; `magnitude` with DoRA. An embedding's A is [R, V], its B [D, R]."""

    path: str
    embedding: bool
    a: _Place
    b: _Place
    magnitude: _Place | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(M, N) of the change; an embedding has a row per token."""
        inputs, outputs = self.a.shape[1], self.b.shape[0]
        return (inputs, outputs) if self.embedding else (outputs, inputs)


class Adapter:
    """A LoRA or DoRA folder by the canonical names of the base's weights that it changes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_adapter_config(folder)
        self.saved: dict[str, _Place] = {}
        parts: dict[str, dict[str, _Place]] = {}
        for key, place in _raw_places(folder).items():
            if found := _LORA.fullmatch(key):
                parts.setdefault(found["path"], {"embedding": found["embedding"]})[found["side"]] = place
            elif found := _MAGNITUDE.fullmatch(key):
                parts.setdefault(found["path"], {})["magnitude"] = place
            else:
                plain = key.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
                self.saved[canonical(plain.replace(".default.", "."))] = place
        self.lora = {canonical(f"{path}.weight"): self._lora(path, found) for path, found in parts.items()}

    def factors(self, name: str) -> Factors:
        """The low-rank change of one weight, oriented as y = W x; an embedding's has a row per token."""
        lora = self.lora[name]
        a_RN, b_MR = lora.a.read().float(), lora.b.read().float()
        scaled_MR = b_MR * self.scale(lora.path, a_RN.shape[0])
        return Factors(a_RN.T, scaled_MR.T) if lora.embedding else Factors(scaled_MR, a_RN)

    def applied(self, name: str, weight: Any) -> Any:
        """The weight with this adapter merged into it, if it is one that the adapter changes."""
        if name not in self.lora:
            return weight
        lora, changed = self.lora[name], weight + self.factors(name).dense()
        if lora.magnitude is None:
            return changed
        outputs = 1 if lora.embedding else 0
        norm = torch.linalg.vector_norm(changed, dim=1 - outputs, keepdim=True)
        return changed * lora.magnitude.read().float().reshape(norm.shape) / norm

    def scale(self, path: str, rank: int) -> float:
        """α/r, or α/√r with rsLoRA; the factors' own r, and α from the pattern that fits the module's path."""
        patterns = self.config.get("alpha_pattern") or {}
        module = path.removeprefix("base_model.model.")  # PEFT matches names within the base, so `^model` fits
        found = (alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
        alpha = next(found, self.config["lora_alpha"])
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _lora(self, path: str, parts: dict[str, Any]) -> _Lora:
        if not {"A", "B"} <= parts.keys():
            raise ModelLoadError(
                f"{self.folder} holds one factor of {canonical(path)} and not the other; fetch the adapter again"
            )
        if parts["A"].shape[0] != parts["B"].shape[1]:
            raise ModelLoadError(
                f"{self.folder}: the factors of {canonical(path)} have shapes {parts['B'].shape} and "
                f"{parts['A'].shape}, which cannot be multiplied; fetch the adapter again"
            )
        return _Lora(path, bool(parts["embedding"]), parts["A"], parts["B"], parts.get("magnitude"))


class OpenSide:
    """One side of the pair, opened: its checkpoint, and what its adapters do to it."""

    def __init__(self, side: WeightSide, like: "OpenSide | None" = None) -> None:
        folder, adapters = side.folder, side.adapters
        if any(_needs_merging(adapter) for adapter in adapters):
            folder, adapters = merged(folder, adapters, remote_code=side.remote_code), ()
        same = like is not None and like.checkpoint.folder == folder
        self.checkpoint = like.checkpoint if same else _Checkpoint(folder)
        self.adapters = {folder: Adapter(folder) for folder in adapters}
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

    def dense(self, name: str, *, flip: bool = False, expert: int | None = None) -> Any:
        """The whole tensor in float32, or one expert of those that it stacks; transposed if asked, adapters added."""
        place = self.place(name)
        tensor = place.read().float() if expert is None else place.read(slice(expert, expert + 1))[0].float()
        tensor = tensor.mT if flip else tensor
        for adapter in self.adapters.values():
            tensor = adapter.applied(name, tensor)
        return tensor

    def is_low_rank(self, name: str) -> bool:
        """Whether all that the adapters do to the stored tensor is to add low-rank products."""
        own = [adapter.lora[name] for adapter in self.adapters.values() if name in adapter.lora]
        return all(lora.magnitude is None for lora in own)

    def _changed(self, adapter: Adapter) -> Iterator[tuple[str, _Place]]:
        """Stored tensors that differ from the checkpoint's: PEFT also stores untouched embeddings."""
        for name, place in adapter.saved.items():
            own = self.checkpoint.place(name)
            if own is None or own.shape != place.shape or not torch.equal(own.read().float(), place.read().float()):
                yield name, place

    def _check_fits(self, adapter: Adapter) -> None:
        for name in adapter.lora:
            place, shape = self.place(name), adapter.lora[name].shape
            if place is None or place.shape not in (shape, shape[::-1]):
                own = f"has it as {place.shape}" if place else "does not have it"
                raise ModelLoadError(
                    f"adapter {adapter.folder} changes {name} of shape {shape}, base {self.checkpoint.folder} {own}; "
                    "it was made for another base model"
                )


def _raw_places(folder: Path) -> dict[str, _Place]:
    """Tensors by key, from the files that transformers and PEFT would load: a second copy in another layout is not read."""
    files = weight_files(folder)
    by_name = {file.name: file for file in files}
    stems = ("model.safetensors", "adapter_model.safetensors")
    whole = next((name for name in stems if name in by_name), None)
    indices = sorted(folder.glob("*.safetensors.index.json"), key=lambda file: file.name.removesuffix(".index.json") not in stems)
    if whole:
        files = [by_name[whole]]
    elif indices:
        shards = set(_read_json(indices[0])["weight_map"].values())
        files = [file for file in files if file.name in shards]
    return {key: _Place(file, key, shape) for file in files for key, shape in tensor_shapes(file).items()}


def _places(folder: Path) -> dict[str, _Place]:
    """Tensors by canonical name; where two would share one, both keep their full key."""
    raw = _raw_places(folder)
    n_keys = Counter(map(canonical, raw))
    return {canonical(key) if n_keys[canonical(key)] == 1 else key: place for key, place in raw.items()}


def _needs_merging(folder: Path) -> bool:
    """Whether an adapter's change is anything but s B A, DoRA's rescaling and tensors stored whole."""
    config = read_adapter_config(folder)
    start = str(config.get("init_lora_weights", "")).lower()
    if config.get("peft_type") != "LORA" or start.startswith(BASE_CHANGING_STARTS):
        return True
    places = _raw_places(folder)
    factors = [place for key, place in places.items() if _LORA.fullmatch(key)]
    own = [key for key in places if ".lora_" in key and not _LORA.fullmatch(key) and not _MAGNITUDE.fullmatch(key)]
    tokens = [key for key in places if "token_adapter" in key or ".trainable_tokens_" in key]
    return bool(own or tokens or any(config.get(key) for key in _CHANGES_MORE)) or any(
        len(place.shape) != 2 for place in factors
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise ModelLoadError(f"{file} is not JSON ({error}); save it again") from error
