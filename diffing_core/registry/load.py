"""Reads registry folders: `models/`, `corpora/`, `organisms/` and `servers/`, one YAML file per entry.

Every problem of every file is collected and told in one RegistryError, a line each.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from diffing_core.errors import RegistryError
from diffing_core.pairs import Pair
from diffing_core.registry.problems import close_to, describe
from diffing_core.registry.schema import TRAINING, Corpus, Entry, Model, Organism, Server, Variant
from diffing_core.registry.sources import HubRef, Source, is_present, locate
from diffing_core.registry.yaml_files import read_mapping
from diffing_core.settings import diffing_home

_KINDS: dict[str, type[Entry]] = {"models": Model, "corpora": Corpus, "organisms": Organism, "servers": Server}
PACKAGED = Path(__file__).parent.parent / "demo" / "registry"


@dataclass(frozen=True)
class Registry:
    """All entries by name."""

    models: Mapping[str, Model]
    corpora: Mapping[str, Corpus]
    organisms: Mapping[str, Organism]
    servers: Mapping[str, Server] = field(default_factory=dict)

    @classmethod
    def load(cls, *roots: Path) -> "Registry":
        """Reads these folders as one registry; a folder that does not exist is empty.

        Raises:
            RegistryError: with one line for every problem of every file.
        """
        return _build([file for root in roots for file in _files_of(root)])

    def model(self, name: str) -> Model:
        """The base model of that name, or RegistryError."""
        return _get(self.models, name, "model")

    def corpus(self, name: str) -> Corpus:
        """The corpus of that name, or RegistryError."""
        return _get(self.corpora, name, "corpus")

    def organism(self, name: str) -> Organism:
        """The organism of that name, or RegistryError."""
        return _get(self.organisms, name, "organism")

    def variant(self, pair: Pair) -> Variant:
        """The organism's variant that a pair names, or RegistryError."""
        of_model = _get(self.organism(pair.organism).variants, pair.model, f"base model for {pair.organism}")
        return _get(of_model, pair.variant, f"variant of {pair.organism} on {pair.model}")

    def pairs(self, model: str | None = None) -> tuple[Pair, ...]:
        """Every pair, or those of one base model, sorted by model, organism and variant."""
        return tuple(
            sorted(
                Pair(base, organism.name, variant)
                for organism in self.organisms.values()
                for base, variants in organism.variants.items()
                for variant in variants
                if model in (None, base)
            )
        )

    def resolve(self, source: Source, model: str) -> Path | HubRef:
        """Local path or hub reference; demo artifacts are looked up for that base model."""
        return locate(source, model)

    def probes(self, pair: Pair) -> tuple[Corpus, ...]:
        """What a pair is probed with: its variant's corpora or its model's, and `training` where that is asked for."""
        names = self.variant(pair).corpora
        trained_on = self.organism(pair.organism).training_corpus
        asked = (trained_on.as_corpus(),) if trained_on and trained_on.probe else ()
        return (*map(self.corpus, self.model(pair.model).corpora if names is None else names), *asked)

    def place_of(self, corpus: Corpus, model: str) -> Path | HubRef | None:
        """Where a corpus's files are; None if its entry holds the texts."""
        return None if corpus.source is None else self.resolve(corpus.source, model)

    def is_available(self, pair: Pair) -> bool:
        """Whether a pair can be loaded now: its local folders exist and its demo artifacts are built.

        Hub repositories count as there; whether they can be reached is known when they are fetched.
        """
        model, variant = self.model(pair.model), self.variant(pair)
        against = variant.against.source if variant.against else None
        needed = [source for source in (model.source, model.adapter, variant.source, against) if source]
        return all(is_present(source, pair.model) for source in needed)


def load_registry() -> Registry:
    """The packaged entries of the embedded demo and those of `$DIFFING_HOME/registry`."""
    return Registry.load(*_default_roots())


def add_organism(file: Path, root: Path | None = None) -> Organism:
    """Copies an organism file into a registry root (`$DIFFING_HOME/registry`), if it is valid there.

    Raises:
        RegistryError: the file, or the registry together with it, is not valid; nothing was copied.
    """
    root = root or diffing_home() / "registry"
    others = [known for known_root in dict.fromkeys([*_default_roots(), root]) for known in _files_of(known_root)]
    registry = _build([*others, _File("organisms", file, root)])
    target = root / "organisms" / file.name
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_suffix(f".{os.getpid()}.tmp")
    aside.write_bytes(file.read_bytes())
    aside.replace(target)
    return registry.organism(file.stem)


@dataclass(frozen=True)
class _File:
    """A YAML file, what it holds (`models`, …), and the root that its relative paths count from."""

    kind: str
    path: Path
    root: Path

    def entry(self) -> Entry:
        """The validated entry; raises RegistryError or pydantic's ValidationError, which do not name the file."""
        entry = _KINDS[self.kind].model_validate(read_mapping(self.path), context={"root": self.root})
        if entry.name != self.path.stem:
            raise RegistryError(f"name: {entry.name!r} in a file called {self.path.name}; make the two equal")
        if isinstance(entry, Corpus) and entry.name == TRAINING:
            raise RegistryError(f"name: {TRAINING!r} is what an organism's training_corpus is called; take another one")
        return entry


def _default_roots() -> tuple[Path, Path]:
    return PACKAGED, diffing_home() / "registry"


def _files_of(root: Path) -> list[_File]:
    return [_File(kind, path, root) for kind in _KINDS for path in sorted((root / kind).glob("*.y*ml"))]


def _build(files: Iterable[_File]) -> Registry:
    entries: dict[str, dict[str, Entry]] = {kind: {} for kind in _KINDS}
    places: dict[tuple[str, str], Path] = {}
    problems: list[str] = []
    for file in files:
        if file.path.suffix != ".yaml":
            problems.append(f"{file.path}: registry files end in .yaml; rename it")
            continue
        first = places.setdefault((file.kind, file.path.stem), file.path)
        if first is not file.path:
            problems.append(f"{file.path}: {file.kind} {file.path.stem!r} is already in {first}; rename one of them")
            continue
        try:
            entries[file.kind][file.path.stem] = file.entry()
        except ValidationError as error:
            problems += [f"{file.path}: {line}" for line in describe(error, _KINDS[file.kind])]
        except RegistryError as error:
            problems.append(f"{file.path}: {error}")
    problems += _dangling(entries, places)
    if problems:
        raise RegistryError(f"{len(problems)} problem(s) in the registry:\n" + "\n".join(problems))
    return Registry(**entries)


def _dangling(entries: dict[str, dict[str, Entry]], places: dict[tuple[str, str], Path]) -> list[str]:
    """Names that no file has; a file that is itself in error counts as present, so that one error is told once."""
    known = {kind: [name for of_kind, name in places if of_kind == kind] for kind in _KINDS}
    return [
        f"{places[kind, name]}: {where}: no {what[:-1] if what == 'models' else 'corpus'} {asked!r}{close_to(asked, known[what])}"
        for kind in ("models", "organisms", "servers")
        for name, entry in entries[kind].items()
        for where, what, asked in _references(entry)
        if asked not in known[what]
    ]


def _references(entry: Model | Organism | Server) -> Iterable[tuple[str, str, str]]:
    """(field, kind, name) of every other entry that this one names."""
    if isinstance(entry, Server):
        yield "name", "models", entry.name
        return
    if isinstance(entry, Model):
        yield from (("corpora", "corpora", corpus) for corpus in entry.corpora)
        return
    for model, variants in entry.variants.items():
        yield f"variants.{model}", "models", model
        for name, variant in variants.items():
            yield from ((f"variants.{model}.{name}.corpora", "corpora", corpus) for corpus in variant.corpora or ())


def _get(entries: Mapping, name: str, what: str):
    if name not in entries:
        raise RegistryError(f"no {what} {name!r} in the registry{close_to(name, entries)}")
    return entries[name]
