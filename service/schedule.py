"""Which work runs next: earliest deadline first within a priority, fair between flows.

A pure data structure without threads, clocks or futures of its own, so that every decision can be tested and replayed.
Work is counted in images. A `Job` larger than a batch is taken in parts.

Fairness is start-time fair queueing over flows (Goyal, Vin, Cheng 1996): each flow has a virtual time that advances by
the images it was given; the flow with the smallest one goes next; a flow that wakes up starts at the present, or where
it left off if that is later, so that neither idling nor coming back earns credit. Deadlines decide within a flow, never
between flows. Work of a priority behind the ordinary one is in flows of its own, which wait for all others: background
work of one model is not to take turns from another model's callers.
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


# Entries of jobs that were discarded are cleared away when they are at least so many, and most of all.
_MANY_DISCARDED = 32

_Entry = tuple[int, float, int]  # priority, deadline, and the job's number


@dataclass(slots=True)
class _Flow:
    heap: list[_Entry] = field(default_factory=list)
    virtual_time: float = 0.0


class _Flows:
    """Flows that take turns with each other, and the virtual time that they share."""

    def __init__(self) -> None:
        self._flows: dict[Hashable, _Flow] = {}
        self._ahead: dict[Hashable, float] = {}  # virtual time of flows that are empty but ahead of the present
        self._now = 0.0  # virtual time of the flow served last

    def push(self, flow: Hashable, entry: _Entry) -> None:
        lane = self._flows.get(flow)
        if lane is None:
            lane = self._flows[flow] = _Flow(virtual_time=max(self._now, self._ahead.pop(flow, 0.0)))
        heapq.heappush(lane.heap, entry)

    def head(self) -> tuple[Hashable, _Entry] | None:
        """The flow whose turn it is, and its first entry."""
        if not self._flows:
            return None
        flow, lane = min(self._flows.items(), key=lambda item: item[1].virtual_time)
        return flow, lane.heap[0]

    def serve(self, flow: Hashable, images: int) -> None:
        """So many images were taken of the flow's first job."""
        lane = self._flows[flow]
        self._now = lane.virtual_time
        lane.virtual_time += images

    def pop(self, flow: Hashable) -> None:
        """The flow's first entry is done with."""
        heapq.heappop(self._flows[flow].heap)
        self._forget_if_empty(flow)

    def keep(self, wanted: Callable[[_Entry], bool]) -> None:
        """Clears all other entries away."""
        for flow, lane in list(self._flows.items()):
            lane.heap = [entry for entry in lane.heap if wanted(entry)]
            heapq.heapify(lane.heap)
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


class FairQueue(Generic[J]):
    """Jobs by flow, priority and deadline."""

    def __init__(self) -> None:
        self._clear()
        self._order = itertools.count()

    def _clear(self) -> None:
        self._jobs: dict[int, J] = {}  # by number; what a job holds in memory hangs on this alone
        self._taken: dict[int, int] = {}  # images already taken of the job with this number
        self._ordinary, self._background = _Flows(), _Flows()
        self._discarded = 0  # entries in the flows whose job is gone
        self.images = 0

    def __len__(self) -> int:
        """Jobs waiting."""
        return len(self._jobs)

    def push(self, job: J, flow: Hashable = None) -> int:
        """Adds a job to a flow; gives the number that `discard` wants."""
        number = next(self._order)
        self._jobs[number] = job
        flows = self._background if job.priority > 0 else self._ordinary
        flows.push(flow, (job.priority, job.deadline, number))
        self.images += job.size
        return number

    def discard(self, number: int) -> bool:
        """Takes out a job that nobody waits for any more, and gives back what it holds; False if it has begun."""
        if number in self._taken or number not in self._jobs:
            return False
        self.images -= self._jobs.pop(number).size
        self._discarded += 1
        if self._discarded >= max(_MANY_DISCARDED, len(self._jobs)):
            for flows in (self._ordinary, self._background):
                flows.keep(lambda entry: entry[2] in self._jobs)
            self._discarded = 0
        return True

    def take(self, max_images: int, horizon: float, sheds: Callable[[J], bool] | None = None) -> Taken[J]:
        """Takes up to `max_images` images, splitting the last job if it does not fit.

        Args:
            max_images: most images, at least 1.
            horizon: monotonic seconds at which the work would be done; a job with an earlier deadline has expired.
            sheds: asked once for each whole job about to be taken; True takes it out unserved.
        """
        taken: Taken[J] = Taken()
        room = max_images
        for flows in (self._ordinary, self._background):
            while room and (entry := self._next(flows, taken, horizon, sheds)):
                flow, number, job = entry
                start = self._taken.get(number, 0)
                stop = min(job.size, start + room)
                taken.parts.append(Part(job, start, stop))
                self._advance(flows, flow, number, stop)
                self.images -= stop - start
                room -= stop - start
        return taken

    def drain(self) -> list[J]:
        """Removes and returns all jobs, in no particular order."""
        jobs = list(self._jobs.values())
        self._clear()
        return jobs

    def _next(
        self, flows: _Flows, taken: Taken[J], horizon: float, sheds: Callable[[J], bool] | None
    ) -> tuple[Hashable, int, J] | None:
        """The head of the flow whose turn it is; takes out the abandoned, the expired and the shed it meets."""
        while (head := flows.head()) is not None:
            flow, (_, deadline, number) = head
            job = self._jobs.get(number)
            if job is None:
                self._discarded -= 1
                flows.pop(flow)
                continue
            if job.abandoned:
                taken.abandoned.append(job)
            elif deadline < horizon:
                taken.expired.append(job)
            elif sheds is not None and number not in self._taken and sheds(job):
                taken.shed.append(job)
            else:
                return flow, number, job
            del self._jobs[number]
            self.images -= job.size - self._taken.pop(number, 0)
            flows.pop(flow)
        return None

    def _advance(self, flows: _Flows, flow: Hashable, number: int, stop: int) -> None:
        """Images of the flow's first job up to `stop` were taken."""
        flows.serve(flow, stop - self._taken.get(number, 0))
        if stop < self._jobs[number].size:
            self._taken[number] = stop
            return
        del self._jobs[number]
        self._taken.pop(number, None)
        flows.pop(flow)

    def __iter__(self) -> Iterator[J]:
        """Jobs waiting, in no particular order."""
        return iter(self._jobs.values())
