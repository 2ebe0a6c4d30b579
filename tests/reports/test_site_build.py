"""How the site is built, with an `npm` that only pretends: what runs when, and what a failure leaves behind."""

import os
import stat
from pathlib import Path

import pytest

from dbt_reports import site
from diffing_core.errors import StorageError

NPM = """#!/bin/sh
echo "$PWD: $*" >> "$CALLS"
case "$*" in
  install*) mkdir -p node_modules ;;
  "run build")
    if [ -n "$BROKEN" ]; then echo "the page is wrong"; exit 3; fi
    mkdir build; echo "$CONTENT" > build/index.html ;;
esac
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(NPM)
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{npm.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("CONTENT", "first")
    (tmp_path / "warehouse.duckdb").touch()
    return tmp_path


def ignore(line: str) -> None:
    assert line is not None


def calls(home: Path) -> list[str]:
    return [line.partition(": ")[2] for line in (home / "calls").read_text().splitlines()]


def test_packages_are_installed_once_and_the_site_replaced(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.prefetch(home, ignore)
    assert calls(home) == ["install --no-audit --no-fund"]
    (home / "site-build" / "pages" / "withdrawn.md").write_text("an older page")
    assert site.build_site(home, ignore) == home / "site"
    monkeypatch.setenv("CONTENT", "second")
    site.build_site(home, ignore)
    assert (home / "site" / "index.html").read_text() == "second\n"
    assert calls(home)[1:] == ["run sources", "run build"] * 2
    assert not (home / "site-build" / "pages" / "withdrawn.md").exists()
    assert (home / "site-build" / "node_modules").exists()
    assert not (home / ".site.old").exists()


def test_changed_packages_are_installed_again(home: Path) -> None:
    place = site.prefetch(home, ignore)
    (place / ".installed").write_text("of an older package.json")
    (place / "node_modules" / "left_over").touch()
    site.prefetch(home, ignore)
    assert len(calls(home)) == 2
    assert not (place / "node_modules" / "left_over").exists()


def test_a_failed_build_tells_why_and_keeps_the_old_site(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site.build_site(home, ignore)
    monkeypatch.setenv("BROKEN", "1")
    with pytest.raises(StorageError, match=r"npm run build failed \(3\):\nthe page is wrong"):
        site.build_site(home, ignore)
    assert (home / "site" / "index.html").read_text() == "first\n"


def test_without_node_or_warehouse_it_says_what_to_do(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(StorageError, match="npm is not installed; the site needs Node"):
        site.build_site(home, ignore)
    (home / "warehouse.duckdb").unlink()
    with pytest.raises(StorageError, match="build the reports first"):
        site.build_site(home, ignore)
