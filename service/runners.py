"""How one batch gets through a session: fixed buffers, bound once for each bucket, so that a run allocates nothing.

Each executor has a runner of its own; the session behind it may be shared.
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
        """Runs the first `bucket` images; the outputs, [bucket, K], are overwritten by the next run."""

    def close(self) -> None:
        """Releases buffers and the hold on the session."""


class HostRunner:
    """For providers that compute on the CPU: inputs and outputs are read and written in place.

    Args:
        session: may be shared with other runners.
        buckets: batch sizes, ascending.
        shape: height, width, channels.
        classes: K.
    """

    def __init__(self, session: Any, buckets: Sequence[int], shape: Sequence[int], classes: int) -> None:
        self._session = session
        self.pixels = np.zeros((buckets[-1], *shape), np.uint8)
        self._logits = np.zeros((buckets[-1], classes), np.float32)
        self._probabilities = np.zeros_like(self._logits)
        self._bindings = {bucket: self._bind(bucket) for bucket in buckets}

    def run(self, bucket: int, *, last_of_warm_up: bool = False) -> Outputs:
        """See `Runner`."""
        del last_of_warm_up
        self._session.run_with_iobinding(self._bindings[bucket])
        return Outputs(self._logits[:bucket], self._probabilities[:bucket])

    def close(self) -> None:
        """See `Runner`."""
        self._bindings.clear()
        self._session = None

    def _bind(self, bucket: int) -> Any:
        binding = self._session.io_binding()
        # A value made from an array on the CPU is a view of it, not a copy.
        binding.bind_ortvalue_input(INPUT_NAME, ort.OrtValue.ortvalue_from_numpy(self.pixels[:bucket]))
        binding.bind_ortvalue_output(LOGITS_NAME, ort.OrtValue.ortvalue_from_numpy(self._logits[:bucket]))
        binding.bind_ortvalue_output(PROBABILITIES_NAME, ort.OrtValue.ortvalue_from_numpy(self._probabilities[:bucket]))
        return binding


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
    """

    def __init__(
        self, session: Any, gpu: int, buckets: Sequence[int], shape: Sequence[int], classes: int, *, graphs: bool
    ) -> None:
        self._session, self._gpu, self._graphs = session, gpu, graphs
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
        return Outputs(slot.logits.numpy(), slot.probabilities.numpy())

    def close(self) -> None:
        """See `Runner`."""
        self._slots.clear()
        self._session = None
        if self._locked:
            cuda.page_unlock(self.pixels)
            self._locked = False

    def _slot(self, bucket: int, shape: tuple[int, ...], classes: int) -> _Slot:
        def on_gpu(wanted: tuple[int, ...], kind: type[np.generic]) -> Any:
            return ort.OrtValue.ortvalue_from_shape_and_type(wanted, kind, "cuda", self._gpu)

        image = on_gpu((bucket, *shape), np.uint8)
        logits, probabilities = on_gpu((bucket, classes), np.float32), on_gpu((bucket, classes), np.float32)
        binding = self._session.io_binding()
        binding.bind_ortvalue_input(INPUT_NAME, image)
        binding.bind_ortvalue_output(LOGITS_NAME, logits)
        binding.bind_ortvalue_output(PROBABILITIES_NAME, probabilities)
        options = ort.RunOptions()
        if self._graphs:
            options.add_run_config_entry(_GRAPH_ID, str(bucket))
        return _Slot(image, logits, probabilities, binding, options)
