"""Copies of requests for a shadow version: compared and measured, never part of an answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from typing import Any

from service.errors import ConvoyError
from service.metrics import Metrics

# Copies that may be under way at once; more are skipped and counted, so that a slow shadow costs no memory.
_MAX_COPIES = 16


class Shadow:
    """Runs copies in the background.

    Args:
        metrics: receives agreement and duration.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._tasks: set[asyncio.Task[None]] = set()

    def copy(
        self, model: str, version: int, answered: Sequence[int | None], work: Coroutine[Any, Any, Sequence[int | None]]
    ) -> None:
        """Lets the shadow version classify the same images and compares.

        Args:
            model: name of the model.
            version: number of the shadow version.
            answered: best class of each image as it was answered; None for an image that could not be used.
            work: gives the same for the shadow version.
        """
        if len(self._tasks) >= _MAX_COPIES:
            work.close()
            self._count(model, version, "skipped", len(answered))
            return
        task = asyncio.create_task(self._run(model, version, answered, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # Cancelled before its first step, the task never gets to `work`.
        task.add_done_callback(lambda _: work.close())

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
