"""A folder that appears whole or not at all."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A hidden folder to fill, renamed to `target` when the block ends; nothing of it stays if the block fails.

    The target's name tells its content, so of several processes that make the same one the first one's stays.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=target.parent) as above:
        aside = Path(above, target.name)
        aside.mkdir()
        yield aside
        try:
            aside.rename(target)
        except OSError:
            if not target.is_dir():
                raise
