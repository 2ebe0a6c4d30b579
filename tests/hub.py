"""A hub on loopback: as much of the protocol as downloads, ranges, listings and `repo_info` use.

A repository is a folder `root/owner/name/<revision>/…`, a dataset `root/datasets/owner/name/<revision>/…`; every
revision's commit is a hash of its name.
"""

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

sent: Counter[str] = Counter()  # bytes of each file that this process's hubs have sent


def commit_of(revision: str) -> str:
    """The 40-digit commit that the hub gives for a revision."""
    return hashlib.sha1(revision.encode()).hexdigest()


@contextmanager
def serve(root: Path) -> Iterator[str]:
    """The endpoint (for HF_ENDPOINT) of a hub that serves the repositories below `root`."""
    handler = type("Handler", (_Handler,), {"root": root})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def reached(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The same for this process, with downloads going to `cache`, which is given."""
    with serve(root) as endpoint:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        yield cache


class _Handler(BaseHTTPRequestHandler):
    root: Path
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        asked = urlsplit(self.path)
        parts = unquote(asked.path).strip("/").split("/")
        if parts[0] == "api":
            end = next((place for place, part in enumerate(parts) if part in ("tree", "revision")), len(parts))
            what, revision, *below = parts[end:] or ("revision", "main")
            kind = ["datasets"] if parts[1] == "datasets" else []
            deep = "recursive=true" in asked.query.lower()
            self._describe("/".join(kind + parts[2:end]), what, revision, "/".join(below), deep)
        elif "resolve" in parts:
            end = parts.index("resolve")
            self._file("/".join(parts[:end]), parts[end + 1], "/".join(parts[end + 2 :]))
        else:
            self._missing("EntryNotFound")

    do_HEAD = do_GET

    def _folder(self, repo: str, revision: str) -> Path | None:
        for folder in (self.root / repo).glob("*"):
            if revision in (folder.name, commit_of(folder.name)):
                return folder
        return None

    def _describe(self, repo: str, what: str, revision: str, below: str, deep: bool) -> None:
        folder = self._folder(repo, revision)
        if folder is None:
            self._missing("RevisionNotFound" if (self.root / repo).exists() else "RepoNotFound")
            return
        found = sorted((folder / below).rglob("*") if deep else (folder / below).glob("*"))
        tree = [_entry(file, folder) for file in found if file.is_file()]
        answer = tree if what == "tree" else {"id": repo, "sha": commit_of(folder.name), "siblings": []}
        self._answer(json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _file(self, repo: str, revision: str, name: str) -> None:
        folder = self._folder(repo, revision)
        if folder is None or not (folder / name).is_file():
            self._missing("EntryNotFound")
            return
        content = (folder / name).read_bytes()
        headers = {"ETag": f'"{_entry(folder / name, folder)["oid"]}"', "X-Repo-Commit": commit_of(folder.name)}
        status = 200
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            begin, end = int(wanted[1]), min(int(wanted[2]) + 1, len(content))
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(content)}"
            content, status = content[begin:end], 206
        if self.command == "GET":
            sent[name] += len(content)
        self._answer(content, headers, status)

    def _missing(self, code: str) -> None:
        self._answer(b"", {"X-Error-Code": code, "X-Error-Message": code}, status=404)

    def _answer(self, content: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Silent."""


def _entry(file: Path, folder: Path) -> dict[str, str | int]:
    content = file.read_bytes()
    return {
        "type": "file",
        "path": str(file.relative_to(folder)),
        "size": len(content),
        "oid": hashlib.sha1(content).hexdigest(),
    }
