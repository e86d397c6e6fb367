"""A real HTTP server on this machine, for what asks one: as many connections may wait as a test opens at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    request_queue_size = 128  # the library's 5 are fewer than eight threads open: on a busy machine some are reset


@contextmanager
def answering(kind: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serves requests with `kind` on a free port of the loopback; gives the server's root URL."""
    with Server(("127.0.0.1", 0), kind) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
