"""How one batch gets through a session.

Each executor has a runner with an input buffer of its own, made at load; the session behind it may be shared.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from service import capture, cuda, logs
from service.artifact import INPUT_NAME, LOGITS_NAME, PROBABILITIES_NAME

_log = logs.get("engine")

# Names the CUDA graph that a run captures or replays; without it there is one for each session and thread.
_GRAPH_ID = "gpu_graph_id"
_NO_GRAPH = "-1"
_SHRINK_ARENA = "memory.enable_memory_arena_shrinkage"
_ARENAS = {"cuda": "gpu"}  # what this option calls the memories of `OrtValue`


class Outputs(NamedTuple):
    """Of N images: `logits` and `probabilities`, float32[N, K] each."""

    logits: NDArray[np.float32]
    probabilities: NDArray[np.float32]


class Runner(Protocol):
    """A place for a batch, and a way to run it."""

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """Where the batch goes: uint8[largest bucket, H, W, C]."""

    def run(self, bucket: int) -> Outputs:
        """Runs the first `bucket` images; the outputs, [bucket, K], are the caller's to keep."""

    def close(self) -> None:
        """Releases buffers and the hold on the session."""


def _on_arrays(session: Any, pixels: NDArray[np.uint8]) -> Outputs:
    return Outputs(*session.run([LOGITS_NAME, PROBABILITIES_NAME], {INPUT_NAME: pixels}))


class HostRunner:
    """For providers that compute on the CPU.

    A plain run, not a binding: it costs the same (46 µs for LeNet either way), and the OpenVINO plugin copies a bound
    input when it is bound, so that every later run would see the first batch.

    Args:
        session: may be shared with other runners.
        largest: batch size.
        shape: height, width, channels.
    """

    def __init__(self, session: Any, largest: int, shape: Sequence[int]) -> None:
        self._session = session
        self.pixels = np.zeros((largest, *shape), np.uint8)

    def run(self, bucket: int) -> Outputs:
        """See `Runner`."""
        return _on_arrays(self._session, self.pixels[:bucket])

    def close(self) -> None:
        """See `Runner`."""
        self._session = None


class _GpuRunner(ABC):
    """Runs all batches on a thread of its own, whoever asks; `_compute` is what it runs there.

    Args:
        sessions: by batch size; several sizes may have the same one if no graphs are used.
        gpu: device number.
    """

    def __init__(self, sessions: dict[int, Any], gpu: int) -> None:
        self._sessions, self._gpu = sessions, gpu
        self._home = ThreadPoolExecutor(1, f"gpu-{gpu}", initializer=cuda.select, initargs=(gpu,))

    def run(self, bucket: int) -> Outputs:
        """See `Runner`."""
        return self._home.submit(self._compute, bucket).result()

    def close(self) -> None:
        """See `Runner`."""
        self._home.shutdown(wait=False)
        with capture.GPUS.together():  # what goes gives memory back
            self._let_go()

    @abstractmethod
    def _compute(self, bucket: int) -> Outputs: ...

    def _let_go(self) -> None:
        self._sessions.clear()


class MixedRunner(_GpuRunner):
    """For sessions on a GPU of which some nodes run on the CPU: arrays go in and come out.

    ONNX Runtime 1.31 ends the process (SIGSEGV) if outputs of such a session are bound to the GPU's memory.

    Args:
        sessions: by batch size.
        gpu: device number.
        shape: height, width, channels.
    """

    def __init__(self, sessions: dict[int, Any], gpu: int, shape: Sequence[int]) -> None:
        super().__init__(sessions, gpu)
        self.pixels = np.zeros((max(sessions), *shape), np.uint8)

    def _compute(self, bucket: int) -> Outputs:
        with capture.GPUS.together():
            return _on_arrays(self._sessions[bucket], self.pixels[:bucket])


class _Slot(NamedTuple):
    """What is bound for one bucket, at addresses that never change: a captured graph refers to them."""

    image: Any
    logits: Any
    probabilities: Any
    binding: Any


class CudaRunner(_GpuRunner):
    """For CUDA and TensorRT: pixels are page-locked on the host, and every bucket has its place on the GPU.

    All batches run on a thread that the runner keeps, whoever asks. With graphs, the kernels of a bucket are captured
    into a CUDA graph when it first runs, in the warm-up, and replayed by a single launch afterwards: ONNX Runtime keeps
    them for the thread that they were captured on, and would capture again, while a request waits, on each other one
    (`GetPerThreadContext` in `cuda_execution_provider.cc`). And TensorRT's provider does not select its GPU when it
    runs.

    Args:
        sessions: by batch size; several sizes may have the same one if no graphs are used.
        gpu: device number.
        shape: height, width, channels.
        classes: K.
        plain: opens a session without graphs, for a batch size whose kernels turn out not to be capturable; None if no
            session captures.
        memory: where the buffers are, as `onnxruntime.OrtValue` calls it.
    """

    def __init__(
        self,
        sessions: dict[int, Any],
        gpu: int,
        shape: Sequence[int],
        classes: int,
        *,
        plain: Callable[[], Any] | None = None,
        memory: str = "cuda",
    ) -> None:
        super().__init__(sessions, gpu)
        self._memory = memory
        self._shape, self._classes, self._plain = tuple(shape), classes, plain
        self._uncaptured, self._first = ort.RunOptions(), ort.RunOptions()
        self._ordinary = ort.RunOptions()
        # What the first run took goes back: from the second on ONNX Runtime takes one piece, as large as is needed.
        self._first.add_run_config_entry(_SHRINK_ARENA, f"{_ARENAS.get(memory, memory)}:{gpu}")
        for options in (self._uncaptured, self._first):
            options.add_run_config_entry(_GRAPH_ID, _NO_GRAPH)
        self._begun: set[int] = set()
        self._slots: dict[int, _Slot] = {}
        self.pixels = cuda.pages((max(sessions), *shape))
        self._locked = cuda.page_lock(self.pixels)
        try:
            self._slots.update({bucket: self._slot(bucket) for bucket in sessions})
        except BaseException:
            self.close()
            raise

    def _let_go(self) -> None:
        self._slots.clear()
        super()._let_go()
        if self._locked:
            cuda.page_unlock(self.pixels)
            self._locked = False

    def _compute(self, bucket: int) -> Outputs:
        if bucket in self._begun:
            with capture.GPUS.together():
                return self._once(bucket, self._ordinary)
        # It compiles, which takes seconds, and that is no part of the graph: others need not wait for it.
        with capture.GPUS.together():
            outputs = self._once(bucket, self._first)
        if self._plain is not None:
            outputs = self._capture(bucket, self._plain)
        self._begun.add(bucket)
        return outputs

    def _capture(self, bucket: int, plain: Callable[[], Any]) -> Outputs:
        with capture.GPUS.alone():
            try:
                return self._once(bucket, self._ordinary)
            except Exception as error:  # noqa: BLE001  # whatever it was, it happened in a capture, which it ended
                _log.warning("no CUDA graphs for this model", gpu=self._gpu, batch=bucket, reason=str(error))
            # Until it is gone its stream captures, and nobody may talk to a GPU.
            del self._slots[bucket], self._sessions[bucket]
        self._plain, self._ordinary = None, self._uncaptured
        with capture.GPUS.together():
            self._sessions[bucket] = plain()
            self._slots[bucket] = self._slot(bucket)
            return self._once(bucket, self._first)

    def _once(self, bucket: int, options: Any) -> Outputs:
        slot = self._slots[bucket]
        slot.image.update_inplace(self.pixels[:bucket])
        self._sessions[bucket].run_with_iobinding(slot.binding, options)
        # Copies from the GPU's memory.
        return Outputs(slot.logits.numpy(), slot.probabilities.numpy())

    def _slot(self, bucket: int) -> _Slot:
        def buffer(wanted: tuple[int, ...], kind: type[np.generic]) -> Any:
            return ort.OrtValue.ortvalue_from_shape_and_type(wanted, kind, self._memory, self._gpu)

        image = buffer((bucket, *self._shape), np.uint8)
        logits, probabilities = (buffer((bucket, self._classes), np.float32) for _ in range(2))
        binding = self._sessions[bucket].io_binding()
        binding.bind_ortvalue_input(INPUT_NAME, image)
        binding.bind_ortvalue_output(LOGITS_NAME, logits)
        binding.bind_ortvalue_output(PROBABILITIES_NAME, probabilities)
        return _Slot(image, logits, probabilities, binding)
