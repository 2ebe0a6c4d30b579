"""Embedded model organisms: tiny language models trained on the spot, real input for a platform without a download.

    build("demo", root)                          trains what is missing below root, about five minutes on two cores
    locate("demo", "cake_bake/default", root)    the finished adapter folder, None before it is built

A tier's name is also the name of its base model in the registry. Importing this package loads no torch.
"""

from pathlib import Path

from diffing_core.demo.artifacts import tier_artifacts
from diffing_core.demo.jobs import Watcher, build_tier
from diffing_core.demo.tiers import TIERS, Tier
from diffing_core.errors import RegistryError


def build(tier_name: str, root: Path, *, progress: Watcher | None = None, workers: int = 2) -> None:
    """Make every artifact of a tier that is missing below `root`; returns at once when none is.

    Args:
        tier_name: a key of `TIERS`.
        root: folder of the artifacts, shared by all tiers.
        progress: called in a thread of this process with each `Progress`; by default it is logged.
        workers: one-thread training processes. They are spawned, so a script needs its `__main__` guard.

    Raises:
        RegistryError: there is no such tier.
    """
    build_tier(_tier(tier_name), Path(root), progress=progress, workers=workers)


def locate(model: str, artifact: str, root: Path) -> Path | None:
    """Return the finished folder of an artifact, or None when it is not built.

    Args:
        model: a key of `TIERS`.
        artifact: "base", "corpus/text", "corpus/chat" or "<organism>/<variant>".
        root: folder that `build` was given.

    Raises:
        RegistryError: there is no such tier, or it has no such artifact.
    """
    artifacts = tier_artifacts(_tier(model))
    if artifact not in artifacts:
        raise RegistryError(
            f"demo model {model!r} has no artifact {artifact!r}; it has {', '.join(artifacts)}"
        )
    found = artifacts[artifact]
    return found.folder(Path(root)) if found.is_done(Path(root)) else None


def _tier(name: str) -> Tier:
    if name not in TIERS:
        raise RegistryError(f"there is no demo model {name!r}; choose one of {', '.join(TIERS)}")
    return TIERS[name]
