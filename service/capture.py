"""When CUDA graphs are captured, and when everything else may talk to the GPUs.

ONNX Runtime captures in CUDA's global mode (`cuda_graph.cc`). While one thread does so, the calls by which any other
thread of the process copies, allocates or waits fail, and break the capture (CUDA runtime API, stream capture modes):
with a model in service beside the one that is being loaded, or several GPUs, both happen at once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """Lets in many at a time, or one alone, who does not wait for those that come after it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._alone = False
        self._waiting = 0  # for being alone

    @contextmanager
    def together(self) -> Iterator[None]:
        """With others."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone and not self._waiting)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                if not self._inside:
                    self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Without any others; not to be asked for from within `together`."""
        with self._changed:
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: not self._alone and not self._inside)
            finally:
                self._waiting -= 1
            self._alone = True
        try:
            yield
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()


GPUS = Gate()
