"""SIGTERM and Ctrl-C during training: finish the step, write a checkpoint, leave.

A second signal of the same kind is not held back.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """Remembers which signal came. `signal`: its number, or None."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def note(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        del frame
        self.signal = number
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)

    @property
    def requested(self) -> bool:
        """Whether to stop after this step."""
        return self.signal is not None


class InterruptedRunError(Exception):
    """Training stopped after a signal, and its checkpoint is written.

    `signal`: its number; None if it came to another process of the run. `folder`: of the run.
    """

    def __init__(self, number: int | None, folder: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name if number else 'another process'}")
        self.signal = number
        self.folder = folder


@contextmanager
def held_back() -> Iterator[Interruption]:
    """Within this block the first SIGTERM or SIGINT only raises a flag. Only in the main thread."""
    interruption = Interruption()
    before = {number: signal.signal(number, interruption.note) for number in _SIGNALS}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
