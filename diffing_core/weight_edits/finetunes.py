"""The finetunes that a specification names, as changes of weights on disk: registered ones, repositories and folders."""

from pathlib import Path

from diffing_core.errors import ModelLoadError, NotComputableError, RegistryError, UndeclaredNeedError
from diffing_core.pairs import Pair
from diffing_core.registry import Registry
from diffing_core.registry.sources import Source, fetch, revision_of
from diffing_core.settings import short_hash
from diffing_core.weight_edits.changes import Term
from diffing_core.weight_edits.specification import AdapterEdit
from diffing_core.weight_files import WeightSide
from diffing_core.weights import WeightPair


class Finetunes:
    """Finds what adapters of specifications name, for one base model, and remembers what was asked for.

    Every change starts at the registered base, also where the registry compares a finetune with a twin.
    """

    name = ""
    """No corpus was read."""

    def __init__(self, model: str, registry: Registry) -> None:
        self._model, self._registry = model, registry
        self._revisions: dict[str, str] = {}
        self._is_identified = False

    @property
    def content_hash(self) -> str:
        """Of which finetunes were asked for and what was in them, empty for none; from then on no other can be."""
        self._is_identified = True
        return short_hash(self._revisions) if self._revisions else ""

    def term(self, adapter: AdapterEdit) -> Term:
        """The change of the finetune that an adapter names, and what is done to it.

        Raises:
            RegistryError: an unknown model, organism or variant, or an adapter that names no finetune.
            ModelLoadError: a folder or repository does not exist or cannot be reached.
            NotComputableError: the base model itself, which has no change.
            UndeclaredNeedError: the result's identity is known already, and this finetune is not in it.
        """
        entry = self._registry.model(self._model)
        adapted = (self._folder(entry.adapter),) if entry.adapter else ()
        code = {"remote_code": entry.trust_remote_code}
        base = WeightSide(self._folder(entry.source, **code), adapted, **code)
        tuned = self._tuned(adapter, base)
        if base == tuned:
            raise NotComputableError(f"{adapter.place} is the base model itself, so nothing can be added; name a finetune")
        if self._is_identified and adapter.place not in self._revisions:
            raise UndeclaredNeedError(f"{adapter.place} was asked for after the result got its identity; ask before")
        self._revisions[adapter.place] = side_revision(tuned)
        return term_of(adapter, WeightPair(base, tuned, base.folder, entry))

    def _tuned(self, adapter: AdapterEdit, base: WeightSide) -> WeightSide:
        if adapter.organism is not None:
            return WeightPair.of(Pair(self._model, adapter.organism, adapter.variant), self._registry).tuned
        folder = self._folder(adapter.source) if adapter.source else adapter.path
        if folder is None:
            raise RegistryError("an adapter names no finetune; give it an organism, a source or a path")
        if not folder.is_absolute():
            raise RegistryError(f"path {folder} of an adapter is relative, and settings lie in no folder; give the whole path")
        if not folder.is_dir():
            raise ModelLoadError(f"no folder {folder}; paths in a specification file count from its own folder")
        return WeightSide(folder) if (folder / "config.json").exists() else base.plus(folder)

    def _folder(self, source: Source, **options: bool) -> Path:
        return fetch(self._registry.resolve(source, self._model), **options).folder


def term_of(adapter: AdapterEdit, pair: WeightPair) -> Term:
    """What an adapter asks to be done to the change of a pair."""
    return Term(pair, adapter.layer_amplifications, adapter.rank, adapter.residual, adapter.keep_norm, adapter.turn_seed)


def side_revision(side: WeightSide) -> str:
    """Identity of a model state on disk."""
    return "+".join(revision_of(folder) for folder in (side.folder, *side.adapters))
