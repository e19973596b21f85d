"""Copies of requests for a shadow version: compared and measured, never part of an answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

from service.errors import ConvoyError
from service.metrics import Metrics

# What may be under way at once: copies, and of more than one copy images and their bytes. The rest is skipped and
# counted, so that a slow shadow costs little memory: nothing else counts what it holds.
_MAX_COPIES = 16
_MAX_IMAGES = 256
_MAX_BYTES = 64 << 20

_NOBODY = nullcontext()


class Shadow:
    """Runs copies in the background.

    Args:
        metrics: receives agreement and duration.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._tasks: set[asyncio.Task[None]] = set()
        self._images = 0
        self._bytes = 0

    def copy(
        self,
        model: str,
        version: int,
        answered: Sequence[int | None],
        nbytes: int,
        work: Coroutine[Any, Any, Sequence[int | None]],
        in_use: AbstractContextManager[object] = _NOBODY,
    ) -> None:
        """Lets the shadow version classify the same images and compares.

        Args:
            model: name of the model.
            version: number of the shadow version.
            answered: best class of each image as it was answered; None for an image that could not be used.
            nbytes: of the encoded images.
            work: gives the same for the shadow version.
            in_use: entered as long as the copy lasts.
        """
        if self._is_full(len(answered), nbytes):
            work.close()
            self._count(model, version, "skipped", len(answered))
            return
        stack = ExitStack()
        stack.enter_context(in_use)
        task = asyncio.create_task(self._run(model, version, answered, work))
        self._tasks.add(task)
        self._images += len(answered)
        self._bytes += nbytes

        def ended(_: object) -> None:
            self._tasks.discard(task)
            self._images -= len(answered)
            self._bytes -= nbytes
            work.close()  # cancelled before its first step, the task never gets to it
            stack.close()

        task.add_done_callback(ended)

    def _is_full(self, images: int, nbytes: int) -> bool:
        return len(self._tasks) >= _MAX_COPIES or (
            bool(self._tasks) and (self._images + images > _MAX_IMAGES or self._bytes + nbytes > _MAX_BYTES)
        )

    async def close(self) -> None:
        """Ends the copies under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(
        self, model: str, version: int, answered: Sequence[int | None], work: Coroutine[Any, Any, Sequence[int | None]]
    ) -> None:
        began = time.monotonic()
        try:
            found = await work
        except ConvoyError:
            self._count(model, version, "failed", len(answered))
            return
        self._metrics.version_seconds.labels(model, str(version), "shadow").observe(time.monotonic() - began)
        agreeing = sum(one == other for one, other in zip(answered, found, strict=True))
        self._count(model, version, "agree", agreeing)
        self._count(model, version, "disagree", len(answered) - agreeing)

    def _count(self, model: str, version: int, outcome: str, images: int) -> None:
        self._metrics.shadow_images.labels(model, str(version), outcome).inc(images)
