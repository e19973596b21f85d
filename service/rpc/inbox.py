"""Requests on their way in: calls that are open and whose message has not arrived.

No admission knows of them yet, for nobody knows how many images they bring; gRPC waits for them as long as their
connection lasts. So they are bounded here, in time and in number.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import math
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from service.errors import ConvoyError, DrainingError, ExpiredError, InvalidRequestError, OverloadedError
from service.rpc import status

# A call that its client reset reads as one that ended, and is cancelled a moment later.
_MOMENT_S = 0.01

_RETRY_MS = 100

Context = aio.ServicerContext[Any, Any]


def arrived(message: bytes | ConvoyError) -> bytes:
    """The message, or raises what there is instead."""
    if isinstance(message, ConvoyError):
        raise message
    return message


class Inbox:
    """Receives the messages of calls.

    Args:
        patience_s: longest wait for a whole message; 0 waits as long as the connection lasts.
        most: calls that may wait for theirs at a time; one more ends the one that has waited longest, so that those
            who never send cannot keep out those who do.
    """

    def __init__(self, patience_s: float, most: int) -> None:
        self._patience_s = patience_s or math.inf
        self._most = most
        self._waiting: dict[asyncio.Task[Any], float] = {}  # since when; oldest first
        self._ended: dict[asyncio.Task[Any], ConvoyError] = {}  # and why
        self._streams: set[asyncio.Task[Any]] = set()  # calls that last as long as their clients like
        self._timer: asyncio.TimerHandle | None = None
        self.closed = False

    async def message(self, context: Context) -> bytes | ConvoyError:
        """The next message of a call, or why there is none: for the caller to raise where it handles errors.

        Called in the call's own task.
        """
        if self.closed:
            return DrainingError()
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None  # noqa: S101  # inside of a coroutine there is one
        if len(self._waiting) >= self._most:
            self._end(
                next(iter(self._waiting)),
                OverloadedError("too many calls wait for their messages", "unsent", _RETRY_MS),
            )
        self._waiting[task] = loop.time()
        if self._timer is None and self._patience_s < math.inf:
            self._timer = loop.call_later(self._patience_s, self._look)
        try:
            message: Any = await context.read()
            if message is aio.EOF:
                await asyncio.sleep(_MOMENT_S)
        except asyncio.CancelledError:
            if task not in self._ended:
                raise
            task.uncancel()
            return self._ended.pop(task)
        finally:
            self._waiting.pop(task, None)
        return InvalidRequestError("the call ended without a request") if message is aio.EOF else message

    @contextlib.contextmanager
    def streaming(self) -> Iterator[None]:
        """Around a call whose answer is a stream, in its own task: `close` cancels it."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101  # inside of a coroutine there is one
        self._streams.add(task)
        try:
            yield
        finally:
            self._streams.discard(task)

    def close(self) -> None:
        """Ends those that wait and those that stream, and takes no more: a server that stops waits for what it has."""
        self.closed = True
        for task in self._streams - self._waiting.keys():
            task.cancel()
        for task in list(self._waiting):
            self._end(task, DrainingError())

    def _look(self) -> None:
        """Ends those that have waited too long, and comes back for the next."""
        now = asyncio.get_running_loop().time()
        for task, since in list(self._waiting.items()):
            left_s = since + self._patience_s - now
            if left_s > 0:
                self._timer = asyncio.get_running_loop().call_later(left_s, self._look)
                return
            self._end(task, ExpiredError(f"the request did not arrive within {self._patience_s:g} s; send it again"))
        self._timer = None

    def _end(self, task: asyncio.Task[Any], why: ConvoyError) -> None:
        del self._waiting[task]
        self._ended[task] = why
        task.cancel()


class Streamed:
    """A method whose answer is a stream, for instance reflection: its first message is waited for with patience.

    Args:
        handler: the method as its service registered it.
        parse: makes a request of a message.
        inbox: receives the messages.
    """

    def __init__(self, handler: Any, parse: Callable[[bytes], Any], inbox: Inbox) -> None:
        self._method: Any = handler.stream_stream or handler.unary_stream
        self._parse = parse
        self._many: bool = handler.request_streaming
        self._inbox = inbox

    async def handle(self, _: object, context: Context) -> None:
        """Answers one call."""
        try:
            with self._inbox.streaming():
                await self._answer(context)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or not self._inbox.closed:
                raise
            task.uncancel()
            error = DrainingError()
            await context.abort(status.code_of(error), str(error))
        except DecodeError:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, "the request is damaged, or no message of this method"
            )
        except ConvoyError as error:
            await context.abort(status.code_of(error), str(error))

    async def _answer(self, context: Context) -> None:
        request = self._requests(context) if self._many else self._parse(arrived(await self._inbox.message(context)))
        if inspect.isasyncgenfunction(self._method):
            async for reply in self._method(request, context):
                await context.write(reply)
        else:
            await self._method(request, context)

    async def _requests(self, context: Context) -> AsyncIterator[Any]:
        message: Any = await self._inbox.message(context)
        while message is not aio.EOF and not isinstance(message, InvalidRequestError):
            yield self._parse(arrived(message))
            message = await context.read()  # when there is another is up to the client
