"""What may enter: bounds on the images and bytes in the house, and on what could still be answered in time.

Everything that is refused is refused at once: a queue that cannot be served only makes all answers late. Used on the
event loop only, so it needs no lock. Knows no images, no gRPC and no ONNX.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Self

from service.errors import ConvoyError, DrainingError, ExpiredError, OverloadedError

# A full house empties within a few batches; sooner than that a retry only adds load.
_RETRY_AFTER_MS = 100

# A forecast is believed up to this part of the time that is left: being wrong costs a late answer.
_CONFIDENCE = 0.8

# Priorities below 0 are urgent. Their callers are few, and come again within so many seconds.
_URGENT, _URGENT_S = -1, 60.0
# Of so many calls that look too late as they begin one may bring its message all the same: it may be an urgent one.
_LET_ARRIVE = 16

# A pace is measured over at least so many seconds of uninterrupted backlog, and forgotten slowly.
_PACE_WINDOW_S = 0.05
_PACE_GAIN = 0.2
# A sample counts as at most so many times what was known: a stretch in which nearly everything failed, or in which the
# machine stood still, is no pace, and a real change is believed after a few samples all the same.
_PACE_OUTLIER = 4.0


class Pace:
    """Seconds for each image while there is a backlog: the reciprocal of the capacity, as it is right now.

    It is measured at the exit, so it contains whatever limits the pipeline: decoding, the device, other models beside
    it. Stretches in which the house ran empty are no measure of capacity and are left out.
    """

    def __init__(self) -> None:
        self.seconds_per_image: float | None = None
        self._since: float | None = None
        self._images = 0

    def left(self, images: int, still_pending: int, now: float) -> None:
        """So many images were answered and so many are still to be; those that failed count as neither.

        While nothing but failures leaves, the stretch goes on: it may be that the next answer takes that long.
        """
        if self._since is not None:
            self._images += images
            elapsed = now - self._since
            if elapsed >= _PACE_WINDOW_S and self._images:
                self._learn(elapsed / self._images)
                self._since, self._images = now, 0
        # The backlog is one only if more is waiting than was just answered: else the next exit waits for an arrival.
        if still_pending <= images:
            self._since, self._images = None, 0
        elif self._since is None:
            self._since = now

    def alone(self, images: int, seconds: float) -> None:
        """A request that found the house empty took so long: capacity is at least that.

        Without this a pace that a pause of the machine made too slow would refuse all company to the only request in
        the house, and then no backlog could ever correct it.
        """
        if self.seconds_per_image is not None:
            self.seconds_per_image = min(self.seconds_per_image, seconds / images)

    def _learn(self, sample: float) -> None:
        known = self.seconds_per_image
        if known is None:
            self.seconds_per_image = sample
        else:
            self.seconds_per_image = known + _PACE_GAIN * (min(sample, _PACE_OUTLIER * known) - known)


@dataclass(slots=True)
class _Flow:
    images: int = 0
    bytes: int = 0
    by_priority: dict[int, int] = field(default_factory=dict)  # images

    def ahead_of(self, priority: int) -> int:
        """Images that are as urgent, or more: the others are overtaken."""
        return sum(images for each, images in self.by_priority.items() if each <= priority)


class Entry(NamedTuple):
    """A place taken: beside what else its flow holds, whether that was nothing, and when (monotonic seconds)."""

    held: _Flow
    alone: bool
    since: float
    priority: int


class Admission:
    """Counts what was admitted and not yet answered.

    One model's flood cannot take the whole house: a flow (a model) may hold at most as much as is still free, which is
    the dynamic threshold of Choudhury and Hahne (1998) with factor 1. A single flow can fill half of the bounds, two
    can fill two thirds, and there is always room for another. What may wait for all others has factor 1/2: a night's
    batch job leaves room for the calls that overtake it.

    Args:
        max_images: bound on images.
        max_bytes: bound on bytes of encoded images.
        clock: monotonic seconds.
    """

    def __init__(self, max_images: int, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_images = max_images
        self.max_bytes = max_bytes
        self.images = 0
        self.bytes = 0
        self._clock = clock
        self._flows: dict[Hashable, _Flow] = {}
        self._paces: dict[Hashable, Pace] = {}
        self._draining = False
        self._urgent_until = -math.inf
        self._refused = 0

    def admit(self, flow: Hashable, images: int, nbytes: int, deadline: float, priority: int = 0) -> Place:
        """A place for one request, taken on entering and given back on leaving; how many were answered is set in it.

        Args:
            flow: what shares fairly; the model.
            images: of the request.
            nbytes: of its encoded images.
            deadline: monotonic seconds by which the answer is wanted.
            priority: smaller goes first; above 0, after all that is ordinary.

        Raises, on entering:
            DrainingError: the server is shutting down.
            ExpiredError: the deadline has passed already.
            OverloadedError: a bound would be exceeded, or the answer would come too late; nothing was admitted.
        """
        return Place(self, flow, images, nbytes, deadline, priority)

    def refusal(self, flows: Iterable[Hashable], deadline: float) -> ConvoyError | None:
        """Why not even one image could be admitted now, whatever its flow; None if it could, or if there is no flow.

        For requests that begin to arrive: they are judged then, although there may be room by the time they are here,
        and as ordinary ones, since their priority is in the message. But for a minute after a more urgent one was seen
        they are judged as such; and so that one is seen, now and then a request may arrive that looks too late.

        Args:
            flows: all there are.
            deadline: as for `admit`.
        """
        now = self._clock()
        urgent = now < self._urgent_until
        why: ConvoyError | None = None
        for flow in flows:
            try:
                self._check(flow, self._flows.get(flow) or _Flow(), 1, 1, deadline - now, _URGENT if urgent else 0)
            except ConvoyError as error:
                why = error.with_traceback(None)
            else:
                return None
        if not urgent and isinstance(why, OverloadedError) and why.reason == "deadline":
            self._refused += 1
            if self._refused % _LET_ARRIVE == 0:
                return None
        return why

    def enter(self, flow: Hashable, images: int, nbytes: int, deadline: float, priority: int) -> Entry:
        """Takes a place; raises as `admit` says."""
        held = self._flows.get(flow) or _Flow()
        now = self._clock()
        if priority < 0:
            self._urgent_until = now + _URGENT_S
        self._check(flow, held, images, nbytes, deadline - now, priority)
        alone = not held.images
        if alone:
            self._flows[flow] = held
        self._add(held, images, nbytes, priority)
        return Entry(held, alone, now, priority)

    def leave(self, flow: Hashable, images: int, nbytes: int, answered: int, entry: Entry) -> None:
        """Gives a place back, of whose images so many were answered."""
        held = entry.held
        self._add(held, -images, -nbytes, entry.priority)
        if not held.images:
            self._flows.pop(flow, None)
        pace = self._paces.get(flow)
        if pace is None:
            pace = self._paces[flow] = Pace()
        now = self._clock()
        pace.left(answered, held.images, now)
        if entry.alone and answered == images:
            pace.alone(answered, now - entry.since)

    def drain(self) -> None:
        """From now on refuses everything new."""
        self._draining = True

    def forecast_s(self, flow: Hashable, images: int, priority: int = 0) -> float:
        """Seconds until a request arriving now would be answered, as far as is known; 0 with no backlog ahead of it."""
        held, pace = self._flows.get(flow), self._paces.get(flow)
        ahead = held.ahead_of(priority) if held else 0
        if not ahead or pace is None or pace.seconds_per_image is None:
            return 0.0
        return (ahead + images) * pace.seconds_per_image

    def _check(self, flow: Hashable, held: _Flow, images: int, nbytes: int, left_s: float, priority: int) -> None:
        if self._draining:
            raise DrainingError
        if left_s <= 0:
            raise ExpiredError("the deadline passed before the work began")
        factor = 0.5 if priority > 0 else 1.0
        free = self.max_images - self.images
        if images > free or (held.images and held.images + images > factor * free):
            raise _full("images", images, held.images, self.images, self.max_images, factor)
        free = self.max_bytes - self.bytes
        if nbytes > free or (held.bytes and held.bytes + nbytes > factor * free):
            raise _full("bytes", nbytes, held.bytes, self.bytes, self.max_bytes, factor)
        needed_s = self.forecast_s(flow, images, priority)
        if needed_s > _CONFIDENCE * left_s:
            raise OverloadedError(
                f"the answer would take about {needed_s * 1000:.0f} ms, and the deadline is in {left_s * 1000:.0f} ms",
                "deadline",
                max(1, round((needed_s - _CONFIDENCE * left_s) * 1000)),
            )

    def _add(self, held: _Flow, images: int, nbytes: int, priority: int) -> None:
        held.by_priority[priority] = held.by_priority.get(priority, 0) + images
        held.images += images
        held.bytes += nbytes
        self.images += images
        self.bytes += nbytes


def _full(what: str, asked: int, held: int, pending: int, most: int, factor: float) -> OverloadedError:
    """A refusal that names the bound that was met: that of the house, or of one flow in it."""
    free = most - pending
    share = "" if factor == 1 else f"{factor:g} of "
    text = (
        f"{pending} {what} are pending, of at most {most}"
        if asked > free
        else f"{held} of this model's {what} are pending, and it may hold no more than {share}what is free, now {free}"
    )
    return OverloadedError(text, what, _RETRY_AFTER_MS)


class Place:
    """What `admit` gives; a generator would take as long as all the rest of admission.

    Attributes:
        answered: images that were answered, to be set before leaving. Those that could not be used take next to no time
            and are none: as a measure of the pace they would promise a hundred times what the model can do.
    """

    __slots__ = ("_admission", "_entry", "_request", "answered")

    def __init__(
        self, admission: Admission, flow: Hashable, images: int, nbytes: int, deadline: float, priority: int
    ) -> None:
        self._admission = admission
        self._request = flow, images, nbytes, deadline, priority
        self.answered = 0

    def __enter__(self) -> Self:
        self._entry = self._admission.enter(*self._request)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        flow, images, nbytes, *_ = self._request
        self._admission.leave(flow, images, nbytes, self.answered, self._entry)
