"""Where finished things of the demo lie: folders named by content, complete only once renamed into place.

A folder's name ends in 12 hex digits of a hash over everything that decides its content: the tier's numbers, the data
files, `SOURCE_VERSION` and, for a finetune, the hash of its base. So a changed number is another folder, an unchanged
one is found again, and nothing here needs torch.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from diffing_core.demo.tiers import Finetune, Tier
from diffing_core.new_folder import new_folder

SOURCE_VERSION = 1  # raise when the code of this package changes what a build writes
PACKAGE = Path(__file__).parent
TEXT_PROBES = "corpus/text"
CHAT_PROBES = "corpus/chat"
BASE = "base"
RECIPE_FILE = "recipe.json"


@dataclass(frozen=True)
class Artifact:
    """One folder of a build: its name and the content hash of what decides it."""

    name: str
    recipe: str

    @property
    def key(self) -> str:
        """12 hex digits over the recipe."""
        return hashlib.sha256(self.recipe.encode()).hexdigest()[:12]

    def folder(self, root: Path) -> Path:
        """Return where the finished artifact lies below `root`."""
        return root / f"{self.name}-{self.key}"

    def is_done(self, root: Path) -> bool:
        """Return whether the artifact was finished."""
        return self.folder(root).is_dir()

    @contextmanager
    def writing(self, root: Path) -> Iterator[Path]:
        """Yield a temporary folder, renamed to the finished one when the block ends without an error.

        When another process finished the same artifact meanwhile, its folder stays: the two are equal by their name.
        """
        with new_folder(self.folder(root)) as aside:
            yield aside
            (aside / RECIPE_FILE).write_text(self.recipe, encoding="utf-8")


@cache
def _digest(*names: str) -> str:
    content = b"".join((PACKAGE / name).read_bytes() for name in names)
    return hashlib.sha256(content).hexdigest()


def _artifact(name: str, **decides: Any) -> Artifact:
    return Artifact(
        name, json.dumps({"source_version": SOURCE_VERSION, **decides}, indent=1, sort_keys=True)
    )


def _finetuned(finetune: Finetune, base: Artifact) -> Artifact:
    lesson = _digest(f"lessons/{finetune.lesson}.yaml") if finetune.lesson else None
    return _artifact(finetune.artifact, base=base.key, finetune=asdict(finetune), lesson=lesson)


def tier_artifacts(tier: Tier) -> dict[str, Artifact]:
    """Return every artifact of `tier` by name."""
    corpus = {
        "corpus": asdict(tier.corpus),
        "world": _digest("world/topics.yaml", "world/templates.yaml"),
    }
    base = _artifact(BASE, model=asdict(tier.model), pretraining=asdict(tier.pretraining), **corpus)
    probes = [_artifact(name, **corpus) for name in (TEXT_PROBES, CHAT_PROBES)]
    finetunes = [_finetuned(finetune, base) for finetune in tier.finetunes]
    return {artifact.name: artifact for artifact in (*probes, base, *finetunes)}
