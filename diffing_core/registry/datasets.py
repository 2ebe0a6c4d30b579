"""Which files of a dataset are a corpus's subset and split, in a local folder or on the hub.

The rules are those of Hugging Face datasets, for JSON, Parquet and Arrow files; data files of other kinds are named in the log:

1. `configs:` at the head of README.md, where it is, names the files; `subset` is a config_name.
2. Otherwise `subset` is a folder. A file belongs to a split if its name begins with it (`test-00000-of-00002.parquet`,
   `test.jsonl`), or a folder above is called so, or if a word of its path is another name of it (val, dev, eval …).
   If no file says a split, all are `train`.
3. Beside Parquet or Arrow files, `.json` describes and is not read.

A file of a repository is fetched when its first document is asked for; where a corpus says how many documents are read at
most, only as far as they reach.
"""

import functools
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from diffing_core.errors import CorpusError
from diffing_core.file_hash import files_hash
from diffing_core.registry.remote_file import RemoteFile
from diffing_core.registry.schema import Corpus
from diffing_core.registry.sources import HubRef, asked, commit_of

READ = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".arrow")
DESCRIBING = (".json", ".json.gz")  # beside columnar files they seldom hold data
UNREAD = (*DESCRIBING, ".csv", ".tsv", ".txt", ".xml", ".feather", ".orc", ".gz", ".zst", ".bz2", ".xz", ".zip", ".tar", ".tgz")
README = "README.md"
TRAIN = "train"
_SYNONYMS = {
    TRAIN: (TRAIN, "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_CANONICAL = {word: split for split, words in _SYNONYMS.items() for word in words}
_FRONT_MATTER = re.compile(r"---\s*\n(.*?)\n---\s*(\n|$)", re.DOTALL)
_BY_PRODUCT = re.compile(
    r"(^|/)(\.[^/]*|(cache|indices)[^/]*\.arrow$|(config|state|recipe|dataset_infos?|dataset_dict)\.json$"
    r"|(license|readme|notice|requirements)[^/]*\.txt$)",
    re.IGNORECASE,
)
logger = logging.getLogger(__name__)


def corpus_files(corpus: Corpus, place: Path | HubRef) -> Iterator[Path | RemoteFile]:
    """The files to read, in the order of their names: those of the hub fetched, or left there to be read in part.

    Raises:
        CorpusError: nothing is there, or no file of this subset and split.
        ModelLoadError: the repository cannot be reached.
    """
    if isinstance(place, HubRef):
        yield from _fetched(corpus, place)
    elif place.is_file():
        if corpus.subset:
            raise CorpusError(f"corpus {corpus.name!r}: {place.name} is one file and has no subset; drop subset")
        yield place
    else:
        names = [file.relative_to(place).as_posix() for file in place.rglob("*") if file.is_file()]
        readme = place / README
        listing = Listing(str(place), names, readme.read_text("utf-8", "replace") if readme.is_file() else "")
        yield from (place / name for name in listing.files_of(corpus))


def corpus_version(corpus: Corpus, place: Path | HubRef | None) -> str:
    """Commit of a repository, content hash of local files; texts in the entry itself need none."""
    if place is None:
        return ""
    if isinstance(place, HubRef):
        return place.pinned(commit_of(place, "dataset"))
    return files_hash(corpus_files(corpus, place), place.parent if place.is_file() else place)


@dataclass(frozen=True)
class Listing:
    """The names of the files below a folder or repository, and the text of its README.md."""

    where: str
    names: Sequence[str]
    readme: str = ""

    def files_of(self, corpus: Corpus) -> list[str]:
        """Names of the corpus's files, sorted. Those of a kind that is not read are told in the log.

        Raises:
            CorpusError: there are none.
        """
        names = sorted(name for name in self.names if not _BY_PRODUCT.search(name))
        columnar = any(name.endswith((".parquet", ".arrow")) for name in names)
        readable = [name for name in names if name.endswith(READ) and not (columnar and name.endswith(DESCRIBING))]
        others = [name for name in names if name.endswith(UNREAD) and name not in readable]
        by_split, passed_over = self._by_split(corpus, readable), self._by_split(corpus, others)
        found, unread = (
            sorted({name for split in corpus.split.split("+") for name in each.get(split, ())})
            for each in (by_split, passed_over)
        )
        if unread:
            _tell_unread(corpus.name, self.where, tuple(unread))
        if not found:
            subset = f" and subset {corpus.subset!r}" if corpus.subset else ""
            known = ", ".join(sorted(split for split, names in by_split.items() if names))
            raise CorpusError(
                f"corpus {corpus.name!r}: {self.where} holds {len(readable)} file(s) of {', '.join(READ)}, none of "
                f"split {corpus.split!r}{subset}; found splits: {known or 'none'}"
            )
        return found

    def _by_split(self, corpus: Corpus, names: Sequence[str]) -> dict[str, list[str]]:
        config = self._config(corpus)
        if config.get("data_files"):
            return _configured(config["data_files"], names)
        folder = config.get("data_dir") or (None if config else corpus.subset)
        inside = [name for name in names if not folder or name.startswith(f"{folder.strip('/')}/")]
        splits = {*corpus.split.split("+"), *map(_named_split, inside)} - {""}
        return {split: _of_split(inside, split) for split in splits}

    def _config(self, corpus: Corpus) -> dict[str, Any]:
        """The entry of `configs:` that a subset means; without a subset the default one; {} if there are none."""
        configs = self._configs()
        named = {str(config.get("config_name", "default")): config for config in configs}
        marked = [config for config in configs if config.get("default") or len(configs) == 1]
        chosen = named.get(corpus.subset or "default") or (marked[0] if marked and not corpus.subset else None)
        if configs and chosen is None:
            raise CorpusError(
                f"corpus {corpus.name!r}: subset {corpus.subset!r} is none of those of {self.where}: "
                f"{', '.join(list(named)[:20])}; set subset to one of them"
            )
        return chosen or {}

    def _configs(self) -> list[dict[str, Any]]:
        head = _FRONT_MATTER.match(self.readme)
        try:
            return (yaml.safe_load(head[1]) or {}).get("configs") or [] if head else []
        except yaml.YAMLError as error:
            raise CorpusError(f"{README} of {self.where} does not begin with valid YAML: {error}") from error


@functools.cache
def _tell_unread(corpus: str, where: str, names: tuple[str, ...]) -> None:
    """Once in a process: a sensor asks for the files every few seconds."""
    told = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    logger.warning("corpus %s: %s holds data that is not read: %s; files of %s are", corpus, where, told, ", ".join(READ))


def _fetched(corpus: Corpus, place: HubRef) -> Iterator[Path | RemoteFile]:
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    pinned = replace(place, revision=commit_of(place, "dataset"))
    inside = f"{place.subfolder.strip('/')}/" if place.subfolder else ""

    def file(name: str) -> Path:
        return Path(asked(pinned, hf_hub_download, inside + name, repo_type="dataset"))

    def part(name: str) -> Path | RemoteFile:
        if "/" not in pinned.repo:
            return file(name)  # the hub's file system knows no repository without an owner
        kept = try_to_load_from_cache(pinned.repo, inside + name, revision=pinned.revision, repo_type="dataset")
        return Path(kept) if isinstance(kept, str) else RemoteFile(pinned, inside + name)

    names = asked(pinned, HfApi().list_repo_files, repo_type="dataset")
    below = [name.removeprefix(inside) for name in names if name.startswith(inside)]
    readme = file(README).read_text("utf-8", "replace") if README in below else ""
    where = f"{place.repo}/{inside}".rstrip("/")
    yield from map(file if corpus.read_at_most is None else part, Listing(where, below, readme).files_of(corpus))


def _configured(data_files: Any, names: Sequence[str]) -> dict[str, list[str]]:
    """{split: names} of one config; patterns that say no split are `train`."""
    by_split: dict[str, list[str]] = {}
    for entry in data_files if isinstance(data_files, list) else [data_files]:
        split, paths = (TRAIN, entry) if isinstance(entry, str) else (entry["split"], entry["path"])
        patterns = re.compile("|".join(map(_pattern, [paths] if isinstance(paths, str) else paths)))
        by_split.setdefault(split, []).extend(filter(patterns.fullmatch, names))
    return by_split


def _pattern(path: str) -> str:
    """A glob as a regular expression: `**/` is any folders, `*` does not cross a folder."""
    wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", path.removeprefix("./"))
    return "".join(wild.get(part) or re.escape(part) for part in parts)


def _of_split(names: Sequence[str], split: str) -> list[str]:
    """Files that are called by the split, else those that speak of it, else all if it is `train` and none says more."""
    called = re.compile(rf"(^|/){re.escape(split)}([-./]|_\d)")
    own = [name for name in names if called.search(name)]
    if own or (split == TRAIN and not any(map(_named_split, names))):
        return own or list(names)
    return [name for name in names if _named_split(name) == _CANONICAL.get(split, split)]


def _named_split(name: str) -> str:
    """The split that a path speaks of, file before folders; empty if it speaks of none."""
    for part in reversed(name.split("/")):
        for word in re.split(r"[-._ \d]+", part.lower()):
            if word in _CANONICAL:
                return _CANONICAL[word]
    return ""
