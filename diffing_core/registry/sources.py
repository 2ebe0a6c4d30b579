"""Where weights and texts come from: a local path, a hub repository, or an artifact of the embedded demo.

A source is only a name until `fetch` turns it into a folder on this machine; `revision_of` says what is
in it without loading any weights, so that a sensor can look every few seconds.
"""

import functools
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo, model_validator

from diffing_core.errors import ModelLoadError
from diffing_core.safetensor_files import content_hash, tokenizer_hash
from diffing_core.settings import diffing_home

_REPO = re.compile(r"([\w.\-]+/)?[\w.\-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def _below_root(path: Path | None, info: ValidationInfo) -> Path | None:
    """Relative paths in a YAML file count from the registry root that the file lies in."""
    root = (info.context or {}).get("root")
    return path if path is None or root is None else Path(root, path)


class Source(BaseModel):
    """Exactly one of `path`, `repo` (with optional `revision` and `subfolder`) and `demo`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Annotated[Path | None, AfterValidator(_below_root)] = None
    repo: str | None = None
    revision: str | None = None
    subfolder: str | None = None
    demo: str | None = None

    @model_validator(mode="after")
    def _one_place(self) -> "Source":
        given = [name for name in ("path", "repo", "demo") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"a source names exactly one of path, repo and demo, but {given or 'none'} is given; "
                "for example {repo: owner/name, revision: main}"
            )
        if self.repo is None and (self.revision or self.subfolder):
            raise ValueError(f"revision and subfolder belong to a repo, but the source is a {given[0]}; drop them")
        if self.repo is not None and not _REPO.fullmatch(self.repo):
            raise ValueError(
                f"repo {self.repo!r} is not of the form owner/name; a folder inside a repository goes "
                "into subfolder, for example {repo: owner/name, subfolder: step-100}"
            )
        if self.subfolder and ".." in self.subfolder.split("/"):
            raise ValueError(f"subfolder {self.subfolder!r} leaves the repository; name a folder inside it")
        return self

    def __str__(self) -> str:
        if self.repo is None:
            return str(self.path) if self.path else f"demo artifact {self.demo!r}"
        return "/".join(filter(None, (self.repo, self.subfolder))) + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class HubRef:
    """A place on the model or dataset hub; `revision` None means the default branch."""

    repo: str
    revision: str | None = None
    subfolder: str | None = None

    def pinned(self, commit: str) -> str:
        """Identity of the folder at that commit; two folders of one repository differ."""
        return commit if not self.subfolder else f"{commit}.{self.subfolder.strip('/').replace('/', '.')}"


@dataclass(frozen=True)
class Fetched:
    """A folder on this machine and the identity of what is in it."""

    folder: Path
    revision: str


def locate(source: Source, model: str) -> Path | HubRef:
    """Path or hub reference of a source; demo artifacts are those of the given base model.

    Raises:
        ModelLoadError: a demo artifact that is not built yet.
        RegistryError: a demo artifact that does not exist.
    """
    if source.repo is not None:
        return HubRef(source.repo, source.revision, source.subfolder)
    if source.path is not None:
        return source.path
    built = _demo_folder(source.demo, model)
    if built is None:
        raise ModelLoadError(
            f"demo artifact {source.demo!r} of {model!r} is not built; run `diffing demo --tier {model}`"
        )
    return built


def is_present(source: Source, model: str) -> bool:
    """Whether a local folder exists or a demo artifact is built; a hub repository is taken to be there."""
    if source.repo is not None:
        return True
    return source.path.exists() if source.path is not None else _demo_folder(source.demo, model) is not None


def is_on_disk(place: Path | HubRef) -> bool:
    """Whether a folder exists or a repository's snapshot is in the hub's cache; nobody is asked, nothing fetched."""
    if isinstance(place, Path):
        return place.is_dir()
    from huggingface_hub import snapshot_download

    try:
        root = Path(snapshot_download(place.repo, revision=place.revision, local_files_only=True))
    except OSError:  # the hub's error for what is not in the cache
        return False
    return (root / (place.subfolder or "")).is_dir()


def _demo_folder(artifact: str, model: str) -> Path | None:
    from diffing_core import demo

    return demo.locate(model, artifact, diffing_home() / "demo")


def fetch(place: Path | HubRef, *, remote_code: bool = False, weights: bool = True) -> Fetched:
    """Brings a model, adapter or tokenizer folder to this machine; a tokenizer's holds no `weights`.

    Raises:
        ModelLoadError: the folder or repository does not exist or cannot be reached.
    """
    if isinstance(place, Path):
        return Fetched(place, revision_of(place, weights=weights))
    from huggingface_hub import snapshot_download

    inside = f"{place.subfolder.strip('/')}/" if place.subfolder else ""
    wanted = (*_MODEL_FILES, "*.py") if remote_code else _MODEL_FILES
    root = Path(
        asked(
            place,
            snapshot_download,
            allow_patterns=[inside + pattern for pattern in wanted],
            ignore_patterns=[f"{inside}*/*"],
        )
    )
    if not (root / inside).is_dir():
        raise ModelLoadError(
            f"repository {place.repo} (revision {place.revision or 'default'}) has no model files in "
            f"{place.subfolder or 'its top folder'}; check subfolder and revision in the registry entry"
        )
    return Fetched(root / inside, place.pinned(root.name))


def revision_of(place: Path | HubRef, *, weights: bool = True) -> str:
    """Content hash of a local folder, or the commit that a hub reference points to; imports no torch."""
    if isinstance(place, Path):
        return content_hash(place) if weights else tokenizer_hash(place)
    return place.pinned(commit_of(place, "model"))


def commit_of(place: HubRef, kind: Literal["model", "dataset"]) -> str:
    """The commit that a hub reference points to; a full commit is itself, and nobody is asked.

    Pairs share bases and corpora: the hub is asked for one place at most twice a minute.

    Raises:
        ModelLoadError: the repository cannot be reached.
    """
    if place.revision and _COMMIT.fullmatch(place.revision):
        return place.revision
    from huggingface_hub import constants

    return _commit_at(place, kind, constants.ENDPOINT, int(time.monotonic()) // 30)


@functools.lru_cache(maxsize=4096)
def _commit_at(place: HubRef, kind: str, endpoint: str, _half_minute: int) -> str:
    from huggingface_hub import HfApi

    return asked(place, HfApi(endpoint).repo_info, repo_type=kind).sha


def asked(place: HubRef, question: Callable, *more: Any, **options: Any) -> Any:
    """One question to the hub; raises as `reaching`."""
    with reaching(place):
        return question(place.repo, *more, revision=place.revision, **options)


@contextmanager
def reaching(place: HubRef) -> Iterator[None]:
    """The hub's many ways to fail told as one error.

    Raises:
        ModelLoadError: the repository, revision or file does not exist or cannot be reached.
    """
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except (OSError, HTTPError) as error:
        raise ModelLoadError(
            f"cannot fetch {place.repo} (revision {place.revision or 'default'}) from the hub: "
            f"{type(error).__name__} ({str(error).strip().splitlines()[0]}); check the name, HF_ENDPOINT, HF_TOKEN and the network"
        ) from error
