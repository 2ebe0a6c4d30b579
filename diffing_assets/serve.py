"""`diffing ui`: the Dagster web UI and the report, both on the loopback address."""

import http.server
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from diffing_assets.server import HOST, POLL_S, free_port, running_server
from diffing_core.errors import DiffingError
from diffing_core.settings import diffing_home

logger = logging.getLogger(__name__)


def serve(port: int, site_port: int) -> None:
    """Serves both until interrupted; a web UI that already runs for this DIFFING_HOME is not started again.

    Raises:
        DiffingError: a port is taken, the definitions cannot be loaded, or the server ended by itself.
    """
    stopped = threading.Event()
    for received in (signal.SIGINT, signal.SIGTERM):
        signal.signal(received, lambda *_: stopped.set())
    with served_site(site_port), running_server(port) as server:
        logger.info("web UI: %s", server.url)
        while not stopped.wait(POLL_S):
            if server.has_ended:
                raise DiffingError(f"the Dagster server ended by itself; see {diffing_home() / 'dagster' / 'server.log'}")


@contextmanager
def served_site(port: int) -> Iterator[None]:
    """Serves the report, as it is whenever it is asked for: a new build shows without a restart."""
    site = diffing_home() / "site"
    handler = partial(_Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer((HOST, free_port(port)), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        logger.info("report: http://%s:%d%s", HOST, server.server_port, "" if site.exists() else ", once `make demo` has built it")
        try:
            yield
        finally:
            server.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    """A static server that does not log every request."""

    def log_message(self, *_: object) -> None:
        """Says nothing."""
