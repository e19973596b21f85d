"""Tries one candidate: loads it, holds it against the canary, and measures it as it would run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from service import canary, engine, resources, sessions
from service.artifact import ModelVersion
from service.candidates import Candidate
from service.engine import OrtEngine
from service.errors import PASSING, ArtifactError, ConvoyError
from service.plan_cache import Row
from service.preprocess import Pixels
from service.providers import GPU_PROVIDERS
from service.sessions import Loaded

# On a CPU the time is proportional to the images; a GPU is measured with the batches that it was bought for.
_CPU_BATCH = 4
# A candidate is measured until this has passed, with at least and at most so many batches on each executor.
_SLICE_S = 0.25
_MIN_BATCHES = 2
_MAX_BATCHES = 30


class Passed(NamedTuple):
    """A candidate in memory.

    `engines`: its executors, if it runs on GPUs; they have to be used or closed. A captured graph stays with the
    executor that captured it, and so does what ONNX Runtime keeps for its thread.
    """

    loaded: Loaded
    engines: list[OrtEngine]


def run(
    version: ModelVersion, candidate: Candidate, max_batch_size: int, images: Pixels, engine_cache: Path
) -> tuple[Row, Passed | None]:
    """The candidate's row in the table, and the model in memory if it passed.

    Args:
        version: the model version.
        candidate: what to try.
        max_batch_size: largest batch that will run.
        images: the canary's, uint8[M, H, W, C].
        engine_cache: directory for compiled TensorRT engines.

    Raises:
        OutOfReachError, OutOfMemoryError: it could not be tried: memory or descriptors are short.
    """
    began = time.monotonic()
    engines: list[OrtEngine] = []
    plan, file = candidate.plan, candidate.variant.file
    buckets = plan.buckets(max_batch_size)
    try:
        loaded = sessions.load(version, file, plan, buckets, engine_cache)
        on_gpu = plan.provider in GPU_PROVIDERS
        # On a CPU any size runs, and buffers for all of them would only be made twice.
        batch = buckets[-1] if on_gpu else min(_CPU_BATCH, max_batch_size)
        engines = engine.executors(version, loaded, file, buckets if on_gpu else (batch,))
        with engine.side_by_side(engines) as pool:
            difference = pool.submit(_canary_difference, version, engines[0], images).result()
        load_s = time.monotonic() - began
        speed = images_per_second(engines, np.resize(images, (batch, *images.shape[1:])))
    except PASSING:
        raise
    except ArtifactError as error:
        return row(candidate, outcome="refused", note=str(error)), None
    except ConvoyError as error:
        return row(candidate, outcome="failed", note=str(error)), None
    else:
        passed = Passed(loaded, engines if on_gpu else [])
        engines = [] if on_gpu else engines
    finally:
        for one in engines:
            one.close()
    found = row(
        candidate,
        outcome="slower",
        load_s=round(load_s, 4),
        difference=difference,
        images_per_second=round(speed, 2),
        batch=batch,
        nodes=dict(loaded.nodes),
    )
    return found, passed


def images_per_second(engines: Sequence[OrtEngine], images: Pixels) -> float:
    """Throughput of all executors at once, at batches of `images`, uint8[B, H, W, C].

    On a CPU it is worked out from the CPU time that an image costs. That is what counts in a service whose decoders
    want the same CPUs, and it does not mistake a busy neighbour for a slow model.

    Raises:
        EngineError: a batch failed.
    """
    plan = engines[0].plan
    wall_began, process_began = time.perf_counter(), time.process_time()
    with engine.side_by_side(engines) as pool:
        shares = list(pool.map(lambda one: _measure(one, images), engines))
    wall_s, process_s = time.perf_counter() - wall_began, time.process_time() - process_began
    if plan.provider in GPU_PROVIDERS:
        return sum(len(images) / share.batch_s for share in shares)
    threads = min(plan.executors * plan.intra_op_threads, resources.cpu_count())
    # With one thread a batch is computed by its caller, whose own clock no other work in this process can advance.
    cpu_s = sum(share.cpu_s for share in shares) if plan.computes_in_caller else min(process_s, wall_s * threads)
    return threads * sum(share.batches for share in shares) * len(images) / max(cpu_s, 1e-9)


def row(candidate: Candidate, **values: Any) -> Row:
    """A row about a candidate."""
    plan, variant = candidate.plan, candidate.variant
    return Row(
        provider=plan.provider,
        variant=variant.name,
        file=variant.file,
        precision=plan.precision,
        executors=plan.executors,
        threads=plan.intra_op_threads,
        **values,
    )


def _canary_difference(version: ModelVersion, one: OrtEngine, images: Pixels) -> float:
    """The canary's largest difference, after a batch of something else: a runtime that keeps old inputs is found out.

    Raises:
        ArtifactError: it is too large.
    """
    one.infer([np.zeros_like(images[:1])])
    return canary.compare(version, canary.probabilities(one, images), one)


class _Share(NamedTuple):
    """What one executor did: its batches, the CPU seconds of its thread, and the median seconds of a batch."""

    batches: int
    cpu_s: float
    batch_s: float


def _measure(one: OrtEngine, images: Pixels) -> _Share:
    if one.provider in GPU_PROVIDERS:  # the first of a size compiles and captures, the second allocates
        one.infer([images])
        one.infer([images])
    began, cpu_began = time.perf_counter(), time.thread_time()
    took_s: list[float] = []
    while len(took_s) < _MIN_BATCHES or (len(took_s) < _MAX_BATCHES and time.perf_counter() - began < _SLICE_S):
        start = time.perf_counter()
        one.infer([images])
        took_s.append(time.perf_counter() - start)
    return _Share(len(took_s), time.thread_time() - cpu_began, median(took_s))
