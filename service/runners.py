"""How one batch gets through a session.

Each executor has a runner with an input buffer of its own, made at load; the session behind it may be shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from service import cuda
from service.artifact import INPUT_NAME, LOGITS_NAME, PROBABILITIES_NAME

# Names the captured CUDA graph that a run replays; ONNX Runtime's `gpu_graph_id`.
_GRAPH_ID = "gpu_graph_id"
_SHRINK_ARENA = "memory.enable_memory_arena_shrinkage"


class Outputs(NamedTuple):
    """Of N images: `logits` and `probabilities`, float32[N, K] each."""

    logits: NDArray[np.float32]
    probabilities: NDArray[np.float32]


class Runner(Protocol):
    """A place for a batch, and a way to run it."""

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """Where the batch goes: uint8[largest bucket, H, W, C]."""

    def run(self, bucket: int, *, last_of_warm_up: bool = False) -> Outputs:
        """Runs the first `bucket` images; the outputs, [bucket, K], are the caller's to keep."""

    def close(self) -> None:
        """Releases buffers and the hold on the session."""


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

    def run(self, bucket: int, *, last_of_warm_up: bool = False) -> Outputs:
        """See `Runner`."""
        del last_of_warm_up
        logits, probabilities = self._session.run([LOGITS_NAME, PROBABILITIES_NAME], {INPUT_NAME: self.pixels[:bucket]})
        return Outputs(logits, probabilities)

    def close(self) -> None:
        """See `Runner`."""
        self._session = None


class _Slot(NamedTuple):
    """What is bound for one bucket, at addresses that never change: a captured graph refers to them."""

    image: Any
    logits: Any
    probabilities: Any
    binding: Any
    options: Any


class CudaRunner:
    """For CUDA and TensorRT: pixels are page-locked on the host, and every bucket has its place on the GPU.

    With `graphs`, the kernels of a bucket are captured into a CUDA graph during warm-up (ONNX Runtime captures on the
    second run with an id) and replayed by a single launch afterwards.

    Args:
        session: of this runner alone if graphs are used.
        gpu: device number.
        buckets: batch sizes, ascending.
        shape: height, width, channels.
        classes: K.
        graphs: the session was made to capture graphs.
        memory: where the buffers are, as `onnxruntime.OrtValue` calls it.
    """

    def __init__(
        self,
        session: Any,
        gpu: int,
        buckets: Sequence[int],
        shape: Sequence[int],
        classes: int,
        *,
        graphs: bool,
        memory: str = "cuda",
    ) -> None:
        self._session, self._gpu, self._graphs, self._memory = session, gpu, graphs, memory
        self.pixels = np.zeros((buckets[-1], *shape), np.uint8)
        self._locked = cuda.page_lock(self.pixels)
        self._slots = {bucket: self._slot(bucket, tuple(shape), classes) for bucket in buckets}
        self._shrink = ort.RunOptions()
        self._shrink.add_run_config_entry(_SHRINK_ARENA, f"gpu:{gpu}")

    def run(self, bucket: int, *, last_of_warm_up: bool = False) -> Outputs:
        """See `Runner`. The last run of a warm-up gives back what the search for algorithms took from the arena."""
        slot = self._slots[bucket]
        slot.image.update_inplace(self.pixels[:bucket])
        # A captured graph holds addresses in the arena, so there it may not shrink.
        shrink = last_of_warm_up and not self._graphs
        self._session.run_with_iobinding(slot.binding, self._shrink if shrink else slot.options)
        # Copies from the GPU's memory.
        return Outputs(slot.logits.numpy(), slot.probabilities.numpy())

    def close(self) -> None:
        """See `Runner`."""
        self._slots.clear()
        self._session = None
        if self._locked:
            cuda.page_unlock(self.pixels)
            self._locked = False

    def _slot(self, bucket: int, shape: tuple[int, ...], classes: int) -> _Slot:
        def buffer(wanted: tuple[int, ...], kind: type[np.generic]) -> Any:
            return ort.OrtValue.ortvalue_from_shape_and_type(wanted, kind, self._memory, self._gpu)

        image = buffer((bucket, *shape), np.uint8)
        logits, probabilities = buffer((bucket, classes), np.float32), buffer((bucket, classes), np.float32)
        binding = self._session.io_binding()
        binding.bind_ortvalue_input(INPUT_NAME, image)
        binding.bind_ortvalue_output(LOGITS_NAME, logits)
        binding.bind_ortvalue_output(PROBABILITIES_NAME, probabilities)
        options = ort.RunOptions()
        if self._graphs:
            options.add_run_config_entry(_GRAPH_ID, str(bucket))
        return _Slot(image, logits, probabilities, binding, options)
