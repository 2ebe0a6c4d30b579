"""What a finetune changed in the weights: one TensorDelta at a time, read from safetensors, no model built.

    weight_stream(pair)     -> TensorDelta of every tensor that may differ, experts that one tensor stacks one by one
    OpenPair(pair)          -> the same by name: `names`, `deltas(name)`, and `unmatched`, which only one side has or which
                               cannot be laid over each other

ΔW = tuned − base. A LoRA adapter gives its factors (see weight_files.py), and never the product; against another
adapter of the same base (a seed twin) the factors are stacked, [s₁B₁, −s₂B₂] and [A₁; A₂], which is exact. Whole
checkpoints, saved modules, trained biases, DoRA and merged adapters of other kinds give both tensors in float32.
Matrices are oriented as y = W x, rows are outputs; embeddings and heads have a row per token.

Suffixes: M rows (outputs), N columns (inputs), R rank.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from diffing_core.checkpoints import has_tokenizer, load_tokenizer
from diffing_core.lazy import torch
from diffing_core.pairs import Pair
from diffing_core.registry import Model, Registry, Source, Weights
from diffing_core.registry.sources import fetch
from diffing_core.spectra import Factors
from diffing_core.tensor_names import Part, model_order, place_of
from diffing_core.weight_files import OpenSide, WeightSide


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

        def folder(source: Source, **options: bool) -> Path:
            return fetch(registry.resolve(source, pair.model), **options).folder

        def side(weights: Weights | None) -> WeightSide:
            if weights is None or weights.source is None:
                return base
            if weights.kind == "full":
                return WeightSide(folder(weights.source))
            return base.plus(folder(weights.source))

        code = {"remote_code": entry.trust_remote_code}
        base = WeightSide(folder(entry.source, **code), (folder(entry.adapter),) if entry.adapter else (), **code)
        tokenizer = folder(entry.tokenizer, weights=False, **code) if entry.tokenizer else base.folder
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
        return load_tokenizer(self.tokenizer_folder, self.entry, remote_code=self.entry.trust_remote_code)

    def tokenizer_of(self, side: WeightSide) -> Any:
        """The tokenizer that lies beside one side's weights, which may know more tokens; else the base model's."""
        found = (folder for folder in (*reversed(side.adapters), side.folder) if has_tokenizer(folder))
        folder = next(found, self.tokenizer_folder)
        return load_tokenizer(folder, self.entry, remote_code=self.entry.trust_remote_code)


@dataclass(frozen=True, eq=False)
class DensePair:
    """Both tensors in float32, subtracted only after the cast; of a resized vocabulary the common rows.

    `only_base`, `only_tuned`: the rows that follow on one side; None where both have as many.
    """

    base: Any
    tuned: Any
    only_base: Any = None
    only_tuned: Any = None


@dataclass(frozen=True, eq=False)
class TensorDelta:
    """The change of one tensor, or of one expert of a tensor that stacks them; exactly one of `factors` and `pair` is given.

    Attributes:
        name: key without the wrappers that differ between ways of saving, e.g. `layers.0.mlp.up_proj.weight`.
        layer: block, from 0; None outside of blocks.
        shape: of the change, oriented as y = W x; the common rows of a resized vocabulary.
        n_left_out: rows that only one side has.
        flipped: whether the files hold it the other way round, as [inputs, outputs].
        expert: its number, from 0; None for a whole tensor.
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
    flipped: bool = False
    expert: int | None = None

    @property
    def title(self) -> str:
        """The tensor's name, with the number of the expert."""
        return self.name if self.expert is None else f"{self.name}[{self.expert}]"

    def __post_init__(self) -> None:
        if (self.factors is None) == (self.pair is None):
            raise TypeError(f"delta of {self.name}: give factors or a dense pair, not both or neither")


@dataclass(frozen=True)
class Unmatched:
    """A tensor without a counterpart of fitting shape."""

    name: str
    status: Literal["only_in_base", "only_in_tuned", "other_shape"]
    shape: tuple[int, ...]


class OpenPair:
    """Both sides of a pair, opened; a tensor is read when its delta is asked for.

    Attributes:
        names: tensors that may differ, in the order of the model; none where both sides are the same files.
        unmatched: tensors that cannot be compared: they are listed, never dropped.

    Raises:
        ModelLoadError: a damaged file, or an adapter that does not fit the base.
        NotComputableError: quantised weights, or an adapter that cannot be written as weights.
    """

    def __init__(self, pair: WeightPair, like: "OpenPair | None" = None) -> None:
        """`like`: a pair of the same base, of which each tensor is read once as long as the two are asked in turn."""
        self._side = pair.base
        shared = like if like is not None and like._side == pair.base else None
        self._base = shared._base if shared else OpenSide(pair.base)
        self._tuned = OpenSide(pair.tuned, self._base)
        self._before = shared._before if shared else lru_cache(maxsize=1)(self._base.dense)
        self.names, self.unmatched = _matched(self._base, self._tuned)

    def experts(self, name: str) -> Sequence[int | None]:
        """Numbers of the experts that one of `names` stacks [E, M, N]; of any other tensor None alone, itself."""
        shape = self._base.place(name).shape
        return range(shape[0]) if len(shape) == 3 and place_of(name)[1] == "mlp" else (None,)

    def without_place(self) -> Iterator[tuple[str, str]]:
        """What the tuned side has and the base has no place for, by tensor: rows of a larger vocabulary, or a whole tensor."""
        for each in self.unmatched:
            if each.status != "only_in_base":
                yield each.name, f"the whole tensor {list(each.shape)}"
        for name in self.names:
            before, after = self._base.place(name).shape, self._tuned.place(name).shape
            if len(before) and after[0] > before[0]:
                yield name, f"rows {before[0]} to {after[0] - 1}"

    def deltas(self, name: str) -> Iterator[TensorDelta]:
        """The change of one of `names`, expert by expert; raises as `delta`."""
        for expert in self.experts(name):
            yield self.delta(name, expert)

    def delta(self, name: str, expert: int | None = None) -> TensorDelta:
        """The change of one of `names`, or of one of its experts, of which no other is read.

        Raises:
            ModelLoadError: the tensor holds NaN or infinite values.
        """
        base, tuned = self._base, self._tuned
        flip = _is_flipped(name, base, tuned)
        named = (name, *place_of(name))
        stored_once = base.checkpoint is tuned.checkpoint and base.saved.get(name) == tuned.saved.get(name)
        if stored_once and base.is_low_rank(name) and tuned.is_low_rank(name):
            factors = _difference(name, base, tuned)
            return TensorDelta(*named, factors.shape, lambda: self._before(name, flip=flip), factors, flipped=flip)
        before, after = self._before(name, flip=flip, expert=expert), tuned.dense(name, flip=flip, expert=expert)
        pair = _aligned(before, after) if before.ndim else DensePair(before, after)
        n_left_out = sum(len(rows) for rows in (pair.only_base, pair.only_tuned) if rows is not None)
        return TensorDelta(*named, tuple(pair.base.shape), lambda: pair.base, None, pair, n_left_out, flip, expert)


def weight_stream(pair: WeightPair) -> Iterator[TensorDelta]:
    """Every tensor that may differ, in the order of the model, expert by expert; raises as `OpenPair`."""
    opened = OpenPair(pair)
    for name in opened.names:
        yield from opened.deltas(name)


def _matched(base: OpenSide, tuned: OpenSide) -> tuple[list[str], list[Unmatched]]:
    """Names to compare, in the order of the model, and those that have no counterpart."""
    names = base.touched() | tuned.touched()
    if base.checkpoint is not tuned.checkpoint:
        names |= base.checkpoint.names() | tuned.checkpoint.names()
    elif base.adapters.keys() == tuned.adapters.keys():
        names = set()
    matched: list[str] = []
    unmatched: list[Unmatched] = []
    for name in sorted(names, key=model_order):
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


def _aligned(before: Any, after: Any) -> DensePair:
    """Common rows beside each other, the others apart."""
    n = min(len(before), len(after))
    rest = [rows[n:] if len(rows) > n else None for rows in (before, after)]
    return DensePair(before[:n], after[:n], *rest)


def _resized(name: str, before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    return place_of(name)[1] in ("embed", "head") and before[1:] == after[1:]


def _is_flipped(name: str, base: OpenSide, tuned: OpenSide) -> bool:
    """Whether the files hold [inputs, outputs]: seen in the factors' shape, else declared, else known for the class."""
    stored = base.place(name).shape
    adapters = [each for side in (base, tuned) for each in side.adapters.values() if name in each.lora]
    if adapters and stored != stored[::-1]:
        return stored != adapters[0].lora[name].shape
    if len(stored) == 3:
        return base.checkpoint.has_flipped_experts(name)
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
    rows, columns = like.lora[name].shape
    lefts = [torch.zeros(rows, 0), *(term.left_MR for term in gained), *(-term.left_MR for term in lost)]
    rights = [torch.zeros(0, columns), *(term.right_RN for term in (*gained, *lost))]
    return Factors(torch.cat(lefts, 1), torch.cat(rights))
