"""A gRPC server that one strange frame does not end.

grpc.aio takes all calls in one task, and decodes there, as UTF-8, the path of a call to a method that it does not have.
A path that is no UTF-8 ends that task, and the library answers that by stopping the server: calls in flight are
cancelled and the port closes, for the sake of one frame that anybody who reaches the port can send. (Seen with grpcio
1.85; TLS with client certificates narrows down who can.) So calls to unknown methods are taken here, by a task of their
own that answers UNIMPLEMENTED and never looks at the path. Known methods are registered with the library and go its
own way.

This leans on parts of grpcio that are not its public API. Where a release does not have them, the library's own server
serves, and the log says what that means.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Sequence
from typing import Any

import grpc
from grpc import aio

from service import logs

_log = logs.get("rpc")

_core: Any = importlib.import_module("grpc._cython.cygrpc")
_library: Any = importlib.import_module("grpc.aio._server")

_NEEDED = (
    (_core, ("get_working_loop", "_schedule_rpc_coro", "_ServicerContext")),
    (_core.AioServer, ("_make_request_call_future", "_request_call", "add_registered_method_handlers")),
    (_library, ("_augment_channel_arguments",)),
)


def server(interceptors: Sequence[aio.ServerInterceptor], options: Sequence[tuple[str, int]]) -> aio.Server:
    """A server to add services and ports to, as `grpc.aio.server` gives it."""
    if all(hasattr(place, name) for place, names in _NEEDED for name in names):
        hardened: aio.Server = _Server(interceptors, options)
        return hardened
    _log.warning("a call with a damaged path can stop this server", grpcio=grpc.__version__)
    return aio.server(interceptors=interceptors, options=options)


class _Acceptor(_core.AioServer):  # type: ignore[misc]  # the library's types leave its core out
    """Takes calls to methods that are not registered, and answers each that there is no such method."""

    def _make_request_call_future(self, method: bytes | None) -> asyncio.Future[Any]:
        """A future of the next call to a registered method; for the others (None) one that ends with the server."""
        if method is None:
            return asyncio.get_running_loop().create_task(self._answer_unknown())
        registered: asyncio.Future[Any] = super()._make_request_call_future(method)
        return registered

    async def _answer_unknown(self) -> None:
        loop = asyncio.get_running_loop()
        answers: set[asyncio.Task[None]] = set()  # the loop itself keeps no more than weak references
        while True:
            call = await self._request_call()
            refusal = _core._ServicerContext(call, None, None, loop).abort(  # noqa: SLF001  # see the module's docstring
                grpc.StatusCode.UNIMPLEMENTED, "there is no such method"
            )
            answer = loop.create_task(_core._schedule_rpc_coro(refusal, call, loop, "unknown"))  # noqa: SLF001
            answers.add(answer)
            answer.add_done_callback(answers.discard)


class _Server(_library.Server):  # type: ignore[misc]
    """The library's server around that."""

    def __init__(self, interceptors: Sequence[Any], options: Sequence[tuple[str, int]]) -> None:
        # Not the base class's own, which does the same with the library's acceptor.
        self._loop = _core.get_working_loop()
        augmented = _library._augment_channel_arguments(options, None)  # noqa: SLF001  # as the base class does
        self._server = _Acceptor(self._loop, None, (), interceptors, augmented, None)
