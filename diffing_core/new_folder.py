"""Folders that appear whole or not at all, and folders that pass: both beside what stays, never in the system's own place.

Whole models go through them, and `/tmp` is often a piece of memory, or another disk than the one that has room.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A hidden folder to fill, renamed to `target` when the block ends; nothing of it stays if the block fails.

    The target's name tells its content, so of several processes that make the same one the first one's stays.
    """
    with passing_folder(target.parent) as above:
        aside = above / target.name
        aside.mkdir()
        yield aside
        try:
            aside.rename(target)
        except OSError:
            if not target.is_dir():
                raise


@contextmanager
def passing_folder(parent: Path) -> Iterator[Path]:
    """A hidden, empty folder in `parent`, gone with all that is in it when the block ends."""
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=parent) as folder:
        yield Path(folder)
