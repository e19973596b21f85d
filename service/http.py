"""Metrics and health over HTTP, on a thread of its own.

On a thread, because it has to answer also when the event loop does not: liveness fails when the loop has been stuck
for `stuck_s` seconds, and metrics of a stuck server are the ones worth having.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

from service.errors import ConfigurationError

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

Check = Callable[[], tuple[bool, str]]


class HttpServer:
    """Answers `/metrics`, `/health/live`, `/health/ready` and, for people, `/`.

    Args:
        host: address to listen on.
        port: 0 picks a free one.
        registry: what `/metrics` renders.
        live: whether the process works, and a word on it.
        ready: whether it takes traffic, and a word on it.
    """

    def __init__(self, host: str, port: int, registry: CollectorRegistry, live: Check, ready: Check) -> None:
        app = _app(make_wsgi_app(registry), {"/health/live": live, "/health/ready": ready})
        server_class = _Ipv6Server if ":" in host else _Server
        try:
            self._server = make_server(host, port, app, server_class, _Quiet)
        except OSError as error:
            raise ConfigurationError(
                f"cannot listen on {host}:{port} for HTTP ({error.strerror or error}); "
                "choose another with --http-port or --host"
            ) from None
        self.port: int = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="http", daemon=True)

    def start(self) -> None:
        """Begins to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Closes the port."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    # A scraper that stops reading must not hold up the end of the process.
    block_on_close = False
    # With the default of 5 a burst of connections waits a second or three for its SYN to be sent again.
    request_queue_size = 128

    def server_bind(self) -> None:
        # As the base class does: a restart must not wait for the last connections of the process before it.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # What it does besides is to ask DNS for its own name, which can take seconds.
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no event."""


class _Ipv6Server(_Server):
    address_family = socket.AF_INET6


class _Quiet(WSGIRequestHandler):
    timeout = 10  # seconds without a byte from the client

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the name is the base class's
        """Probes and scrapes are not logged."""


def _app(metrics: WSGIApplication, checks: dict[str, Check]) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "/")
        if path == "/metrics":
            return metrics(environ, start_response)
        if path in checks:
            good, word = checks[path]()
            return _json(start_response, "200 OK" if good else "503 Service Unavailable", {"status": word})
        if path == "/":
            return _json(start_response, "200 OK", {"see": ["/metrics", *checks]})
        return _json(start_response, "404 Not Found", {"error": f"no {path} here", "see": ["/metrics", *checks]})

    return app


def _json(start_response: StartResponse, status: str, body: dict[str, Any]) -> list[bytes]:
    data = json.dumps(body).encode() + b"\n"
    start_response(status, [("Content-Type", "application/json"), ("Content-Length", str(len(data)))])
    return [data]
