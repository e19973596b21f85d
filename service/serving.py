"""One model version that can answer: its engines, its batcher, and who still uses it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from service import artifact, canary, threads
from service.artifact import ModelVersion
from service.batcher import Batcher, Job, Observer
from service.codel import CoDel
from service.engine import Engine, Outputs
from service.errors import DeviceLostError, ExpiredError
from service.latency import LatencyTable
from service.preprocess import Pixels
from service.providers import GPU_PROVIDERS
from service.schedule import Part

ModelBatcher = Batcher[Pixels, Outputs]

# Builds and warms up the engines of a version, one for each executor.
EngineFactory = Callable[[ModelVersion], Sequence[Engine]]

# CoDel's target is at least so many full batches: with fewer waiting, a queue is just the next batch filling up.
_CODEL_BATCHES = 4
_CANARY_DEADLINE_S = 30.0
_LOW_PRIORITY = 2


class ServedModel:
    """A loaded version.

    Args:
        version: what is on disk.
        engines: warmed up, one for each executor.
        batcher: owns the engines' threads.
        load_seconds: from reading the manifest to ready.
    """

    def __init__(
        self, version: ModelVersion, engines: Sequence[Engine], batcher: ModelBatcher, load_seconds: float
    ) -> None:
        self.version = version
        self.batcher = batcher
        self.load_seconds = load_seconds
        self._engines = list(engines)
        self._users = _Users()

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.version.manifest.name

    @property
    def number(self) -> int:
        """Number of the version."""
        return self.version.manifest.version

    @property
    def engine(self) -> Engine:
        """The first executor's engine; all of them are alike."""
        return self._engines[0]

    def in_use(self) -> AbstractContextManager[None]:
        """Keeps the version from being released while a request works with it."""
        return self._users

    async def canary(self) -> float:
        """Runs the canary as an ordinary, patient request beside the traffic.

        Raises:
            CanaryError: the answers are not what they were.
            ArtifactError: its images cannot be read now.
            ExpiredError, OverloadedError, DrainingError: it did not get its turn.
            EngineError: the runtime failed.
        """
        with self.in_use():
            pixels = await asyncio.to_thread(canary.pixels, self.version)
            deadline = time.monotonic() + _CANARY_DEADLINE_S
            running = self.batcher.submit(pixels, len(pixels), deadline, priority=_LOW_PRIORITY)
            try:
                done = await asyncio.wait_for(running, _CANARY_DEADLINE_S)
            except TimeoutError:  # the batcher looks at what it passes over only when it has nothing better to do
                raise ExpiredError(f"it did not get its turn within {_CANARY_DEADLINE_S:g} s") from None
        return canary.compare(self.version, done.rejoined(join_outputs).probabilities, self.engine)

    async def release(self, timeout_s: float) -> None:
        """Waits until nobody uses it, at most so long, ends the batcher and gives the memory back."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._users.none.wait()
        except TimeoutError:
            pass  # its callers' deadlines have passed; the batcher fails what is left
        await self.batcher.close()
        engines, self._engines = self._engines, []
        for engine in engines:
            await asyncio.to_thread(engine.close)  # to give back gigabytes takes a while


class _Users:
    """How many requests work with a version. One for all of them: a generator for each would cost more than counting.

    Attributes:
        none: set while there is no user.
    """

    def __init__(self) -> None:
        self._count = 0
        self.none = asyncio.Event()
        self.none.set()

    def __enter__(self) -> None:
        self._count += 1
        self.none.clear()

    def __exit__(self, *_: object) -> None:
        self._count -= 1
        if not self._count:
            self.none.set()


def load(
    path: Path,
    build: EngineFactory,
    observer: Callable[[str], Observer],
    *,
    window_s: float,
    codel_target_s: float,
    in_turn_s: float,
    gently: bool,
    on_device_lost: Callable[[DeviceLostError], None],
) -> tuple[ServedModel, float]:
    """Verifies, builds, warms up and checks one version. Blocking: call it off the event loop.

    Args:
        path: the version's directory.
        build: makes the engines.
        observer: makes the observer of a model's batches, by name.
        window_s: see `Batcher`.
        codel_target_s: waiting time that a standing queue may have, at least; 0 never sheds.
        in_turn_s: batches that take less run on the event loop itself, and with a single executor then all of them.
        gently: other models are being served: their requests go first while files are verified.
        on_device_lost: told when a device is gone for good.

    Returns:
        The version, and its canary's largest difference.

    Raises:
        ArtifactError, ProviderError, EngineError: it cannot be served.
    """
    began = time.monotonic()
    threads.computes()  # with what the runtime starts from here
    version = artifact.unverified(path)
    threads.in_background(artifact.verify, version, gently=gently)
    engines = list(build(version))
    try:
        difference = max(canary.check(version, engine) for engine in engines)
    except BaseException:
        for engine in engines:
            engine.close()
        raise
    buckets = engines[0].buckets
    table = LatencyTable(buckets, engines[0].measured_s)
    if engines[0].provider in GPU_PROVIDERS:  # there a batch may have to wait while another model's graph is captured
        in_turn_s = 0.0
    in_turn = max((bucket for bucket in buckets if table.mean_s(bucket) < in_turn_s), default=0)
    while in_turn == buckets[-1] and len(engines) > 1:  # no batch is left for the others
        engines.pop().close()
    target_s = max(codel_target_s, _CODEL_BATCHES * table.mean_s(buckets[-1]))
    batcher: ModelBatcher = Batcher(
        [_runner(engine, on_device_lost) for engine in engines],
        sizes=table,
        name=f"infer-{version.manifest.name}",
        in_turn=in_turn,
        window_s=window_s,
        codel=CoDel(target_s, max(0.1, target_s)) if codel_target_s else None,
        observer=observer(version.manifest.name),
    )
    return ServedModel(version, engines, batcher, time.monotonic() - began), difference


def join_outputs(parts: Sequence[Outputs]) -> Outputs:
    """Puts the outputs of a job's parts together."""
    return Outputs(*(np.concatenate(rows) for rows in zip(*parts, strict=True)))


def _runner(
    engine: Engine, on_device_lost: Callable[[DeviceLostError], None]
) -> Callable[[Sequence[Part[Job[Pixels, Outputs]]]], list[Outputs]]:
    """What an owner thread runs: the parts' pixels in, each part's rows out."""

    def run(parts: Sequence[Part[Job[Pixels, Outputs]]]) -> list[Outputs]:
        try:
            outputs = engine.infer([part.job.payload[part.start : part.stop] for part in parts])
        except DeviceLostError as error:
            on_device_lost(error)
            raise
        results, row = [], 0
        for part in parts:
            end = row + part.stop - part.start
            results.append(Outputs(outputs.logits[row:end], outputs.probabilities[row:end]))
            row = end
        return results

    return run
