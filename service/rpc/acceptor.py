"""A gRPC server that takes calls faster than grpc.aio's own, and that one strange frame does not end.

grpc.aio takes all calls in one task: one call of each method, for which it waits on all methods, then the next. With
tiny models that is a good part of what a call costs, and each turn of the event loop sees one call, so that there is
nothing to batch. Here several calls of a method are taken at a time, each by a task that waits for nothing else.

That task of the library also decodes, as UTF-8, the path of a call to a method that it does not have. A path that is no
UTF-8 ends it, and the library answers that by stopping the server: calls in flight are cancelled and the port closes,
for the sake of one frame that anybody who reaches the port can send. (Seen with grpcio 1.85; TLS with client
certificates narrows down who can.) So calls to unknown methods are taken here, too, and answered with UNIMPLEMENTED
without a look at the path.

This leans on parts of grpcio that are not its public API. Where a release does not have them, the library's own server
serves, and the log says what that means.
"""

# ruff: noqa: SLF001

from __future__ import annotations

import asyncio
import contextlib
import importlib
from collections.abc import Coroutine, Sequence
from typing import Any

import grpc
from grpc import aio

from service import logs

_log = logs.get("rpc")

_core: Any = importlib.import_module("grpc._cython.cygrpc")
_library: Any = importlib.import_module("grpc.aio._server")

_NEEDED = (
    (_core, ("get_working_loop", "_schedule_rpc_coro", "_ServicerContext")),
    (_core, ("_handle_stream_unary_rpc", "_handle_stream_stream_rpc", "_RequestCallError")),
    (
        _core.AioServer,
        ("_make_request_call_future", "_request_call", "_request_registered_call", "add_registered_method_handlers"),
    ),
    (_library, ("_augment_channel_arguments",)),
)

# Calls of one method that a turn of the event loop can take.
AT_A_TIME = 8


class _Details(grpc.HandlerCallDetails):
    """What an interceptor is told of a method; there is no call yet."""

    def __init__(self, method: str) -> None:
        self.method = method
        self.invocation_metadata = ()


def server(
    interceptor: aio.ServerInterceptor, options: Sequence[tuple[str, int]], at_a_time: int = AT_A_TIME
) -> aio.Server:
    """A server to add services and ports to, as `grpc.aio.server` gives it.

    Args:
        interceptor: gives a handler that takes a stream of messages, whatever the method is; asked once for each
            method (by the library's own server for each call).
        options: of the channel.
        at_a_time: calls of one method that a turn of the event loop can take, at least 1.
    """
    if all(hasattr(place, name) for place, names in _NEEDED for name in names):
        with contextlib.suppress(TypeError):  # one of them takes other arguments
            hardened: aio.Server = _Server(interceptor, options, at_a_time)
            return hardened
    _log.warning("calls cost more, and one with a damaged path can stop this server", grpcio=grpc.__version__)
    return aio.server(interceptors=[interceptor], options=options)


def is_answering(server: aio.Server) -> bool:
    """Whether a call is under way that is answered once; where that cannot be told, it may be."""
    return server.acceptor.is_answering() if isinstance(server, _Server) else True


class _Acceptor(_core.AioServer):  # type: ignore[misc]  # the library's types leave its core out
    """Takes the calls. The library's own loop only waits for the tasks that do so, which end with the server."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, interceptor: aio.ServerInterceptor, options: Any, at_a_time: int
    ) -> None:
        super().__init__(loop, None, (), (), options, None)
        self._interceptor = interceptor
        self._at_a_time = at_a_time
        self._handlers: dict[str, Any] = {}  # by path; the base class hides its own
        # The loop itself keeps no more than weak references. A task lasts until its call is over on the wire.
        self._answers: set[asyncio.Task[None]] = set()
        self._streams: set[asyncio.Task[None]] = set()

    def add_registered_method_handlers(self, handlers: dict[str, Any]) -> None:
        """Called by the library when a service is added."""
        super().add_registered_method_handlers(handlers)
        self._handlers.update(handlers)

    def _make_request_call_future(self, method: bytes | None) -> asyncio.Future[Any]:
        """What the library waits for: a call of a method, or of none that it has. Here, the end of the server."""
        return asyncio.get_running_loop().create_task(self._take_unknown() if method is None else self._take(method))

    async def _take(self, method: bytes) -> None:
        path = method.decode()

        async def registered(_: grpc.HandlerCallDetails) -> Any:
            return self._handlers[path]

        handler: Any = await self._interceptor.intercept_service(registered, _Details(path))
        answer = _core._handle_stream_stream_rpc if handler.response_streaming else _core._handle_stream_unary_rpc

        async def one_by_one() -> None:
            loop = asyncio.get_running_loop()
            while True:
                try:
                    call = await self._request_registered_call(method)
                except _core._RequestCallError:
                    if self.is_running():
                        continue
                    raise  # the library looks for it
                task = self._answer(call, answer(handler, call, loop), path)
                if handler.response_streaming:
                    self._streams.add(task)
                    task.add_done_callback(self._streams.discard)
                del call  # or it would stay until there is another one

        await asyncio.gather(*(one_by_one() for _ in range(self._at_a_time)))

    async def _take_unknown(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            call = await self._request_call()
            refusal = _core._ServicerContext(call, None, None, loop).abort(
                grpc.StatusCode.UNIMPLEMENTED, "there is no such method"
            )
            self._answer(call, refusal, "unknown")
            del call, refusal

    def is_answering(self) -> bool:
        """Whether a call is under way that is answered once."""
        return len(self._answers) > len(self._streams)

    def _answer(self, call: Any, answering: Coroutine[Any, Any, None], path: str) -> asyncio.Task[None]:
        loop = asyncio.get_running_loop()
        task: asyncio.Task[None] = loop.create_task(_core._schedule_rpc_coro(answering, call, loop, path))
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)
        return task


class _Server(_library.Server):  # type: ignore[misc]
    """The library's server around that."""

    def __init__(self, interceptor: aio.ServerInterceptor, options: Sequence[tuple[str, int]], at_a_time: int) -> None:
        # Not the base class's own, which does the same with the library's acceptor.
        self._loop = _core.get_working_loop()
        augmented = _library._augment_channel_arguments(options, None)  # as the base class does
        self.acceptor = self._server = _Acceptor(self._loop, interceptor, augmented, at_a_time)
