"""Models to compare: one resident base, and K finetunes of it as adapters on that copy or beside it.

LoRA and DoRA adapters share the base's copy; other kinds, and those that change the base itself, are merged by PEFT
into a checkpoint of their own (merged_adapters.py), which stands beside the base like a whole finetune.

load_pair(organism, model="demo")  -> ModelPair(base, tuned, tokenizer, …)
load_cohort(pairs, registry)       -> Cohort: ModelPairs that share their base
"""

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffing_core.adapters import add_adapter, is_switchable, read_adapter_config
from diffing_core.checkpoints import (
    compare_tokenizer,
    default_device,
    load_module,
    load_tokenizer,
    token_id,
)
from diffing_core.errors import FAILS_ALONE, DiffingError, ModelLoadError
from diffing_core.merged_adapters import merged
from diffing_core.pairs import Pair
from diffing_core.registry import Model, Organism, Registry, Variant, Weights, load_registry
from diffing_core.registry.sources import Fetched, Source, fetch, revision_of
from diffing_core.serving import Served
from diffing_core.settings import short_hash
from diffing_core.subject import Subject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_IDENTICAL = "identical"
_ADHOC = Pair("adhoc", "adhoc")


@dataclass(frozen=True)
class ModelPair:
    """Base and tuned, ready to compare; token ids below `common_vocab` mean the same in both."""

    base: Subject
    tuned: Subject
    tokenizer: "PreTrainedTokenizerBase"
    pair: Pair
    common_vocab: int
    adapter_hash: str = ""
    notes: tuple[str, ...] = ()
    tokenizer_revision: str = ""

    @classmethod
    def of(cls, base: Any, tuned: Any, tokenizer: Any, pair: Pair = _ADHOC) -> "ModelPair":
        """A pair of modules or Subjects that are already built, without a registry."""
        base, tuned = (side if isinstance(side, Subject) else Subject.of(side) for side in (base, tuned))
        return cls(base, tuned, tokenizer, pair, min(base.vocab_size, tuned.vocab_size), tuned.revision)

    @property
    def base_revision(self) -> str:
        """Identity of the base side: its weights, and a tokenizer that is not its own."""
        return "+".join(filter(None, (self.base.revision, self.tokenizer_revision)))


@dataclass(frozen=True)
class Cohort:
    """Pairs of one resident base model; those that could not be loaded are in `failed`, with the reason."""

    base: Subject
    pairs: tuple[ModelPair, ...]
    failed: dict[Pair, Exception] = field(default_factory=dict)

    def __iter__(self) -> Iterator[ModelPair]:
        return iter(self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)


def load_pair(
    organism: Organism | Pair,
    model: str = "demo",
    variant: str = "default",
    *,
    registry: Registry | None = None,
    device: Any = None,
    dtype: str | None = None,
) -> ModelPair:
    """Loads one pair; `dtype` and `device` override the registry entry and the accelerator that is found.

    Raises:
        RegistryError: no such pair.
        ModelLoadError: weights, adapter or tokenizer are missing, damaged or do not belong together.
    """
    pair = organism if isinstance(organism, Pair) else Pair(model, organism.name, variant)
    cohort = load_cohort([pair], registry or load_registry(), device=device, dtype=dtype)
    if cohort.failed:
        raise cohort.failed[pair]
    return cohort.pairs[0]


def load_cohort(pairs: Sequence[Pair], registry: Registry, *, device: Any = None, dtype: str | None = None) -> Cohort:
    """Loads the base once, all adapters onto that copy, and whole checkpoints beside it.

    A finetune that cannot be loaded is recorded in `failed` and does not stop the others.

    Raises:
        RegistryError: an unknown pair.
        ModelLoadError: pairs of several base models, or the base itself cannot be loaded.
    """
    models = sorted({pair.model for pair in pairs})
    if len(models) != 1:
        raise ModelLoadError(
            f"a cohort shares one base model, but the pairs are of {models or 'none'}; load them apart"
        )
    variants = {pair: registry.variant(pair) for pair in pairs}
    resident = _Resident(registry, models[0], device or default_device(), dtype)
    failed: dict[Pair, Exception] = {}
    sides = _each(variants, lambda _, variant: resident.load_sides(variant), failed)
    loaded = _each(sides, resident.pair, failed)
    return Cohort(resident.subject(resident.base), tuple(loaded.values()), failed)


def source_revisions(pair: Pair, registry: Registry) -> tuple[str, str]:
    """(base revision, adapter hash) as the loaded ModelPair will have them, without loading anything."""
    entry, variant = registry.model(pair.model), registry.variant(pair)

    def revision(source: Any) -> str:
        return revision_of(registry.resolve(source, pair.model))

    base = "+".join(revision(source) for source in (entry.source, entry.adapter) if source)
    if variant.against and variant.against.source:
        other = revision(variant.against.source)
        base = other if variant.against.kind == "full" else f"{base}+{other}"
    own = revision_of(registry.resolve(entry.tokenizer, pair.model), weights=False) if entry.tokenizer else None
    base = "+".join(filter(None, (base, _tokenizer_revision(entry, own))))
    return base, revision(variant.source) if variant.source else _IDENTICAL


def _tokenizer_revision(entry: Model, own: str | None) -> str:
    """Identity of what the entry puts in place of the base's tokenizer (`own`), chat template and end of turn."""
    said = [entry.chat_template, entry.end_of_turn, *([entry.template_options] if entry.template_options else [])]
    return "+".join(filter(None, (own, short_hash(said) if any(said) else None)))


@dataclass(frozen=True)
class _Side:
    """How to get one side of a pair from the resident base: an adapter on it, or a module of its own."""

    revision: str
    adapter: str | None = None
    module: Any = None
    own_hash: str = _IDENTICAL
    notes: tuple[str, ...] = ()
    served: Served | None = None


class _Resident:
    """The base's one copy while a cohort is loaded.

    Adding the first adapter wraps the module, so Subjects are made only when all adapters are on it.
    """

    def __init__(self, registry: Registry, model: str, device: Any, dtype: str | None) -> None:
        self.registry, self.device, self.dtype = registry, device, dtype
        self.entry = registry.model(model)
        code = self.entry.trust_remote_code
        base = self._fetch(self.entry.source, remote_code=code)
        self.folder, self.revision = base.folder, base.revision
        self.module = load_module(base.folder, self.entry, dtype or self.entry.dtype, device, remote_code=code)
        self.own_adapters: tuple[Path, ...] = ()
        if self.entry.adapter:
            adapter = self._fetch(self.entry.adapter)
            self.module = add_adapter(self.module, adapter.folder, "own").merge_and_unload(adapter_names=["own"])
            self.revision += f"+{adapter.revision}"
            self.own_adapters = (adapter.folder,)
        own = self.entry.tokenizer and self._fetch(self.entry.tokenizer, remote_code=code, weights=False)
        self.tokenizer = load_tokenizer(own.folder if own else base.folder, self.entry, remote_code=code)
        self.tokenizer_revision = _tokenizer_revision(self.entry, own and own.revision)
        end = self.entry.end_of_turn
        self.stop_ids = () if end is None else (token_id(self.tokenizer, end, f"end_of_turn of model {model}"),)
        self.server = registry.servers.get(model)
        self.base = _Side(self.revision, served=self.server and Served(self.server, self.server.served_name or model))
        self.adapters: dict[Path, str] = {}
        self.numbers = itertools.count()  # a name is not used again, whatever a failed load left behind
        self.subjects: dict[_Side, Subject] = {}

    def load_sides(self, variant: Variant) -> tuple[_Side, _Side]:
        """Loads what a pair needs beside the base: (base side, tuned side)."""
        dtype = self.dtype or variant.dtype or self.entry.dtype
        base = self._side(variant.against, dtype) if variant.against else self.base
        return base, self._side(variant, dtype)

    def subject(self, side: _Side) -> Subject:
        """The runnable, checked side; one object for all pairs that share it, so that a pass runs it once."""
        if side not in self.subjects:
            module = self.module if side.module is None else side.module
            subject = Subject.of(module, side.adapter, side.revision, self.stop_ids)
            self.subjects[side] = replace(subject, served=side.served, template_options=self.entry.template_options)
        return self.subjects[side]

    def pair(self, pair: Pair, sides: tuple[_Side, _Side]) -> ModelPair:
        """Both sides as Subjects; raises ModelLoadError if they are of different architecture."""
        base, tuned = map(self.subject, sides)
        shapes = [(side.n_layers, side.d_model) for side in (base, tuned)]
        if shapes[0] != shapes[1]:
            raise ModelLoadError(
                f"{pair}: base has {shapes[0][0]} layers of width {shapes[0][1]}, the finetune {shapes[1][0]} of "
                f"{shapes[1][1]}; it was made from another base: mend model or source in the registry entry"
            )
        common = min(base.vocab_size, tuned.vocab_size)
        notes = tuple(dict.fromkeys(sides[0].notes + sides[1].notes))
        if base.vocab_size != tuned.vocab_size:
            notes += (
                f"the vocabularies have {base.vocab_size} and {tuned.vocab_size} rows; the first {common} are compared",
            )
        return ModelPair(
            base, tuned, self.tokenizer, pair, common, sides[1].own_hash, notes, self.tokenizer_revision
        )

    def _fetch(self, source: Source, **options: bool) -> Fetched:
        return fetch(self.registry.resolve(source, self.entry.name), **options)

    def _side(self, weights: Weights, dtype: str) -> _Side:
        if weights.source is None:
            return self.base
        code = weights.trust_remote_code
        files = self._fetch(weights.source, remote_code=code)
        notes = compare_tokenizer(self.tokenizer, files.folder, self.entry, remote_code=code)
        if weights.kind == "full":
            module = load_module(files.folder, self.entry, dtype, self.device, remote_code=code)
            return _Side(files.revision, None, module, files.revision, notes, self._served(weights.source))
        notes += self._named_base(files.folder)
        if not is_switchable(files.folder):
            own_code = {"remote_code": self.entry.trust_remote_code}
            whole = merged(self.folder, (*self.own_adapters, files.folder), **own_code)
            module = load_module(whole, self.entry, dtype, self.device, **own_code)
            return _Side(f"{self.revision}+{files.revision}", None, module, files.revision, notes)
        if files.folder not in self.adapters:
            name = f"adapter_{next(self.numbers)}"
            self.module = add_adapter(self.module, files.folder, name)
            self.adapters[files.folder] = name
        name = self.adapters[files.folder]
        served = self._served(weights.source, files)
        return _Side(f"{self.revision}+{files.revision}", name, None, files.revision, notes, served)

    def _served(self, source: Source, adapter: Fetched | None = None) -> Served | None:
        """Where texts of these weights come from; an adapter is loaded there under a name of its content."""
        if self.server is None:
            return None
        name = self.server.names.get(source.demo or str(source))
        if name is None and adapter is not None:
            return Served(self.server, f"adapter-{short_hash(adapter.revision)}", adapter.folder)
        return Served(self.server, name)

    def _named_base(self, folder: Path) -> tuple[str, ...]:
        """A note if the adapter names another base than this, an error if that is another model of the registry."""
        named = read_adapter_config(folder).get("base_model_name_or_path")
        if not named or named == str(self.folder) or named in _identities(self.entry, self.folder):
            return ()
        for other in self.registry.models.values():
            if named in _identities(other, self.folder) or (other.source.demo and named.startswith(f"{other.name}-")):
                raise ModelLoadError(
                    f"adapter {folder} was made for {named}, which is or was model {other.name} of the registry; the "
                    f"pair's base is {self.entry.name} in {self.folder}. Mend the model in variants, or build it again"
                )
        return (f"the adapter names {named} as its base, not {self.entry.source}; names and shapes fit",)


def _identities(entry: Model, folder: Path) -> set[str]:
    """What an adapter's configuration may call a model; the demo's builder writes name-hash, the hash of its folder."""
    if entry.source.demo:
        return {entry.name, f"{entry.name}-{folder.name.rpartition('-')[2]}"}
    return {entry.name, entry.source.repo or str(entry.source.path)}


def _each(items: dict, make: Callable, failed: dict[Pair, Exception]) -> dict:
    """`make(pair, item)` for every pair; where it cannot be loaded, the reason goes to `failed`."""
    made = {}
    for pair, item in items.items():
        try:
            made[pair] = make(pair, item)
        except FAILS_ALONE as error:
            logger.warning("%s cannot be loaded: %s", pair, error, exc_info=not isinstance(error, DiffingError))
            failed[pair] = error
    return made
