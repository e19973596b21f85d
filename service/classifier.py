"""One request: decode, submit, top-k. Knows no transport."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from service.admission import Admission
from service.decode import Decoder, Encoded, Faults, decode_here, light
from service.engine import Outputs
from service.errors import (
    ConvoyError,
    ExpiredError,
    ImageFault,
    InvalidImageError,
    InvalidRequestError,
    TooManyImagesError,
)
from service.metrics import Metrics
from service.preprocess import Limits
from service.serving import ServedModel, join_outputs
from service.shadow import Shadow
from service.turns import in_turns

# A request is worked on in chunks of so many images: while one is inferred, the next is decoded.
CHUNK_IMAGES = 16

# Classes in one answer, over all its images: it is built and written on the event loop, and a thousand classes of 256
# images are more than most clients accept.
_MAX_CLASSES = 1 << 18

# Up to so many classes a row is ranked without numpy; of more, so many places are found one by one.
_FEW_CLASSES = 64
_FEW_PLACES = 16

_NOBODY = contextlib.nullcontext()

T = TypeVar("T")

# Behind all traffic, whatever its priority.
_SHADOW_PRIORITY = 1000


class Query(NamedTuple):
    """What to return, and how urgent it is.

    `top_k` at least 1; `min_score` 0 to 1; `priority`: smaller goes first.
    """

    top_k: int = 5
    min_score: float = 0.0
    logits: bool = False
    priority: int = 0


class Answer(NamedTuple):
    """Of one image: `classes` (index, score) best first, `logits` float32[K] if asked for.

    `best`: index of the best class, also if its score is too small to be returned.
    """

    classes: Sequence[tuple[int, float]]
    logits: NDArray[np.float32] | None
    best: int


class Timing(NamedTuple):
    """Seconds; of several chunks the slowest in each stage."""

    queue_s: float
    decode_s: float
    inference_s: float


class Result(NamedTuple):
    """One outcome for each image, in order."""

    outcomes: list[Answer | InvalidImageError]
    timing: Timing

    @property
    def answered(self) -> int:
        """Images that were classified."""
        return sum(isinstance(outcome, Answer) for outcome in self.outcomes)


class Classifier:
    """Classifies the images of one request with one model.

    Args:
        decoder: the decode stage, started.
        admission: the bounds of the house.
        limits: what may be decoded.
        max_images: most images in one request.
        metrics: receives durations and outcomes.
    """

    def __init__(
        self, decoder: Decoder, admission: Admission, limits: Limits, max_images: int, metrics: Metrics
    ) -> None:
        self._decoder = decoder
        self._admission = admission
        self._limits = limits
        self._max_images = max_images
        self._metrics = metrics
        self._shadow = Shadow(metrics)

    async def classify(
        self,
        model: ServedModel,
        images: Sequence[bytes],
        query: Query,
        deadline: float,
        shadow: ServedModel | None = None,
    ) -> Result:
        """Classifies encoded images.

        Args:
            model: the version that answers.
            images: at least one encoded image.
            query: what to return.
            deadline: monotonic seconds by which the answer is wanted.
            shadow: a version that works on a copy afterwards; it never affects the answer.

        Raises:
            InvalidRequestError: no image, too many, or too many classes of them.
            OverloadedError, DrainingError: refused on arrival.
            ExpiredError: the deadline passed.
            EngineError: the runtime failed.
        """
        self._check(model, images, query)
        began = time.monotonic()
        nbytes = sum(map(len, images))
        # The shadow may be retired meanwhile; it is released when its last copy has been counted.
        with shadow.in_use() if shadow is not None else _NOBODY:
            with (
                model.in_use(),
                self._admission.admit(model.name, len(images), nbytes, deadline, query.priority) as place,
            ):
                result = await self._work(model, images, query, deadline)
                place.answered = result.answered
            self._record(model, result, time.monotonic() - began)
            if shadow is not None:
                again = self._shadowed(shadow, images, deadline + (time.monotonic() - began))
                self._shadow.copy(shadow.name, shadow.number, _best(result), nbytes, again, shadow.in_use())
        return result

    def refusal(self, names: Iterable[str], deadline: float) -> ConvoyError | None:
        """Why no request could be admitted now, whatever is in it; None if one could.

        Args:
            names: of all models that are served.
            deadline: as for `classify`.
        """
        return self._admission.refusal(names, deadline)

    async def close(self) -> None:
        """Ends the shadows' copies."""
        await self._shadow.close()

    async def _work(self, model: ServedModel, images: Sequence[bytes], query: Query, deadline: float) -> Result:
        if len(images) <= CHUNK_IMAGES:
            return await self._chunk(model, images, query, deadline)
        return _joined(await _all(self._chunk(model, chunk, query, deadline) for chunk in _chunks(images)))

    async def _shadowed(self, shadow: ServedModel, images: Sequence[bytes], deadline: float) -> Sequence[int | None]:
        """The same images once more, after everything else."""
        with shadow.in_use():
            return _best(await self._work(shadow, images, Query(top_k=1, priority=_SHADOW_PRIORITY), deadline))

    def check_count(self, images: int) -> None:
        """Raises InvalidRequestError for a request without images, or with too many."""
        if not images:
            raise InvalidRequestError("the request has no image; put at least one into `images`")
        if images > self._max_images:
            raise TooManyImagesError(images, self._max_images)

    def _check(self, model: ServedModel, images: Sequence[bytes], query: Query) -> None:
        self.check_count(len(images))
        places = min(query.top_k, len(model.version.manifest.classes))
        if len(images) * places > _MAX_CLASSES:
            raise InvalidRequestError(
                f"{places} classes of {len(images)} images are asked for, and an answer has at most {_MAX_CLASSES} in "
                "all; use a smaller top_k, or send fewer images at a time"
            )
        if not 0 <= query.min_score <= 1:
            raise InvalidRequestError(f"min_score is {query.min_score:g}, but scores are between 0 and 1")

    async def _chunk(self, model: ServedModel, images: Sequence[bytes], query: Query, deadline: float) -> Result:
        spec = model.version.manifest.input
        work = Encoded(images, spec, self._limits, np.empty((len(images), *spec.shape), np.uint8))
        faults, decoding = await self._decode(model.name, work, query, deadline)
        good = [position for position in range(len(images)) if position not in faults]
        if not good:
            return Result([faults[position] for position in range(len(images))], decoding)
        pixels = work.pixels[good] if faults else work.pixels
        inferring = model.batcher.submit(pixels, len(good), deadline, priority=query.priority)
        inferred = await _in_time(inferring, deadline)
        timing = Timing(decoding.queue_s + inferred.queue_s, decoding.decode_s, inferred.run_s)
        found = await in_turns(answers(inferred.rejoined(join_outputs), query), len(model.version.manifest.classes))
        if not faults:
            return Result(found, timing)
        rest = iter(found)
        return Result([faults.get(position) or next(rest) for position in range(len(images))], timing)

    async def _decode(self, flow: str, work: Encoded, query: Query, deadline: float) -> tuple[Faults, Timing]:
        headers = light(work)
        if headers is not None:
            began = time.monotonic()
            return decode_here(work, headers), Timing(0.0, time.monotonic() - began, 0.0)
        decoding = self._decoder.submit(work, len(work.images), deadline, flow=flow, priority=query.priority)
        decoded = await _in_time(decoding, deadline)
        faults = {position: fault for _, part in decoded.results for position, fault in part.items()}
        return faults, Timing(decoded.queue_s, decoded.run_s, 0.0)

    def _record(self, served: ServedModel, result: Result, seconds: float) -> None:
        series = self._metrics.answer_series(served.name, served.number)
        series.total.observe(seconds)
        series.queue.observe(result.timing.queue_s)
        series.decode.observe(result.timing.decode_s)
        faults = [outcome for outcome in result.outcomes if isinstance(outcome, InvalidImageError)]
        if result.timing.inference_s:  # without a usable image nothing was inferred
            series.infer.observe(result.timing.inference_s)
        series.classified.inc(result.answered)
        if faults:
            series.failed.inc(len(faults))
        for fault in faults:
            self._metrics.image_errors.labels(fault.reason.value, fault.image_format).inc()


def answers(outputs: Outputs, query: Query) -> Iterator[Answer | InvalidImageError]:
    """The best classes of each row; ties go to the smaller index.

    Args:
        outputs: float32[N, K] each.
        query: what to return.
    """
    all_finite = _finite(outputs.logits) and _finite(outputs.probabilities)
    for logits, probabilities in zip(*outputs, strict=True):
        if not all_finite and not (_finite(logits) and _finite(probabilities)):
            yield InvalidImageError(
                ImageFault.NON_FINITE_OUTPUT,
                "the model's output for this image is not finite; report it to the operator",
            )
            continue
        ranked = _ranked(probabilities, query.top_k)
        best = ranked[0][0]
        if query.min_score > 0:
            ranked = [(index, score) for index, score in ranked if score >= query.min_score]
        yield Answer(ranked, logits if query.logits else None, best)


def _finite(values: NDArray[np.float32]) -> bool:
    """Whether none is infinite or NaN. Both ways take a fraction of the time of a reduction by numpy."""
    if values.size <= _FEW_CLASSES:
        return math.isfinite(sum(values.ravel().tolist()))  # no sum of so many float32 overflows a float
    return math.isfinite(values.item(values.argmax())) and math.isfinite(values.item(values.argmin()))  # NaN is either


def _ranked(probabilities: NDArray[np.float32], top_k: int) -> list[tuple[int, float]]:
    """The best (index, score) pairs of one row."""
    if len(probabilities) > _FEW_CLASSES and top_k <= _FEW_PLACES:
        return _first_places(probabilities, top_k)
    scores: list[float] = probabilities.tolist()
    if len(scores) <= _FEW_CLASSES:
        # Python sorts ten numbers in the time that numpy takes to be called; its sort is stable, reversed or not.
        order = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)[:top_k]
    else:
        order = np.argsort(-probabilities, kind="stable")[:top_k].tolist()
    return [(index, scores[index]) for index in order]


def _first_places(probabilities: NDArray[np.float32], places: int) -> list[tuple[int, float]]:
    """One maximum after the other: five of a thousand take a tenth of the time of sorting them all."""
    left = probabilities.copy()
    ranked = []
    for _ in range(places):
        index = int(left.argmax())  # the first of equals
        ranked.append((index, left.item(index)))
        left[index] = -np.inf
    return ranked


def _best(result: Result) -> list[int | None]:
    """Index of the best class of each image; None for one that could not be used."""
    return [outcome.best if isinstance(outcome, Answer) else None for outcome in result.outcomes]


def _chunks(images: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    for start in range(0, len(images), CHUNK_IMAGES):
        yield images[start : start + CHUNK_IMAGES]


async def _all(chunks: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Runs the chunks side by side; the first failure cancels the others and is raised as it is.

    Each turn of the event loop begins one of them: thumbnails are decoded where they are, and others are to have their
    turns between.
    """
    tasks: list[asyncio.Task[Result]] = []
    try:
        for chunk in chunks:
            tasks.append(asyncio.create_task(chunk))
            await asyncio.sleep(0)
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _joined(results: Sequence[Result]) -> Result:
    if len(results) == 1:
        return results[0]
    timing = Timing(
        max(r.timing.queue_s for r in results),
        max(r.timing.decode_s for r in results),
        max(r.timing.inference_s for r in results),
    )
    return Result([outcome for result in results for outcome in result.outcomes], timing)


async def _in_time(future: asyncio.Future[T], deadline: float) -> T:
    """What a job gives, unless the deadline (monotonic seconds) comes first.

    One timer: `asyncio.timeout_at` costs several times as much, for each request.

    Raises:
        ExpiredError: the deadline came first; the job is given up.
    """
    # Event loops keep a monotonic clock of their own; uvloop's differs from time.monotonic by its start.
    timer = asyncio.get_running_loop().call_later(deadline - time.monotonic(), _expire, future)
    try:
        return await future
    finally:
        timer.cancel()


def _expire(future: asyncio.Future[Any]) -> None:
    if not future.done():
        future.set_exception(ExpiredError("the deadline passed before the answer was ready"))
