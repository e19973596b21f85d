"""Metrics and health over HTTP, on a thread of its own.

On a thread, because it has to answer also when the event loop does not: liveness fails when the loop has been stuck
for `stuck_s` seconds, and metrics of a stuck server are the ones worth having.

Each connection has a thread for its one request. There are never more than `_MOST_CONNECTIONS`: the next one takes the
place of the oldest, so that clients that dawdle, however many, cannot keep out a probe or a scraper, which are done in
milliseconds. None lasts longer than `longest_s`, however it drips its bytes.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

from service.errors import ConfigurationError

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

_MOST_CONNECTIONS = 32
_LONGEST_S = 10.0
# How long the thread of a connection that was cut may take to notice, before the next client is turned away.
_NOTICE_S = 0.5
# Between looks at the backlog while the process has no file descriptor left to accept with.
_EXHAUSTED_S = 0.1
_POLL_S = 0.1

Check = Callable[[], tuple[bool, str]]


class HttpServer:
    """Answers `/metrics`, `/health/live`, `/health/ready` and, for people, `/`.

    Args:
        host: address to listen on.
        port: 0 picks a free one.
        registry: what `/metrics` renders.
        live: whether the process works, and a word on it.
        ready: whether it takes traffic, and a word on it.
        longest_s: seconds after which a connection is cut.
    """

    def __init__(
        self,
        host: str,
        port: int,
        registry: CollectorRegistry,
        live: Check,
        ready: Check,
        longest_s: float = _LONGEST_S,
    ) -> None:
        app = _app(make_wsgi_app(registry), {"/health/live": live, "/health/ready": ready})
        server_class = _Ipv6Server if ":" in host else _Server
        try:
            self._server = make_server(host, port, app, server_class, _Quiet)
        except OSError as error:
            raise ConfigurationError(
                f"cannot listen on {host}:{port} for HTTP ({error.strerror or error}); "
                "choose another with --http-port or --host"
            ) from None
        self._server.longest_s = longest_s
        self.port: int = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(_POLL_S,), name="http", daemon=True)

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
    longest_s = _LONGEST_S

    def __init__(self, *args: Any) -> None:
        self._free = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        self._lock = threading.Lock()
        self._since: dict[socket.socket, float] = {}  # oldest first
        super().__init__(*args)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accepts; without descriptors it pauses, for the backlog stays readable and would be asked without end."""
        try:
            return super().get_request()
        except OSError:
            time.sleep(_EXHAUSTED_S)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Gives a connection its thread, in place of the oldest if there are as many as may be."""
        if not self._free.acquire(blocking=False):
            self._cut(1)
            if not self._free.acquire(timeout=_NOTICE_S):
                super().shutdown_request(request)
                return
        with self._lock:
            self._since[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """A connection has ended, on its thread: its place is free."""
        with self._lock:
            self._since.pop(request, None)
        super().shutdown_request(request)
        self._free.release()

    def service_actions(self) -> None:
        """Between requests and at every poll: cuts what has lasted too long."""
        old = time.monotonic() - self.longest_s
        with self._lock:
            late = sum(since < old for since in self._since.values())
        if late:
            self._cut(late)

    def serves(self, connection: Any) -> bool:
        """Whether a connection has not been cut."""
        with self._lock:
            return connection in self._since

    def _cut(self, oldest: int) -> None:
        """Ends so many connections; their threads find the end of the stream."""
        with self._lock:
            for connection in list(self._since)[:oldest]:
                del self._since[connection]
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

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

    def parse_request(self) -> bool:
        """Reads the request; False if there is none to answer, or nobody to answer any more."""
        server: Any = self.server
        return super().parse_request() and server.serves(self.connection)

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
