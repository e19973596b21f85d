"""What happens around every RPC: request id, metrics, log, and errors turned into statuses."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc import aio
from grpc_health.v1 import health
from prometheus_client import Counter

from service import logs
from service.errors import ConvoyError, DrainingError, EngineError, UnavailableError
from service.metrics import Metrics
from service.rpc import status
from service.rpc.failures import FailureLog
from service.rpc.inbox import Inbox, Streamed, arrived
from service.rpc.wire import bounded

REQUEST_ID = "x-request-id"
_MAX_ID_LENGTH = 128

_MOST_FIELDS = 64

Context = aio.ServicerContext[Any, Any]
Method = Callable[[Any, Context], Awaitable[Any]]
Gate = Callable[[Context], ConvoyError | None]


class Arrivals:
    """When calls arrive and end, and whether they are still taken. Health is neither counted nor refused."""

    def __init__(self) -> None:
        self._refusing = False
        self._one_more = asyncio.Event()

    def came(self) -> None:
        """One more call, whose message may still be on its way; or one has ended, and its client may send the next."""
        self._one_more.set()

    def admit(self) -> None:
        """Lets a call in whose message is there.

        Raises:
            DrainingError: none is taken any more.
        """
        if self._refusing:
            raise DrainingError

    def refuse(self) -> None:
        """From now on no call is taken."""
        self._refusing = True

    async def quiet(self, window_s: float, timeout_s: float) -> bool:
        """Waits until no call has come or ended for `window_s` seconds; False if that takes more than `timeout_s`."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            self._one_more.clear()
            began = time.monotonic()
            try:
                await asyncio.wait_for(self._one_more.wait(), window_s)
            except TimeoutError:
                # A process that got no CPU meanwhile has not listened.
                if time.monotonic() - began < 2 * window_s:
                    return True
        return False


class Around(aio.ServerInterceptor):
    """Wraps unary methods. Of streaming ones (reflection, health's Watch) only the wait for their messages is watched.

    Args:
        metrics: where calls are counted.
        inbox: receives their messages.
        gates: by method path: says of a call that begins why no request could be admitted now, or None. Under overload
            most of what a refusal costs is to receive what is refused.
        most_fields: that a message may have at its top.

    Attributes:
        arrivals: of calls to unary methods.
        failures: where those that fail are logged.
    """

    def __init__(
        self,
        metrics: Metrics,
        inbox: Inbox,
        gates: Mapping[str, Gate] | None = None,
        most_fields: int = _MOST_FIELDS,
    ) -> None:
        self.arrivals = Arrivals()
        self.failures = FailureLog()
        self._metrics = metrics
        self._inbox = inbox
        self._gates = gates or {}
        self._most_fields = most_fields
        self._handlers: dict[str, Any] = {}  # by method path; only methods that exist get in

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Replaces a method by a watched one.

        To the library it then takes a stream of messages, which on the wire is the same: so it is here that a message
        is waited for, and not in the library, which would wait for ever.
        """
        path = handler_call_details.method
        known = self._handlers.get(path)
        if known is not None:
            return known
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        parse = bounded(handler.request_deserializer, self._most_fields)
        if handler.response_streaming:
            watched: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(
                Streamed(handler, parse, self._inbox).handle, response_serializer=handler.response_serializer
            )
        else:
            gate = self._gates.get(path)
            watched = grpc.stream_unary_rpc_method_handler(
                _Watched(path, handler, parse, self._metrics, self.arrivals, self.failures, self._inbox, gate).handle,
                response_serializer=handler.response_serializer,
            )
        self._handlers[path] = watched
        return watched


class _Watched:
    """One method of the API, with everything around it."""

    def __init__(
        self,
        path: str,
        handler: Any,
        parse: Callable[[bytes], Any],
        metrics: Metrics,
        arrivals: Arrivals,
        failures: FailureLog,
        inbox: Inbox,
        gate: Gate | None,
    ) -> None:
        _, service, self._name = path.split("/", 2)
        self._inbox = inbox
        self._gate = gate
        self._failures = failures
        self._arrivals = None if service == health.SERVICE_NAME else arrivals
        self._method: Method = handler.unary_unary
        self._parse = parse
        self._labels = ("unary", service, self._name)
        self._started = metrics.grpc_started.labels(*self._labels)
        self._seconds = metrics.grpc_seconds.labels(*self._labels)
        self._handled = metrics.grpc_handled
        self._by_code: dict[grpc.StatusCode, Counter] = {}  # finding a series by its labels costs more than counting
        self._shed = metrics.shed

    async def handle(self, _: object, context: Context) -> Any:
        """Answers one call. Its message is parsed here, since grpc.aio answers what cannot be parsed with UNKNOWN."""
        if self._arrivals:
            self._arrivals.came()
        message: bytes | ConvoyError = (self._gate and self._gate(context)) or await self._inbox.message(context)
        began = time.monotonic()
        self._started.inc()
        request_id = _request_id(context)
        logs.request_context(request_id=request_id, method=self._name)
        trailers: tuple[tuple[str, str | bytes], ...] = ((REQUEST_ID, request_id),)
        context.set_trailing_metadata(trailers)
        code = grpc.StatusCode.OK
        try:
            if self._arrivals:
                self._arrivals.admit()
            call = self._method(self._parse(arrived(message)), context)
            message = b""  # the request is a copy: both, while it waits for its turn, would be twice the memory
            return await call
        except asyncio.CancelledError:
            code = _code_of_cancellation(context)
            raise
        except aio.AbortError:
            code = _code_of_abort(context)  # the method (health's, of the library) has sent its status already
            raise
        except DecodeError:
            # gRPC's libraries say INTERNAL, which would count as a fault of the service and call somebody out of bed.
            code = grpc.StatusCode.INVALID_ARGUMENT
            message = b""
            await context.abort(code, "the request is damaged, or no message of this method", trailers)
        except Exception as error:  # noqa: BLE001  # whatever it is, the client gets a status and the log the cause
            code = status.code_of(error)
            if code is grpc.StatusCode.INTERNAL or isinstance(error, EngineError):
                self._failures.caused(error)
            if isinstance(error, UnavailableError):
                self._shed.labels(error.reason).inc()
            text = status.message_of(error, request_id)
            trailers += status.retry_pushback(error) + status.details_of(error, text)
            # grpc keeps what abort raises in a circle until Python looks for circles; the images are not to be in it.
            message, error.__traceback__ = b"", None
            await context.abort(code, text, trailers)
        finally:
            self._record(code, time.monotonic() - began)
            if self._arrivals:
                self._arrivals.came()

    def _record(self, code: grpc.StatusCode, elapsed_s: float) -> None:
        self._seconds.observe(elapsed_s)
        handled = self._by_code.get(code)
        if handled is None:
            handled = self._by_code[code] = self._handled.labels(*self._labels, _camel(code))
        handled.inc()
        if code is not grpc.StatusCode.OK:
            self._failures.failed(code.name, round(elapsed_s * 1000, 2))


def _code_of_cancellation(context: Context) -> grpc.StatusCode:
    """A handler is cancelled when the client hangs up and also when its deadline passes."""
    remaining: float | None = context.time_remaining()
    passed = remaining is not None and remaining <= 0
    return grpc.StatusCode.DEADLINE_EXCEEDED if passed else grpc.StatusCode.CANCELLED


def _code_of_abort(context: Context) -> grpc.StatusCode:
    """The status a method aborted with; the library gives it as the constant or as its number."""
    sent: Any = context.code()
    return next((code for code in grpc.StatusCode if sent in (code, code.value[0])), grpc.StatusCode.UNKNOWN)


def _camel(code: grpc.StatusCode) -> str:
    """OK stays, INVALID_ARGUMENT becomes InvalidArgument: the label values of go-grpc-prometheus."""
    return code.name if code is grpc.StatusCode.OK else code.name.title().replace("_", "")


def _is_harmless(value: str) -> bool:
    """In a log, and in a trailer: gRPC fails the whole call for one that is not ASCII."""
    return value.isascii() and value.isprintable()


def _request_id(context: Context) -> str:
    """The client's id if it is harmless in a log and a header, else a new one."""
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID and isinstance(value, str) and 0 < len(value) <= _MAX_ID_LENGTH and _is_harmless(value):
            return value
    return f"{random.getrandbits(128):032x}"
