"""SIGTERM and Ctrl-C during a run: in the loop finish the step and write a checkpoint, elsewhere clean up; then leave.

A second signal of the same kind is not held back.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
    """A run stopped after a signal.

    `signal`: its number; None if it came to another process of the run. `folder`: of the run, if it has a checkpoint to
    go on from.
    """

    def __init__(self, number: int | None, folder: Path | None) -> None:
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


class TerminatedError(KeyboardInterrupt):
    """SIGTERM, where Ctrl-C would raise KeyboardInterrupt: nothing that handles errors stops it on its way."""


@dataclass
class Stoppable:
    """A run that may be stopped anywhere. `folder`: of the run, once it is known."""

    folder: Path | None = None


@contextmanager
def stoppable(checkpoint: str) -> Iterator[Stoppable]:
    """Within this block SIGTERM and Ctrl-C end in `InterruptedRunError`, after unfinished files have been removed.

    Without a handler SIGTERM would end the process at once, or, where it is process 1 of a container, do nothing. Of
    several processes each keeps the default: `torchrun` stops them so when one is lost, and the others may wait for it
    in code where Python's handlers are not run. Only in the main thread.

    Args:
        checkpoint: name of the file in the run's folder from which it can be continued.
    """
    run = Stoppable()
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    before = signal.signal(signal.SIGTERM, _raise) if alone else signal.getsignal(signal.SIGTERM)
    try:
        yield run
    except KeyboardInterrupt as stop:
        number = signal.SIGTERM if isinstance(stop, TerminatedError) else signal.SIGINT
        begun = run.folder is not None and (run.folder / checkpoint).is_file()
        raise InterruptedRunError(number, run.folder if begun else None) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _raise(number: int, frame: FrameType | None) -> None:
    del frame
    signal.signal(number, signal.SIG_DFL)
    raise TerminatedError
