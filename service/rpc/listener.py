"""The gRPC server: options, services, health, reflection, port."""

from __future__ import annotations

import asyncio
import enum
import resource
import socket
import time
from dataclasses import dataclass

import grpc
from convoy.v1 import admin_pb2, admin_pb2_grpc
from convoy.v1 import image_classifier_pb2 as pb
from convoy.v1 import image_classifier_pb2_grpc as pb_grpc
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from service.errors import ConfigurationError
from service.metrics import Metrics
from service.rpc import acceptor
from service.rpc.admin import Admin
from service.rpc.credentials import Certificates, ServerTls
from service.rpc.health import Health
from service.rpc.inbox import Inbox
from service.rpc.interceptor import Around
from service.rpc.servicer import ImageClassifier

SERVICE = pb.DESCRIPTOR.services_by_name["ImageClassifier"].full_name

ADMIN_SERVICE = admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name


# The port is closed when no call has come or ended for so long, in which a client on a busy machine gets an answer and
# sends the next call; that is waited for at most so long, twice.
_QUIET_S = 0.25
_PATIENCE_S = 1.0

# Calls that wait for the event loop to take them; each is some kilobytes.
_MOST_ARRIVING = 8192

# Of a request, beside its images; there are seven that may occur once.
_OTHER_FIELDS = 64

# Operators send small messages, and few.
_ADMIN_PATIENCE_S = 30.0
_ADMIN_CALLS = 64


class HealthName(enum.StrEnum):
    """Services of `grpc.health.v1` that probes ask for. The empty one and the API's own follow `READINESS`."""

    LIVENESS = "liveness"
    READINESS = "readiness"


@dataclass(frozen=True)
class Options:
    """How the listener behaves.

    `max_connection_age_s` 0 means never; `grace_s` is what a retired connection gets; `tls` None means plain text.
    `message_timeout_s` and `max_unsent_calls` bound calls whose message has not arrived, `max_connections` and
    `max_calls_per_connection` what one address or one client can hold.
    """

    host: str
    port: int
    max_message_bytes: int
    max_connection_age_s: float
    grace_s: float
    tls: ServerTls | None = None
    message_timeout_s: float = 30.0
    max_unsent_calls: int = 2048
    max_connections: int = 4096
    max_calls_per_connection: int = 1024
    max_images_per_request: int = 256


class Listener:
    """Owns the port, the gRPC server and what health says."""

    def __init__(self, options: Options, servicer: ImageClassifier, metrics: Metrics) -> None:
        self._options = options
        self._health = Health()
        self._tls = Certificates(options.tls, metrics.tls_expiry.set).credentials() if options.tls else None
        self._inbox = Inbox(options.message_timeout_s, options.max_unsent_calls)
        gates = {f"/{SERVICE}/Classify": servicer.refusal}
        self._around = Around(metrics, self._inbox, gates, options.max_images_per_request + _OTHER_FIELDS)
        self._server = acceptor.server(self._around, _channel_options(options), _at_a_time(options))
        pb_grpc.add_ImageClassifierServicer_to_server(servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        self._is_lost = False
        self.port = 0

    async def start(self) -> None:
        """Binds and listens: live, and not ready.

        Raises:
            ConfigurationError: the port is taken or the address is not ours.
        """
        self.port = _bind(self._server, self._options.host, self._options.port, "--port or --host", self._tls)
        self._health.set(health_pb2.HealthCheckResponse.NOT_SERVING, HealthName.READINESS, "", SERVICE)
        self._health.set(health_pb2.HealthCheckResponse.SERVING, HealthName.LIVENESS)
        await self._server.start()

    def ready(self, *, ready: bool) -> None:
        """Tells load balancers whether to send traffic. Liveness stays."""
        ready = ready and not self._is_lost
        state = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        self._health.set(state, HealthName.READINESS, "", SERVICE)

    def lost(self) -> None:
        """Tells the orchestrator to restart this process: it cannot serve any more. There is no way back."""
        self._is_lost = True
        self._health.set(
            health_pb2.HealthCheckResponse.NOT_SERVING, HealthName.LIVENESS, HealthName.READINESS, "", SERVICE
        )

    async def stop(self, grace_s: float) -> None:
        """Takes what has arrived, closes the port, waits for calls in flight at most `grace_s` seconds in all.

        grpc cancels calls that it has received and not yet handed to a handler when the port closes. So it is closed
        in a quiet moment, and if there is none, when calls are only refused, which takes no time.
        """
        began = time.monotonic()
        patience_s = min(_PATIENCE_S, grace_s / 4)
        arrivals = self._around.arrivals
        quiet_s = min(_QUIET_S, patience_s)
        if grace_s and not await arrivals.quiet(quiet_s, patience_s):
            arrivals.refuse()
            await arrivals.quiet(quiet_s, patience_s)
        self._inbox.close()
        stopping = asyncio.create_task(self._server.stop(max(0.0, began + grace_s - time.monotonic())))
        while not stopping.done():
            await asyncio.wait({stopping}, timeout=_PATIENCE_S)
            if not acceptor.is_answering(self._server):
                await self._server.stop(None)  # what is left are streams that have been told, and do not read it
        await stopping
        self._around.failures.close()

    async def cancel(self) -> None:
        """Ends all calls at once, of a `stop` under way, too."""
        self._inbox.close()
        await self._server.stop(None)


def _at_a_time(options: Options) -> int:
    """Calls to take in a turn: few of those that may wait, or a burst would end calls whose message is there."""
    return max(1, min(acceptor.AT_A_TIME, options.max_unsent_calls // acceptor.AT_A_TIME))


def _channel_options(options: Options) -> list[tuple[str, int]]:
    age_ms = round(options.max_connection_age_s * 1000) or 2**31 - 1
    return [
        ("grpc.max_receive_message_length", options.max_message_bytes),
        # What is answered is bounded by what was asked. Over a limit gRPC would fail an answer that counts as given.
        ("grpc.max_send_message_length", -1),
        # Without this a second server on the same port would silently take half of the traffic.
        ("grpc.so_reuseport", 0),
        ("grpc.max_connection_age_ms", age_ms),
        ("grpc.max_connection_age_grace_ms", round(options.grace_s * 1000)),
        # Clients behind NATs and proxies may ping as often as every 10 s, also between calls.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # Beyond the first, connections are closed at once; beyond the second, calls wait at the client.
        ("grpc.max_allowed_incoming_connections", min(options.max_connections, _descriptors() * 3 // 4)),
        ("grpc.max_concurrent_streams", options.max_calls_per_connection),
        # Left on, this resets calls of clients that keep to that number, too, while earlier ones are being cleared up.
        ("grpc.http.overload_protection", 0),
        # By default grpc cancels calls at random when a thousand have arrived before the event loop got to them. They
        # are for admission to refuse, with a status that clients may try again on.
        ("grpc.server.max_pending_requests", _MOST_ARRIVING),
        ("grpc.server.max_pending_requests_hard_limit", _MOST_ARRIVING),
    ]


def _descriptors() -> int:
    """File descriptors that this process may open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft if soft != resource.RLIM_INFINITY else 1 << 20


class AdminListener:
    """The admin API on a port of its own."""

    def __init__(self, host: str, port: int, servicer: Admin, metrics: Metrics) -> None:
        self._host, self._port = host, port
        self._inbox = Inbox(_ADMIN_PATIENCE_S, _ADMIN_CALLS)
        self._around = Around(metrics, self._inbox)
        self._server = acceptor.server(self._around, [("grpc.so_reuseport", 0)])
        admin_pb2_grpc.add_AdminServicer_to_server(servicer, self._server)
        reflection.enable_server_reflection((ADMIN_SERVICE, reflection.SERVICE_NAME), self._server)
        self.port = 0

    async def start(self) -> None:
        """Binds and listens.

        Raises:
            ConfigurationError: the port is taken or the address is not ours.
        """
        self.port = _bind(self._server, self._host, self._port, "--admin-port or --admin-host")
        await self._server.start()

    async def stop(self) -> None:
        """Closes the port; a change under way is cancelled, and changes nothing."""
        self._inbox.close()
        await self._server.stop(None)
        self._around.failures.close()


def _bind(server: aio.Server, host: str, port: int, flags: str, tls: grpc.ServerCredentials | None = None) -> int:
    address = host_port(host, port)
    try:
        # grpc says only that it failed, and writes lines of its own to stderr; the system says why.
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((host, port))
        return server.add_secure_port(address, tls) if tls else server.add_insecure_port(address)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigurationError(f"cannot listen on {address} ({reason}); choose another with {flags}") from None


def host_port(host: str, port: int) -> str:
    """An address as gRPC, URLs and people write it; IPv6 in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
