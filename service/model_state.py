"""What the repository knows of one model: which versions are in service, which of them answers, which failed and why.

Nothing here waits or loads. It belongs to the event loop, as the repository does.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from service.errors import PASSING, ConvoyError, NotFoundError
from service.loading import Load
from service.routing import Routing
from service.serving import ServedModel
from service.sources import Fingerprint

# After a failure that may pass, a version is tried again after so many seconds, then after twice as many, and so on.
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 300.0


class _Again(NamedTuple):
    """When a version is to be tried again (monotonic seconds), and how long that pause was."""

    at: float
    pause_s: float


@dataclass
class ModelState:
    """One model of the repository.

    `routing`: who answers. `served`: versions in service. `seen`: what each version's files were at its last load, good
    or bad. `failed`: why versions could not be loaded. `by_hand`: versions that an operator loaded (True) or unloaded.
    `loading`: the load under way. `unloaded`: all of it, by an operator. `settled`: all that its routing needs has been
    loaded, or has failed to. `present`: its versions in the source, as of the last look. `changing`: held by whoever
    changes what is in service.
    """

    routing: Routing
    served: dict[int, ServedModel] = field(default_factory=dict)
    seen: dict[int, Fingerprint] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    by_hand: dict[int, bool] = field(default_factory=dict)
    loading: Load | None = None
    unloaded: bool = False
    settled: bool = False
    present: list[int] = field(default_factory=list)
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)
    _again: dict[int, _Again] = field(default_factory=dict)  # of those that failed for a reason that may pass
    _gone: set[int] = field(default_factory=set)
    _loads: int = 0  # under way, or waiting for their turn

    # --- who answers

    @property
    def ready(self) -> bool:
        """Requests can be answered."""
        return bool(self.served) and self.settled

    @property
    def coming(self) -> bool:
        """It is no answer yet that there is none."""
        return bool(self.served) or self._loads > 0

    @property
    def queued_images(self) -> int:
        """Images that wait, over all versions in service."""
        return sum(served.batcher.queued_images for served in list(self.served.values()))

    def answering(self) -> ServedModel:
        """The version that answers a request: drawn by the weights of the split.

        Raises:
            NotFoundError: no version in service answers.
        """
        weights = self._weights()
        if not weights:
            raise NotFoundError("no version of the model answers: its shadow is all that is in service")
        if len(weights) == 1:
            return self.served[next(iter(weights))]
        return self.served[random.choices(list(weights), list(weights.values()))[0]]

    def default(self) -> ServedModel | None:
        """The version that gets most of the traffic: the heaviest of the split, else the latest; None if none does."""
        weights = self._weights()
        return self.served[max(weights, key=lambda number: (weights[number], number))] if weights else None

    def shadow(self, answering: ServedModel) -> ServedModel | None:
        """The version that gets a copy of a request, if there is one beside the one that answers."""
        found = None if self.routing.shadow is None else self.served.get(self.routing.shadow)
        return None if found is answering else found

    def _weights(self) -> dict[int, float]:
        """The split over versions that are in service; without one, the latest that is no shadow. Empty: none."""
        split = {number: weight for number, weight in self.routing.traffic.items() if number in self.served}
        if split:
            return split
        beside = [number for number in self.served if number != self.routing.shadow]
        return {max(beside): 1.0} if beside else {}

    # --- what has to come, and what may go

    def needed(self, present: list[int]) -> list[int]:
        """Versions that have to be in service: the routing's, changed by what was done by hand."""
        by_hand = dict(self.by_hand)  # metrics are read in a thread of their own
        wanted = {number for number in present if by_hand.get(number, False)}
        refused = {number for number, loaded in by_hand.items() if not loaded}
        return sorted({*self.routing.needed(present), *wanted} - refused)

    def superseded(self, present: list[int]) -> list[int]:
        """Versions in service that are not needed any more, once all that is to answer in their place is served.

        Neither the shadow nor what was loaded by hand is such. What is gone from the source goes as soon as one that
        is to answer is there: somebody took it away, and another that does not load must not keep it.
        """
        needed = self.needed(present)
        successors = set(self.routing.answering(present)).intersection(needed)
        if successors.isdisjoint(self.served):
            return []
        complete = successors <= self.served.keys()
        return [n for n in self.served if n not in needed and (complete or n not in present)]

    @property
    def lacking(self) -> list[int]:
        """Versions that should be in service as they are in the source, and failed to load."""
        return [] if self.unloaded else [number for number in self.needed(self.present) if number in self.failed]

    @property
    def unloaded_versions(self) -> list[int]:
        """Those that an operator took out of service, as far as they are in the source."""
        return [number for number in self.present if not self.by_hand.get(number, True)]

    def newly_gone(self) -> set[int]:
        """Versions in service that are no longer in the source, and were when this was asked the last time."""
        gone = {number for number in self.served if number not in self.present}
        newly, self._gone = gone - self._gone, gone
        return newly

    # --- loads

    @contextmanager
    def awaiting(self) -> Iterator[None]:
        """While it lasts, a model without a version in service is not ready, rather than unknown."""
        self._loads += 1
        try:
            yield
        finally:
            self._loads -= 1

    def note_success(self, number: int) -> None:
        """A version has been loaded: what failed before counts no more."""
        self._again.pop(number, None)

    def note_failure(self, number: int, failure: ConvoyError, now_s: float) -> None:
        """Keeps it; of a reason that may pass also when to try again, after ever longer pauses."""
        self.failed[number] = str(failure)
        last = self._again.pop(number, None)
        if isinstance(failure, PASSING):
            pause_s = min(2 * last.pause_s, _LONGEST_PAUSE_S) if last else _FIRST_PAUSE_S
            self._again[number] = _Again(now_s + pause_s, pause_s)

    def may_try_again(self, number: int, now_s: float) -> bool:
        """Whether a version that failed for a passing reason has waited long enough."""
        again = self._again.get(number)
        return again is not None and now_s >= again.at

    def forget_failures(self, present: Collection[int]) -> None:
        """Versions that failed to load and are gone from the source are no failures any more."""
        for number in set(self.failed).difference(present):
            del self.failed[number]
            self._again.pop(number, None)
            if number not in self.served:
                self.seen.pop(number, None)
