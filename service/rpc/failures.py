"""The log of calls that failed: one line for each, until there are so many that their lines are a load of their own."""

from __future__ import annotations

import asyncio
import contextvars
from collections import Counter

from service import logs
from service.errors import ConvoyError

# Lines for each status, and for each kind of cause, in a second. In an overload hundreds of calls are refused, and a
# line costs as much as deciding.
LINES_PER_SECOND = 10
_SECOND = 1.0

_log = logs.get("rpc")


class FailureLog:
    """Writes "rpc failed" for each call, and for those beyond the bound "more rpcs failed" with their number.

    "internal error" and "more internal errors" tell the causes of those that are the server's fault.
    """

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()  # of this second, by status
        self._causes: Counter[str] = Counter()  # of this second, by type
        self._timer: asyncio.TimerHandle | None = None

    def failed(self, code: str, duration_ms: float) -> None:
        """A call ended with a status other than OK. Call it on the event loop."""
        self._begin_second()
        self._seen[code] += 1
        if self._seen[code] <= LINES_PER_SECOND:
            _log.info("rpc failed", code=code, duration_ms=duration_ms)

    def caused(self, error: Exception) -> None:
        """A call ended through a fault of the server. Call it on the event loop, while the exception is handled."""
        self._begin_second()
        name = type(error).__name__
        self._causes[name] += 1
        if self._causes[name] <= LINES_PER_SECOND:
            unexpected = not isinstance(error, ConvoyError)
            _log.error("internal error", error=f"{name}: {error}", exc_info=unexpected)

    def close(self) -> None:
        """Tells what was not told yet."""
        if self._timer is not None:
            self._timer.cancel()
            self._sum_up()

    def _begin_second(self) -> None:
        if self._timer is None:
            # Without the context of this call: its id is not that of the others.
            nobody = contextvars.Context()
            self._timer = asyncio.get_running_loop().call_later(_SECOND, self._sum_up, context=nobody)

    def _sum_up(self) -> None:
        self._timer = None
        for code, count in self._seen.items():
            if count > LINES_PER_SECOND:
                _log.info("more rpcs failed", code=code, count=count - LINES_PER_SECOND, seconds=_SECOND)
        for name, count in self._causes.items():
            if count > LINES_PER_SECOND:
                _log.error("more internal errors", error=name, count=count - LINES_PER_SECOND, seconds=_SECOND)
        self._seen.clear()
        self._causes.clear()
