"""Looks at a built site with a headless Chromium: what a person would see, and which hosts were asked for.

with served(home / "site") as url:
    page = look(f"{url}/organisms/cake_bake")
    assert "&lt;script&gt;" in page.html and page.hosts == {"127.0.0.1"}
"""

import json
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

QUIET = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
)  # fmt: skip
SETTLED_MS = 15_000


@dataclass(frozen=True)
class Page:
    """The document after scripts ran, and the hosts that it asked for."""

    html: str
    hosts: set[str]


class _Silent(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serves a folder on a free port of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Silent, directory=str(folder)))
    server.handle_error = lambda *_: None  # a browser that has seen enough hangs up
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def chromium() -> str | None:
    """The browser of this machine, if it has one."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def look(url: str, screenshot: Path | None = None, size: str = "1360,2600") -> Page:
    """Loads a page, waits until it has settled, and optionally takes its picture."""
    browser = chromium()
    assert browser, "no Chromium; on Debian: apt-get install chromium"
    with tempfile.TemporaryDirectory() as profile:
        log = Path(profile) / "net.json"
        options = [
            f"--user-data-dir={profile}",
            f"--log-net-log={log}",
            f"--virtual-time-budget={SETTLED_MS}",
        ]
        picture = [f"--screenshot={screenshot}", f"--window-size={size}"] if screenshot else []
        dump = [browser, *QUIET, *options, *picture, "--dump-dom", url]
        html = subprocess.run(dump, capture_output=True, text=True, timeout=180, check=True).stdout
        return Page(html, _hosts(log))


def _hosts(log: Path) -> set[str]:
    """Hosts of requests that a page started, answered or not; the browser's own have no initiator."""
    text = log.read_text(errors="replace").rstrip()
    events = json.loads(text if text.endswith("}") else text.rstrip(",") + "]}")["events"]
    asked = [event["params"] for event in events if "initiator" in event.get("params", {})]
    return {urlsplit(each["url"]).hostname for each in asked if each["initiator"].startswith("http")}
