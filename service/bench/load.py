"""The load generator: closed loop (a fixed number of callers) and open loop (arrivals at a rate, come what may).

In an open loop each request has an intended time, drawn from a Poisson process beforehand, and its latency counts from
then: if the generator or the server stalls, the requests that should have been sent meanwhile are late, as they would
be for users. (Counting from the actual sending is the "coordinated omission" described by Gil Tene.) A closed loop has
no intended times; it shows what a number of callers get who wait for each answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

import grpc
from convoy.v1 import image_classifier_pb2 as pb
from grpc import aio

from service.client import ClientTls
from service.exits import ServerRefusedError
from service.reach import unreachable

_CLASSIFY = "/convoy.v1.ImageClassifier/Classify"
_UNLIMITED = -1
_CONNECT_TIMEOUT_S = 3.0
_TRY_TIMEOUT_S = 30.0
_LAG_INTERVAL_S = 0.01
OK = "OK"


class Sample(NamedTuple):
    """One request. Times in seconds on the monotonic clock; server times in microseconds, 0 if it did not answer.

    `intended_s` is when it was to be sent; `sent_s` when it was. `status` is the name of the gRPC status code. Images
    that have an error in their place although the request succeeded are counted in `bad_images`.
    """

    intended_s: float
    sent_s: float
    ended_s: float
    status: str
    images: int = 0
    bad_images: int = 0
    queue_us: int = 0
    decode_us: int = 0
    inference_us: int = 0


@dataclass(frozen=True)
class Level:
    """One step of a sweep: `value` callers (closed loop) or requests a second (open loop)."""

    loop: Literal["closed", "open"]
    value: float

    def __str__(self) -> str:
        return f"{self.value:g} callers" if self.loop == "closed" else f"{self.value:g}/s"


@dataclass(frozen=True)
class Plan:
    """How long each level runs: `warmup_s` unmeasured, then `duration_s` or until `count` requests were sent."""

    deadline_s: float = 1.0
    warmup_s: float = 2.0
    duration_s: float = 10.0
    count: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Measurement:
    """What one level gave: every request, those of the warm-up included, and how the generator itself fared.

    The window is what counts, from the end of the warm-up to the end of sending or, for a number of requests, of the
    last answer. `sending_s` is how long was sent after the warm-up. `lag_s` are delays of a timer in the generator's
    event loop; `cpu_share` is how much of one core the generator used.
    """

    level: Level
    deadline_s: float
    samples: Sequence[Sample]
    window_s: tuple[float, float]
    lag_s: Sequence[float]
    cpu_share: float
    sending_s: float


Send = Callable[[float], Awaitable[Sample]]
_Call: TypeAlias = "aio.UnaryUnaryMultiCallable[bytes, pb.ClassifyResponse]"


@contextlib.asynccontextmanager
async def sender(
    target: str,
    requests: Sequence[bytes],
    deadline_s: float,
    connections: int = 1,
    connect_timeout_s: float = _CONNECT_TIMEOUT_S,
    tls: ClientTls | None = None,
) -> AsyncIterator[Send]:
    """Connects, tries one request, and gives a function that sends the next one with an intended time.

    Raises:
        ConfigurationError: a file of `tls` cannot be read.
        ServerUnreachableError: nothing answers at the address.
        ServerRefusedError: the server refuses the request for a reason that more of them would not change.
    """
    options = [
        ("grpc.max_send_message_length", _UNLIMITED),
        ("grpc.max_receive_message_length", _UNLIMITED),
        ("grpc.use_local_subchannel_pool", 1),  # otherwise the channels would share one connection
        ("grpc.enable_retries", 0),
    ]
    async with contextlib.AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(_channel(target, options, tls)) for _ in range(connections)]
        await asyncio.gather(*(_connect(channel, target, connect_timeout_s, tls) for channel in channels))
        calls: list[_Call] = [
            channel.unary_unary(_CLASSIFY, response_deserializer=pb.ClassifyResponse.FromString) for channel in channels
        ]
        await _try(calls[0], requests[0])
        pairs = zip(itertools.cycle(calls), itertools.cycle(requests), strict=False)

        async def send(intended_s: float) -> Sample:
            call, request = next(pairs)
            return await _send(call, request, intended_s, deadline_s)

        yield send


def _channel(target: str, options: Sequence[tuple[str, int]], tls: ClientTls | None) -> aio.Channel:
    if tls is None:
        return aio.insecure_channel(target, options)
    return aio.secure_channel(target, tls.credentials(), options)


async def measure(send: Send, level: Level, plan: Plan, stopped: asyncio.Event) -> Measurement:
    """Runs one level to its end, or until `stopped` is set; requests under way are waited for."""
    run = _Run(plan, stopped)
    lags: list[float] = []
    watch = asyncio.create_task(_watch(lags))
    cpu_s, began_s = time.process_time(), time.monotonic()
    try:
        await (_closed if level.loop == "closed" else _open)(send, level.value, run, random.Random(plan.seed))
        cpu_share = (time.process_time() - cpu_s) / max(time.monotonic() - began_s, 1e-9)
    finally:
        watch.cancel()
    return Measurement(level, plan.deadline_s, run.samples, run.window_s(), lags, cpu_share, run.sending_s())


@dataclass
class _Run:
    """The clock of one level: when it starts to count and when to stop sending."""

    plan: Plan
    stopped: asyncio.Event
    samples: list[Sample] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.start_s = time.monotonic() + self.plan.warmup_s
        self._stop_s = math.inf if self.plan.count else self.start_s + self.plan.duration_s
        self._left = self.plan.count or math.inf
        self._sent_until_s = math.inf

    def goes_on(self, at_s: float) -> bool:
        """Whether a request may be sent at that time."""
        if self.stopped.is_set():
            self._stop_s = min(self._stop_s, time.monotonic())
        if at_s >= self._stop_s or self._left <= 0:
            return False
        self._left -= at_s >= self.start_s
        return True

    def ends(self, at_s: float) -> None:
        """Nothing more is sent from that time on."""
        if self.stopped.is_set():
            self._stop_s = at_s = min(self._stop_s, time.monotonic())
        self._sent_until_s = min(at_s, self._stop_s)

    def sending_s(self) -> float:
        """Seconds after the warm-up in which requests were sent."""
        return max(0.0, min(self._sent_until_s, self.window_s()[1]) - self.start_s)

    def window_s(self) -> tuple[float, float]:
        """From the end of the warm-up to the end of sending or, for a number of requests, of the last answer."""
        return self.start_s, max(min(self._stop_s, time.monotonic()), self.start_s)


async def _closed(send: Send, callers: float, run: _Run, _rng: random.Random) -> None:
    async def caller() -> None:
        while run.goes_on(now := time.monotonic()):
            run.samples.append(await send(now))

    async with asyncio.TaskGroup() as group:
        for _caller in range(int(callers)):
            group.create_task(caller())


async def _open(send: Send, rate: float, run: _Run, rng: random.Random) -> None:
    async def one(intended_s: float) -> None:
        run.samples.append(await send(intended_s))

    intended_s = time.monotonic()
    async with asyncio.TaskGroup() as group:
        while run.goes_on(intended_s):
            await _sleep_until(intended_s, run.stopped)
            if run.stopped.is_set():
                break
            group.create_task(one(intended_s))
            intended_s += rng.expovariate(rate)
        run.ends(intended_s)


async def _sleep_until(when_s: float, stopped: asyncio.Event) -> None:
    await asyncio.sleep(0)  # even when late, let answers in
    left_s = when_s - time.monotonic()
    if left_s > 0:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stopped.wait(), left_s)


async def _watch(lags: list[float]) -> None:
    while True:
        began_s = time.monotonic()
        await asyncio.sleep(_LAG_INTERVAL_S)
        lags.append(time.monotonic() - began_s - _LAG_INTERVAL_S)


async def _connect(channel: aio.Channel, target: str, timeout_s: float, tls: ClientTls | None) -> None:
    try:
        await asyncio.wait_for(channel.channel_ready(), timeout_s)
    except TimeoutError:
        raise await asyncio.to_thread(unreachable, target, tls.context() if tls else None) from None


async def _try(call: _Call, request: bytes) -> None:
    try:
        await call(request, timeout=_TRY_TIMEOUT_S)
    except aio.AioRpcError as error:
        if error.code() not in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}:
            raise ServerRefusedError(error.code().name, error.details() or "") from None


async def _send(call: _Call, request: bytes, intended_s: float, deadline_s: float) -> Sample:
    sent_s = time.monotonic()
    left_s = intended_s + deadline_s - sent_s
    if left_s <= 0:  # the generator is so late that a user would have given up
        return Sample(intended_s, sent_s, sent_s, grpc.StatusCode.DEADLINE_EXCEEDED.name)
    try:
        reply = await call(request, timeout=left_s)
    except aio.AioRpcError as error:
        return Sample(intended_s, sent_s, time.monotonic(), error.code().name)
    ended_s = time.monotonic()
    bad = sum(result.HasField("error") for result in reply.results)
    timing = reply.timing
    return Sample(
        intended_s,
        sent_s,
        ended_s,
        OK,
        len(reply.results),
        bad,
        timing.queue_us,
        timing.decode_us,
        timing.inference_us,
    )
