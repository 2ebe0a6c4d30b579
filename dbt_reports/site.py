"""Builds the Evidence site: npm works in `$DIFFING_HOME/site-build`, people open `$DIFFING_HOME/site`.

The sources of `evidence/` are copied beside the `node_modules` of earlier builds; npm installs only when
`package.json` or the scripts that it runs changed. A failed build leaves the old site in place.
"""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from diffing_core.errors import StorageError
from diffing_core.settings import short_hash
from diffing_core.warehouse import FILE

SOURCES = Path(__file__).parent / "evidence"
KEPT = ("node_modules", "package-lock.json", ".installed")
TAIL_LINES = 40

Log = Callable[[str], object]


def build_site(home: Path, log: Log) -> Path:
    """Builds the site from the published warehouse of `home` and returns its folder.

    Raises:
        StorageError: there is no warehouse, Node is missing, or a step failed; the message ends with its output.
    """
    if not (home / FILE).exists():
        raise StorageError(f"{home / FILE} does not exist; build the reports first")
    place = prefetch(home, log)
    _npm(place, log, "run", "sources")
    _npm(place, log, "run", "build")
    return _swap(place / "build", home / "site")


def prefetch(home: Path, log: Log) -> Path:
    """Puts sources and npm packages in place, so that a later build needs no network; returns the folder.

    Raises:
        StorageError: Node is missing, or npm failed.
    """
    place = home / "site-build"
    _sync(place)
    stamp = place / ".installed"
    wanted = _fingerprint()
    if not stamp.exists() or stamp.read_text() != wanted:
        stamp.unlink(missing_ok=True)
        shutil.rmtree(place / "node_modules", ignore_errors=True)
        _npm(place, log, "install", "--no-audit", "--no-fund")
        stamp.write_text(wanted)
    return place


def _sync(place: Path) -> None:
    """Copies the sources; whatever else lies there, apart from what npm installed, is of an earlier build."""
    place.mkdir(parents=True, exist_ok=True)
    for old in place.iterdir():
        if old.name in KEPT:
            continue
        if old.is_dir():
            shutil.rmtree(old)
        else:
            old.unlink()
    ignored = shutil.ignore_patterns(*KEPT, ".evidence", "build")
    shutil.copytree(SOURCES, place, ignore=ignored, dirs_exist_ok=True)


def _fingerprint() -> str:
    files = [SOURCES / "package.json", *sorted((SOURCES / "scripts").iterdir())]
    return short_hash([file.read_text() for file in files])


def _npm(place: Path, log: Log, *arguments: str) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise StorageError(
            "npm is not installed; the site needs Node.js 18.13 or newer with npm, from nodejs.org"
        )
    command = " ".join(("npm", *arguments))
    log(f"{command} (in {place})")
    said: list[str] = []
    with subprocess.Popen(
        [npm, *arguments],
        cwd=place,
        env=os.environ | {"SEND_ANONYMOUS_USAGE_STATS": "no", "NO_COLOR": "1", "CI": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line.rstrip())
            log(said[-1])
    if process.returncode:
        raise StorageError(f"{command} failed ({process.returncode}):\n" + "\n".join(said[-TAIL_LINES:]))


def _swap(built: Path, target: Path) -> Path:
    """Replaces the published folder; a folder cannot be renamed over another one, so the old one steps aside."""
    aside = target.with_name(f".{target.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if target.exists():
        target.rename(aside)
    built.rename(target)
    shutil.rmtree(aside, ignore_errors=True)
    return target
