"""`diffing ui`: the Dagster web UI and the report, both on the loopback address."""

import http.server
import logging
import signal
import threading
from functools import partial

from diffing_assets.instance import interrupt_server, start_server
from diffing_core.settings import diffing_home

logger = logging.getLogger(__name__)


def serve(port: int, site_port: int) -> None:
    """Serves both until interrupted; the report only if it has been built."""
    site = diffing_home() / "site"
    if site.exists():
        threading.Thread(target=_serve_site, args=(site, site_port), daemon=True).start()
        logger.info("report: http://127.0.0.1:%d", site_port)
    else:
        logger.warning("no report yet: %s does not exist; it is built by `make demo`", site)
    logger.info("web UI: http://127.0.0.1:%d", port)
    process = start_server(port)
    for received in (signal.SIGINT, signal.SIGTERM):
        signal.signal(received, lambda *_: interrupt_server(process))
    process.wait()


def _serve_site(folder: object, port: int) -> None:
    handler = partial(_Quiet, directory=str(folder))
    http.server.ThreadingHTTPServer(("127.0.0.1", port), handler).serve_forever()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    """A static server that does not log every request."""

    def log_message(self, *_: object) -> None:
        """Says nothing."""
