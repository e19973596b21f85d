"""Which work runs next: earliest deadline first within a priority, fair between flows.

A pure data structure without threads, clocks or futures of its own, so that every decision can be tested and replayed.
Work is counted in images. A `Job` larger than a batch is taken in parts.

Fairness is start-time fair queueing over flows (Goyal, Vin, Cheng 1996): each flow has a virtual time that advances by
the images it was given; the flow with the smallest one goes next; a flow that wakes up starts at the present, or where
it left off if that is later, so that neither idling nor coming back earns credit. Deadlines decide within a flow, never
between flows.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, TypeVar


class Work(Protocol):
    """What the queue has to know of a job."""

    @property
    def size(self) -> int:
        """Images, at least 1."""

    @property
    def deadline(self) -> float:
        """Monotonic seconds."""

    @property
    def priority(self) -> int:
        """Smaller is more urgent."""

    @property
    def abandoned(self) -> bool:
        """Nobody waits for the answer any more."""


J = TypeVar("J", bound=Work)


class Part(NamedTuple, Generic[J]):
    """Images `start` to `stop` of a job."""

    job: J
    start: int
    stop: int


@dataclass(slots=True)
class Taken(Generic[J]):
    """What one look into the queue gave: a batch, and what was dropped on the way to it."""

    parts: list[Part[J]] = field(default_factory=list)
    expired: list[J] = field(default_factory=list)
    abandoned: list[J] = field(default_factory=list)
    shed: list[J] = field(default_factory=list)

    @property
    def images(self) -> int:
        """Images in the batch."""
        return sum(part.stop - part.start for part in self.parts)


@dataclass(slots=True)
class _Flow(Generic[J]):
    heap: list[tuple[int, float, int, J]] = field(default_factory=list)
    virtual_time: float = 0.0


class FairQueue(Generic[J]):
    """Jobs by flow, priority and deadline."""

    def __init__(self) -> None:
        self._flows: dict[Hashable, _Flow[J]] = {}
        self._ahead: dict[Hashable, float] = {}  # virtual time of flows that are empty but ahead of the present
        self._taken: dict[int, int] = {}  # images already taken of the job with this sequence number
        self._order = itertools.count()
        self._now = 0.0  # virtual time of the flow served last
        self.images = 0

    def __len__(self) -> int:
        """Jobs waiting. Not to be asked while another thread may change the queue; `images` may be."""
        return sum(len(flow.heap) for flow in self._flows.values())

    def push(self, job: J, flow: Hashable = None) -> None:
        """Adds a job to a flow."""
        lane = self._flows.get(flow)
        if lane is None:
            lane = self._flows[flow] = _Flow(virtual_time=max(self._now, self._ahead.pop(flow, 0.0)))
        heapq.heappush(lane.heap, (job.priority, job.deadline, next(self._order), job))
        self.images += job.size

    def take(self, max_images: int, horizon: float, sheds: Callable[[J], bool] | None = None) -> Taken[J]:
        """Takes up to `max_images` images, splitting the last job if it does not fit.

        Args:
            max_images: most images, at least 1.
            horizon: monotonic seconds at which the work would be done; a job with an earlier deadline has expired.
            sheds: asked once for each whole job about to be taken; True takes it out unserved.
        """
        taken: Taken[J] = Taken()
        room = max_images
        while room and (entry := self._next(taken, horizon, sheds)):
            flow, number, job = entry
            start = self._taken.get(number, 0)
            stop = min(job.size, start + room)
            taken.parts.append(Part(job, start, stop))
            self._advance(flow, number, job, stop)
            self.images -= stop - start
            room -= stop - start
        return taken

    def drain(self) -> list[J]:
        """Removes and returns all jobs, in no particular order."""
        jobs = [job for flow in self._flows.values() for *_, job in flow.heap]
        self._flows.clear()
        self._ahead.clear()
        self._taken.clear()
        self.images = 0
        return jobs

    def _next(
        self, taken: Taken[J], horizon: float, sheds: Callable[[J], bool] | None
    ) -> tuple[Hashable, int, J] | None:
        """The head of the flow whose turn it is; takes out the abandoned, the expired and the shed it meets."""
        while self._flows:
            flow, lane = min(self._flows.items(), key=lambda item: item[1].virtual_time)
            _, deadline, number, job = lane.heap[0]
            if job.abandoned:
                taken.abandoned.append(job)
            elif deadline < horizon:
                taken.expired.append(job)
            elif sheds is not None and number not in self._taken and sheds(job):
                taken.shed.append(job)
            else:
                return flow, number, job
            self._remove_head(flow, number, job)
        return None

    def _advance(self, flow: Hashable, number: int, job: J, stop: int) -> None:
        lane = self._flows[flow]
        self._now = lane.virtual_time
        lane.virtual_time += stop - self._taken.get(number, 0)
        if stop == job.size:
            heapq.heappop(lane.heap)
            self._taken.pop(number, None)
            self._forget_if_empty(flow)
        else:
            self._taken[number] = stop

    def _remove_head(self, flow: Hashable, number: int, job: J) -> None:
        heapq.heappop(self._flows[flow].heap)
        self.images -= job.size - self._taken.pop(number, 0)
        self._forget_if_empty(flow)

    def _forget_if_empty(self, flow: Hashable) -> None:
        if self._flows[flow].heap:
            return
        # A flow that leaves takes no credit with it, but what it was given beyond the others is remembered: otherwise
        # a caller with one request at a time, whose flow is empty after each, would get every turn.
        virtual_time = self._flows.pop(flow).virtual_time
        if not self._flows:
            self._ahead.clear()  # nobody was made to wait
        elif virtual_time > self._now:
            self._ahead[flow] = virtual_time

    def __iter__(self) -> Iterator[J]:
        """Jobs waiting, in no particular order."""
        return (job for flow in self._flows.values() for *_, job in flow.heap)
