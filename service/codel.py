"""CoDel (RFC 8289) at dequeue: tells a standing queue from a burst, and shortens it.

A burst drains within an interval; a queue whose *smallest* waiting time stays above the target for a whole interval
is standing, and serves nobody: then jobs are shed, ever faster until the delay is back at the target.
"""

from __future__ import annotations

import math

_RECENT_INTERVALS = 16  # RFC 8289, 5.5


class CoDel:
    """The control law. Not thread-safe; times are monotonic seconds.

    Args:
        target_s: waiting time that is acceptable as a standing one.
        interval_s: how long it may be exceeded; at least the time a burst takes to drain.
    """

    def __init__(self, target_s: float, interval_s: float) -> None:
        self.target_s = target_s
        self.interval_s = interval_s
        self._first_above: float | None = None  # when the target will have been exceeded for an interval
        self._dropping = False
        self._drop_next = 0.0
        self._count = 0
        self._last_count = 0  # where the last time of shedding began

    def sheds(self, waited_s: float, now: float) -> bool:
        """Whether the job at the head of the queue, which has waited so long, is to be shed."""
        standing = self._standing(waited_s, now)
        if not standing:
            self._dropping = False
            return False
        if not self._dropping:
            self._dropping = True
            # Coming back to a recent overload, go on near the rate that controlled it.
            shed = self._count - self._last_count
            recent = now - self._drop_next < _RECENT_INTERVALS * self.interval_s
            self._count = self._last_count = shed if shed > 1 and recent else 1
            self._drop_next = now + self.interval_s / math.sqrt(self._count)
            return True
        if now < self._drop_next:
            return False
        self._count += 1
        self._drop_next += self.interval_s / math.sqrt(self._count)
        return True

    def emptied(self) -> None:
        """The queue has nothing left: it is none that stands."""
        self._first_above = None
        self._dropping = False

    def _standing(self, waited_s: float, now: float) -> bool:
        if waited_s < self.target_s:
            self._first_above = None
            return False
        if self._first_above is None:
            self._first_above = now + self.interval_s
            return False
        return now >= self._first_above
