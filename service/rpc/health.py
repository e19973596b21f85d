"""`grpc.health.v1`: what probes and load balancers ask.

The library's own servicer holds a lock while it writes to who watches: one that does not read on keeps the state from
being changed, for all of them and for the server, which could then neither become ready nor stop.
"""

from __future__ import annotations

import asyncio
from typing import Any, NoReturn

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1 import health_pb2_grpc as pb_grpc

_pb: Any = pb
Context = aio.ServicerContext[Any, Any]

# A name is kept as long as it is watched. The longest one that means anything is that of a service.
_LONGEST_NAME = 256


class Health(pb_grpc.HealthServicer):
    """The states of named services. Belongs to the event loop."""

    def __init__(self) -> None:
        self._states: dict[str, int] = {}
        self._changes: set[asyncio.Event] = set()  # one of each watcher

    def set(self, state: int, *names: str) -> None:
        """From now on the services are in that state; watchers are told as soon as they read."""
        self._states.update(dict.fromkeys(names, state))
        for change in self._changes:
            change.set()

    async def Check(self, request: pb.HealthCheckRequest, context: Context) -> pb.HealthCheckResponse:  # noqa: N802  # the name is the API's
        """One state; NOT_FOUND for a service that is not known."""
        state = self._states.get(request.service)
        if state is None:
            await _unknown(context)
        return pb.HealthCheckResponse(status=state)

    async def List(self, request: Any, context: Context) -> Any:  # noqa: N802
        """All of them; the types of the library do not know these messages yet."""
        del request, context
        return _pb.HealthListResponse(
            statuses={name: pb.HealthCheckResponse(status=state) for name, state in self._states.items()}
        )

    async def Watch(self, request: pb.HealthCheckRequest, context: Context) -> None:  # noqa: N802
        """The state now, and whenever it has changed; of a service that is not known, SERVICE_UNKNOWN."""
        name = request.service
        if len(name) > _LONGEST_NAME:
            await _unknown(context)
        change = asyncio.Event()
        self._changes.add(change)
        try:
            told: int | None = None
            while True:
                change.clear()
                state = self._states.get(name, pb.HealthCheckResponse.SERVICE_UNKNOWN)
                if state != told:
                    await context.write(pb.HealthCheckResponse(status=state))
                    told = state
                await change.wait()
        finally:
            self._changes.discard(change)


async def _unknown(context: Context) -> NoReturn:
    await context.abort(grpc.StatusCode.NOT_FOUND, "there is no such service")
    raise AssertionError("abort raises")
