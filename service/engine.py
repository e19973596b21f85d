"""Runs a model version on ONNX Runtime: `uint8[N, H, W, C]` in, `float32[N, K]` out.

Everything above knows the port `Engine`, and is tested with a toy one. onnxruntime is imported by this module's parts
alone: `service.sessions` loads, `service.runners` runs, `service.openvino` registers the plugin.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from service import artifact, faults, sessions, threads
from service.artifact import ModelVersion
from service.errors import DeviceLostError, EngineError, OutOfMemoryError
from service.providers import CPU, GPU_PROVIDERS, OPENVINO, Plan
from service.runners import CudaRunner, HostRunner, MixedRunner, Outputs, Runner
from service.sessions import Loaded

__all__ = ["Engine", "OrtEngine", "Outputs", "build", "executors", "side_by_side", "warm_up"]

# Set when nothing more can run on a GPU in this process.
GPU_LOST = threading.Event()
_kept: list[Runner] = []

# A batch that is this quick is measured twice, and the better time counts.
_QUICK_S = 0.02
# Runs of a size that are slower than those after them, if not one: on a GPU the first compiles and captures, and the
# second allocates as the first showed to be best, the CPU provider compiles nothing.
_COLD_RUNS = {CPU: 0} | dict.fromkeys(GPU_PROVIDERS, 2)


class Engine(Protocol):
    """What the layers above need of a runtime: one executor, used by one thread at a time."""

    @property
    def provider(self) -> str:
        """The execution provider that really runs the model."""

    @property
    def variant(self) -> str:
        """File name of the variant that runs."""

    @property
    def precision(self) -> str:
        """What it is told to compute in, as `Plan.precision`; empty leaves that to the file."""

    @property
    def buckets(self) -> Sequence[int]:
        """Batch sizes that are warmed up, ascending; the last is the largest allowed."""

    @property
    def measured_s(self) -> Mapping[int, float]:
        """Seconds of each bucket, as measured by the warm-up."""

    def infer(self, chunks: Sequence[NDArray[np.uint8]]) -> Outputs:
        """Runs one batch made of chunks of uint8[n, H, W, C], in order."""

    def close(self) -> None:
        """Releases the runtime's memory."""


class OrtEngine:
    """One executor.

    Not thread-safe: one owner thread calls `infer`.

    Args:
        runner: where batches run.
        plan: provider, threads and precision.
        variant: file name of the variant that runs.
        buckets: batch sizes of the runner, ascending.

    Attributes:
        provider: the execution provider.
        precision: what it is told to compute in.
        plan: as given.
        variant: as given.
        buckets: as given.
        measured_s: seconds of each bucket, after `warm_up`; some are interpolated.
    """

    def __init__(self, runner: Runner, plan: Plan, variant: str, buckets: Sequence[int]) -> None:
        self.provider = plan.provider
        self.precision = plan.precision
        self.plan = plan
        self.variant = variant
        self.buckets = tuple(buckets)
        self.measured_s: dict[int, float] = {}
        self._runner = runner
        self._lost = ""

    def infer(self, chunks: Sequence[NDArray[np.uint8]]) -> Outputs:
        """Runs one batch, padded with the buffer's old content to the next bucket.

        When the device's memory is exhausted the batch is run once more in two halves.

        Raises:
            OutOfMemoryError: the halves did not fit either.
            DeviceLostError: nothing more can run in this process; every later call fails the same way.
            EngineError: the runtime failed in another way.
        """
        count = 0
        for chunk in chunks:
            self._runner.pixels[count : count + len(chunk)] = chunk
            count += len(chunk)
        try:
            return self._run(count)
        except OutOfMemoryError:
            if count == 1:
                raise
            return self._run_halves(count)

    def warm_up(self) -> None:
        """Runs every bucket until nothing about it is new, and measures it, so that no request pays for a first time.

        The largest goes first: the arena then grows once. The CPU provider compiles nothing and its time grows evenly
        with the images: there the time of the largest, and of buckets between two powers of two, is worked out.
        """
        sizes, largest = list(self.buckets), self.buckets[-1]
        if self.provider == CPU:
            self._run(largest)  # all that is ever new to it is memory, and the largest takes it
            sizes = [bucket for bucket in sizes[:-1] if _power_of_two(bucket)] or sizes
        times_s = {}
        for bucket in reversed(sizes):
            for _ in range(_COLD_RUNS.get(self.provider, 1)):
                self._run(bucket)
            took_s = self._timed(bucket)
            times_s[bucket] = took_s if took_s > _QUICK_S else min(took_s, self._timed(bucket))
        times_s[largest] = times_s[sizes[-1]] * largest / sizes[-1]
        seen = sorted(times_s)
        between = np.interp(self.buckets, seen, [times_s[bucket] for bucket in seen])
        self.measured_s = dict(zip(self.buckets, between.tolist(), strict=True))

    def run_smallest(self) -> None:
        """Runs the smallest bucket, whatever is in the buffer.

        Raises:
            EngineError: as for `infer`.
        """
        self._run(self.buckets[0])

    def close(self) -> None:
        """Drops the buffers and the session; its memory is freed with the last executor that shares it.

        After a GPU was lost nothing is: what it held cannot be given back, and ONNX Runtime ends a process that tries
        (`CudaGraphSet` throws in its destructor).
        """
        if self.provider in GPU_PROVIDERS and GPU_LOST.is_set():
            _kept.append(self._runner)
        else:
            self._runner.close()

    def _timed(self, bucket: int) -> float:
        """Seconds of a batch on a machine that has nothing else to do: what it cost, where the caller's thread paid.

        An estimate that a busy moment made too long would have requests refused that could be answered.
        """
        clock = time.thread_time if self.plan.computes_in_caller else time.perf_counter
        began = clock()
        self._run(bucket)
        return clock() - began

    def _run(self, count: int) -> Outputs:
        """The first `count` images of the buffer."""
        if self._lost:
            raise DeviceLostError(self._lost)
        bucket = next(size for size in self.buckets if size >= count)
        try:
            logits, probabilities = self._runner.run(bucket)
        except Exception as error:  # ONNX Runtime's exceptions have no common base below Exception
            meant = faults.translate(error)
            if isinstance(meant, DeviceLostError):
                self._lost = str(meant)
                GPU_LOST.set()
            raise meant from error
        if not len(logits) == len(probabilities) == bucket:
            raise EngineError(f"the graph gives {len(logits)} and {len(probabilities)} rows for {bucket} images")
        return Outputs(logits[:count], probabilities[:count])

    def _run_halves(self, count: int) -> Outputs:
        half = (count + 1) // 2
        first = self._run(half)
        self._runner.pixels[: count - half] = self._runner.pixels[half:count]
        second = self._run(count - half)
        return Outputs(
            np.concatenate([first.logits, second.logits]),
            np.concatenate([first.probabilities, second.probabilities]),
        )


def build(
    version: ModelVersion,
    plan: Plan,
    max_batch_size: int,
    variant: str = artifact.MODEL,
    engine_cache: Path | None = None,
) -> list[OrtEngine]:
    """Loads a variant and makes its executors; `warm_up` is left to the caller.

    Args:
        version: the verified model version.
        plan: provider, threads, executors.
        max_batch_size: the largest bucket.
        variant: file name of the variant to run.
        engine_cache: directory for compiled TensorRT engines; None caches nothing.

    Raises:
        ArtifactError: the graph cannot be loaded, or its signature breaks the contract.
        ProviderError: the provider is missing or refuses the model.
        OutOfMemoryError, DeviceLostError, EngineError: there is no room for the buffers, or the device failed.
    """
    buckets = plan.buckets(max_batch_size)
    return executors(version, sessions.load(version, variant, plan, buckets, engine_cache), variant, buckets)


def executors(version: ModelVersion, loaded: Loaded, variant: str, buckets: Sequence[int]) -> list[OrtEngine]:
    """The executors of a loaded model: one for each GPU, or as many as the plan says on one shared session."""
    plan, shape, classes = loaded.plan, version.manifest.input.shape, len(version.manifest.classes)
    runners: list[Runner] = []
    try:
        if plan.provider in GPU_PROVIDERS:
            mixed = set(loaded.nodes) > {plan.provider}
            for gpu, on_gpu in zip(plan.gpus, loaded.on_gpus, strict=True):
                if mixed:
                    runners.append(MixedRunner(on_gpu.sessions, gpu, shape))
                else:
                    runners.append(CudaRunner(on_gpu.sessions, gpu, shape, classes, plain=on_gpu.plain))
        else:
            runners.extend(HostRunner(loaded.session, buckets[-1], shape) for _ in range(plan.executors))
    except Exception as error:  # ONNX Runtime's exceptions have no common base below Exception
        for runner in runners:
            runner.close()
        raise faults.translate(error) from error
    return [OrtEngine(runner, plan, variant, buckets) for runner in runners]


def side_by_side(engines: Sequence[OrtEngine]) -> ThreadPoolExecutor:
    """Threads for running all executors at once before they take traffic, one each.

    They give way to the threads that serve other models. Only where the caller's thread does the computing: a runtime
    that starts threads of its own would keep the low priority in them for good.
    """
    lower = threads.lower_priority if engines[0].plan.computes_in_caller else None
    return ThreadPoolExecutor(len(engines), thread_name_prefix="warm-up", initializer=lower)


def warm_up(engines: Sequence[OrtEngine]) -> None:
    """Warms up all executors at the same time, as they will run: what they measure includes what they share.

    On a CPU one of them does so for all: they are as one, and as other models are being served meanwhile, a core is
    left to those. Of OpenVINO's streams each builds a graph of its own when it first runs: here, with a small batch on
    all of them at once.

    Raises:
        EngineError: a bucket cannot be run.
    """
    first = engines[0]
    leaders = engines if first.provider in GPU_PROVIDERS else engines[:1]
    with side_by_side(leaders) as pool:
        for future in [pool.submit(one.warm_up) for one in leaders]:
            future.result()
    for one in engines[len(leaders) :]:
        one.measured_s = first.measured_s
    if first.provider == OPENVINO:
        with side_by_side(engines) as pool:
            for run in [pool.submit(one.run_smallest) for one in engines]:
                run.result()


def _power_of_two(size: int) -> bool:
    return size.bit_count() == 1
