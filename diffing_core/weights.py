"""What a finetune changed in the weights: one TensorDelta at a time, read from safetensors, no model built.

    weight_stream(pair)    -> TensorDelta of every tensor that may differ
    unmatched_tensors(pair) -> those that only one side has, or that cannot be laid over each other

ΔW = tuned − base. A LoRA adapter gives its factors, ΔW = B A with s = α/r (rsLoRA: α/√r) folded into B, and
never the product; against another adapter of the same base (a seed twin) the factors are stacked,
[s₁B₁, −s₂B₂] and [A₁; A₂], which is exact. Whole checkpoints, saved modules and trained biases give both
tensors in float32. Matrices are oriented as y = W x, rows are outputs; embeddings and heads have a row per token.

Suffixes: M rows (outputs), N columns (inputs), R rank, D model width, V vocabulary.
Reference: Hu et al. 2021 (LoRA), Kalajdzievski 2023 (rsLoRA); names as PEFT writes them.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open

from diffing_core.checkpoints import load_tokenizer
from diffing_core.errors import ModelLoadError, NotComputableError
from diffing_core.lazy import torch
from diffing_core.pairs import Pair
from diffing_core.registry import Model, Registry, Source, Weights
from diffing_core.registry.sources import fetch
from diffing_core.safetensor_files import tensor_shapes, weight_files
from diffing_core.spectra import Factors

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
POSITIONS = ("wpe", "embed_positions", "position_embeddings")
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


@dataclass(frozen=True)
class WeightPair:
    """Base and tuned on disk. `entry` says how to read the tokenizer, which lies in `tokenizer_folder`."""

    base: WeightSide
    tuned: WeightSide
    tokenizer_folder: Path
    entry: Model

    @classmethod
    def of(cls, pair: Pair, registry: Registry) -> "WeightPair":
        """The files of a registered pair, brought to this machine; no weights are loaded.

        Raises:
            RegistryError: no such pair.
            ModelLoadError: a folder or repository does not exist or cannot be reached.
        """
        entry, variant = registry.model(pair.model), registry.variant(pair)

        def folder(source: Source) -> Path:
            return fetch(registry.resolve(source, pair.model), remote_code=entry.trust_remote_code).folder

        def side(weights: Weights | None) -> WeightSide:
            if weights is None or weights.source is None:
                return base
            if weights.kind == "full":
                return WeightSide(folder(weights.source))
            return WeightSide(base.folder, (*base.adapters, folder(weights.source)))

        base = WeightSide(folder(entry.source), (folder(entry.adapter),) if entry.adapter else ())
        tokenizer = folder(entry.tokenizer) if entry.tokenizer else base.folder
        return cls(side(variant.against), side(variant), tokenizer, entry)

    @classmethod
    def of_folders(cls, base: Path, tuned: Path, *, against: Path | None = None) -> "WeightPair":
        """A pair of folders without a registry; a folder with adapter_config.json and no config.json is an adapter."""

        def side(folder: Path) -> WeightSide:
            is_adapter = (folder / "adapter_config.json").exists() and not (folder / "config.json").exists()
            return WeightSide(base, (folder,)) if is_adapter else WeightSide(folder)

        entry = Model(name="base", source=Source(path=base))
        return cls(side(against or base), side(tuned), base, entry)

    def tokenizer(self) -> Any:
        """The base model's tokenizer."""
        return load_tokenizer(self.tokenizer_folder, self.entry)


@dataclass(frozen=True, eq=False)
class DensePair:
    """Both tensors in float32, subtracted only after the cast."""

    base: Any
    tuned: Any


@dataclass(frozen=True, eq=False)
class TensorDelta:
    """The change of one tensor; exactly one of `factors` and `pair` is given.

    Attributes:
        name: key without the wrappers that differ between ways of saving, e.g. `layers.0.mlp.up_proj.weight`.
        layer: block, from 0; None outside of blocks.
        shape: of the change, oriented as y = W x; the common rows of a resized vocabulary.
        n_left_out: rows that only one side has.
        load_base: reads the base's tensor in the same orientation, float32.
    """

    name: str
    layer: int | None
    part: Part
    projection: str
    shape: tuple[int, ...]
    load_base: Callable[[], Any]
    factors: Factors | None = None
    pair: DensePair | None = None
    n_left_out: int = 0

    def __post_init__(self) -> None:
        if (self.factors is None) == (self.pair is None):
            raise TypeError(f"delta of {self.name}: give factors or a dense pair, not both or neither")


@dataclass(frozen=True)
class Unmatched:
    """A tensor without a counterpart of fitting shape."""

    name: str
    status: Literal["only_in_base", "only_in_tuned", "other_shape"]
    shape: tuple[int, ...]


def weight_stream(pair: WeightPair) -> Iterator[TensorDelta]:
    """Every tensor that may differ, in the order of the model; nothing at all where both sides are the same files.

    Raises:
        ModelLoadError: a damaged file, or an adapter that does not fit the base.
        NotComputableError: quantised weights, or an adapter that is not a plain LoRA.
    """
    base, tuned = _opened(pair)
    for name in _matched(base, tuned)[0]:
        yield _delta(name, base, tuned)


def unmatched_tensors(pair: WeightPair) -> list[Unmatched]:
    """Tensors that cannot be compared: they are listed, never dropped."""
    return _matched(*_opened(pair))[1]


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


def canonical(name: str) -> str:
    """The name without leading wrappers, which depend on the class that saved the file."""
    words = name.split(".")
    while len(words) > 2 and words[0] in _WRAPPERS:
        words = words[1:]
    return ".".join(words)


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


def _matched(base: OpenSide, tuned: OpenSide) -> tuple[list[str], list[Unmatched]]:
    """Names to compare, in the order of the model, and those that have no counterpart."""
    names = base.touched() | tuned.touched()
    if base.checkpoint is not tuned.checkpoint:
        names |= base.checkpoint.names() | tuned.checkpoint.names()
    elif base.adapters.keys() == tuned.adapters.keys():
        names = set()
    matched: list[str] = []
    unmatched: list[Unmatched] = []
    for name in sorted(names, key=_model_order):
        before, after = base.place(name), tuned.place(name)
        if after is None:
            unmatched.append(Unmatched(name, "only_in_base", before.shape))
        elif before is None:
            unmatched.append(Unmatched(name, "only_in_tuned", after.shape))
        elif before.shape == after.shape or _resized(name, before.shape, after.shape):
            matched.append(name)
        else:
            unmatched.append(Unmatched(name, "other_shape", after.shape))
    return matched, unmatched


def _resized(name: str, before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    return place_of(name)[1] in ("embed", "head") and before[1:] == after[1:]


def _delta(name: str, base: OpenSide, tuned: OpenSide) -> TensorDelta:
    flip = _is_flipped(name, base, tuned)
    named = (name, *place_of(name))
    if base.checkpoint is tuned.checkpoint and base.saved.get(name) == tuned.saved.get(name):
        factors = _difference(name, base, tuned)
        return TensorDelta(*named, factors.shape, lambda: base.dense(name, flip=flip), factors)
    before, after = base.dense(name, flip=flip), tuned.dense(name, flip=flip)
    n_left_out = abs(len(before) - len(after)) if before.ndim else 0
    if n_left_out:
        before, after = before[: len(after)], after[: len(before)]
    return TensorDelta(*named, tuple(before.shape), lambda: before, None, DensePair(before, after), n_left_out)


def _is_flipped(name: str, base: OpenSide, tuned: OpenSide) -> bool:
    """Whether the files hold [inputs, outputs]: seen from the factors' shape, else declared, else known for the class."""
    stored = base.place(name).shape
    adapters = [each for side in (base, tuned) for each in side.adapters.values() if name in each.lora]
    if adapters and stored != stored[::-1]:
        return stored != adapters[0].shape(name)
    declared = any(each.config.get("fan_in_fan_out") for each in adapters)
    return declared or (len(stored) == 2 and base.checkpoint.is_conv1d(name))


def _difference(name: str, base: OpenSide, tuned: OpenSide) -> Factors:
    """Tuned's low-rank terms minus base's; terms that both have cancel exactly."""
    gained = [each.factors(name) for each in tuned.adapters.values() if name in each.lora]
    lost = [each.factors(name) for each in base.adapters.values() if name in each.lora]
    for term in list(gained):
        same = next((other for other in lost if term.equals(other)), None)
        if same is not None:
            gained.remove(term)
            lost.remove(same)
    like = next(each for side in (tuned, base) for each in side.adapters.values() if name in each.lora)
    rows, columns = like.shape(name)
    lefts = [torch.zeros(rows, 0), *(term.left_MR for term in gained), *(-term.left_MR for term in lost)]
    rights = [torch.zeros(0, columns), *(term.right_RN for term in (*gained, *lost))]
    return Factors(torch.cat(lefts, 1), torch.cat(rights))


def _opened(pair: WeightPair) -> tuple[OpenSide, OpenSide]:
    """Both sides; one checkpoint object where they are the same files."""
    base = OpenSide(pair.base)
    same = pair.base.folder == pair.tuned.folder
    return base, OpenSide(pair.tuned, base.checkpoint if same else None)


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


def _model_order(name: str) -> tuple:
    """Embeddings, blocks by number, then the rest; names in a block by alphabet."""
    layer, part, _ = place_of(name)
    numbered = [(1, int(word), "") if word.isdigit() else (0, 0, word) for word in name.split(".")]
    return (0 if part == "embed" else 1 if layer is not None else 2, layer or 0, numbered)
