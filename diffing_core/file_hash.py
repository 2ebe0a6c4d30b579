"""Content hashes of files; one whose size and time are unchanged is read once per process, so that a sensor can ask."""

import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path


def files_hash(files: Iterable[Path], root: Path) -> str:
    """16 hex digits over the names below `root` and the bytes of these files, in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(files):
        stat = file.stat()
        name = file.relative_to(root).as_posix()
        digest.update(f"{name}\0{_file_digest(file, stat.st_size, stat.st_mtime_ns)}\n".encode())
    return digest.hexdigest()[:16]


@functools.lru_cache(maxsize=4096)
def _file_digest(file: Path, _size: int, _mtime_ns: int) -> str:
    """Hash of one file; size and time are in the signature because they are the cache key."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
