"""A client for `convoy.v1`, for the command line and for scripts; other programs can use the stubs as they are."""

from __future__ import annotations

import contextlib
import ssl
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc
from convoy.v1 import image_classifier_pb2 as pb
from convoy.v1 import image_classifier_pb2_grpc as pb_grpc
from grpc_status import rpc_status

from service.errors import ConfigurationError
from service.exits import ServerRefusedError
from service.reach import unreachable

_UNLIMITED = -1

# Spread over the addresses of a headless service, and retry what the server refused before it did anything.
_SERVICE_CONFIG = """{
  "loadBalancingConfig": [{"round_robin": {}}],
  "methodConfig": [{
    "name": [{"service": "convoy.v1.ImageClassifier"}],
    "retryPolicy": {"maxAttempts": 4, "initialBackoff": "0.1s", "maxBackoff": "2s", "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"]}
  }]
}"""


@dataclass(frozen=True)
class ClientTls:
    """PEM files: the authority that signed the server's certificate, and the client's own pair for mutual TLS."""

    ca: Path
    certificate: Path | None = None
    key: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """What a channel needs.

        Raises:
            ConfigurationError: a file cannot be read, is no PEM, or the pair is none.
        """
        try:
            ca, key, chain = (path.read_bytes() if path else None for path in (self.ca, self.key, self.certificate))
            self.context()
        except ssl.SSLError as error:
            pair = f", and in {self.key} the key of {self.certificate}" if self.key else ""
            raise ConfigurationError(
                f"TLS cannot use its files ({error.reason or error}); expected PEM: authorities in {self.ca}{pair}"
            ) from None
        except OSError as error:
            raise ConfigurationError(f"{error.filename} cannot be read: {error.strerror}") from error
        return grpc.ssl_channel_credentials(ca, key, chain)

    def context(self) -> ssl.SSLContext:
        """The same for Python's own TLS, which tells what is wrong: of gRPC one only learns that nobody answers.

        Raises:
            OSError: what is wrong with the files.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.ca)
        if self.certificate:
            context.load_cert_chain(self.certificate, self.key)
        return context


class Client:
    """A connection to a server. Use it in a `with` block.

    Args:
        target: `host:port`, or any gRPC target such as `dns:///convoy-headless:8500`.
        timeout_s: deadline of each call; the server schedules by it.
        connect_timeout_s: longest wait for the connection.
        tls: files for TLS; None speaks plain text.

    Raises:
        ServerUnreachableError: on entering the `with` block, if nothing answers in time.
    """

    def __init__(
        self, target: str, timeout_s: float = 30.0, connect_timeout_s: float = 3.0, tls: ClientTls | None = None
    ) -> None:
        self._target = target
        self._timeout_s = timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._tls = tls
        options = [
            ("grpc.max_send_message_length", _UNLIMITED),
            ("grpc.max_receive_message_length", _UNLIMITED),
            ("grpc.service_config", _SERVICE_CONFIG),
        ]
        self._channel = (
            grpc.secure_channel(target, tls.credentials(), options) if tls else grpc.insecure_channel(target, options)
        )
        self._stub = pb_grpc.ImageClassifierStub(self._channel)

    def __enter__(self) -> Self:
        ready = grpc.channel_ready_future(self._channel)
        try:
            ready.result(timeout=self._connect_timeout_s)
        except grpc.FutureTimeoutError:
            self._channel.close()
            raise unreachable(self._target, self._tls.context() if self._tls else None) from None
        except BaseException:  # Ctrl-C: an open channel would hold up the end of the process
            self._channel.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    def classify(self, request: pb.ClassifyRequest) -> pb.ClassifyResponse:
        """Classifies the images of one request.

        Raises:
            ServerRefusedError: the server answered with an error; the message carries its status and text.
        """
        with _translated():
            return self._stub.Classify(request, timeout=self._timeout_s)

    def classify_all(
        self, requests: Iterable[pb.ClassifyRequest], in_flight: int = 8
    ) -> Iterator[tuple[pb.ClassifyResponse | ServerRefusedError, float]]:
        """Sends many requests, some at the same time, and yields each outcome with its latency in seconds, in order."""
        waiting: deque[_Timed] = deque()
        source = iter(requests)
        exhausted = False
        while waiting or not exhausted:
            while not exhausted and len(waiting) < in_flight:
                request = next(source, None)
                if request is None:
                    exhausted = True
                    break
                waiting.append(_Timed(self._stub.Classify.future(request, timeout=self._timeout_s)))
            if waiting:
                yield waiting.popleft().outcome()

    def models(self) -> Sequence[pb.ModelSummary]:
        """What the server serves."""
        with _translated():
            return self._stub.ListModels(pb.ListModelsRequest(), timeout=self._timeout_s).models

    def model(self, name: str = "", version: int | None = None) -> pb.GetModelResponse:
        """One model version in full."""
        with _translated():
            return self._stub.GetModel(pb.GetModelRequest(model=name, version=version), timeout=self._timeout_s)


class _Timed:
    """A call under way, and when it ended."""

    def __init__(self, call: grpc.Future[pb.ClassifyResponse]) -> None:
        self._call = call
        self._began = time.monotonic()
        self._ended = 0.0
        self._done = threading.Event()
        call.add_done_callback(self._end)

    def outcome(self) -> tuple[pb.ClassifyResponse | ServerRefusedError, float]:
        """Waits for the call; its reply or its error, and its latency in seconds."""
        self._done.wait()
        latency_s = self._ended - self._began
        try:
            return self._call.result(), latency_s
        except grpc.RpcError as error:
            return refusal(error), latency_s

    def _end(self, _: object) -> None:
        self._ended = time.monotonic()
        self._done.set()


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise refusal(error) from None


def refusal(error: grpc.RpcError) -> ServerRefusedError:
    """What a call's error means to the command line: the server answered, and refused."""
    # Every RpcError that a call raises is a Call, too; the type does not say so.
    try:
        status = rpc_status.from_call(error)
    except ValueError:  # a proxy has changed the text or the code, or what is there is of another protocol
        status = None
    text = error.details() or ""
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        text += "; classification and the admin API (--admin) have ports of their own: is this the right one?"
    return ServerRefusedError(error.code().name, text, status.details if status else ())
