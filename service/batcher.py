"""Forms batches and runs them: late binding, one owner thread for each executor, one outcome for each job.

A batch is closed only when an executor is free to run it, so batches grow from backlog and an idle executor adds no
delay. The batcher knows no images, no gRPC and no ONNX: it moves parts of jobs to `run` and their results back to the
futures that the jobs carry. The same class runs the decode pool (one job at a time) and the models' batches.

Threads: `submit` and every change of a future happen on the event loop; owner threads wait on one condition, run, and
hand a whole batch of results back in a single call to the loop.
"""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from service import threads
from service.codel import CoDel
from service.errors import ConvoyError, DrainingError, EngineError, ExpiredError, OverloadedError
from service.schedule import FairQueue, Part, Taken

P = TypeVar("P")  # payload: a sequence with one element for each image
R = TypeVar("R")  # result of one part

Clock = Callable[[], float]

# A window that is ended by a deadline leaves so many times what the batch needs, and the time for a thread to wake.
_WINDOW_CAUTION = 2.0
_WAKING_S = 0.01


@dataclass(slots=True, eq=False)
class Done(Generic[R]):
    """What became of a job: `results` holds (start, result) of each part; times in seconds.

    `queue_s` is the longest wait of a part, `run_s` the longest run.
    """

    results: list[tuple[int, R]] = field(default_factory=list)
    queue_s: float = 0.0
    run_s: float = 0.0

    def rejoined(self, join: Callable[[Sequence[R]], R]) -> R:
        """The results in the order of the job's images, whatever order its parts ran in."""
        if len(self.results) == 1:
            return self.results[0][1]
        return join([result for _, result in sorted(self.results, key=lambda part: part[0])])


@dataclass(slots=True, eq=False)
class Job(Generic[P, R]):
    """One caller's images, and the future that gets what becomes of them.

    Times are monotonic seconds. The future refers to the job until it is done, and no longer: in a circle the images of
    every request would stay in memory until Python looks for circles, which is when hundreds of megabytes of them are
    there.
    """

    payload: P
    size: int
    deadline: float
    future: asyncio.Future[Done[R]]
    submitted: float
    priority: int = 0
    done: Done[R] = field(default_factory=Done)
    finished: int = 0

    @property
    def abandoned(self) -> bool:
        """The caller went away, or the job already failed."""
        return self.future.done()


class Observer(Protocol):
    """What a batcher reports. Called on owner threads and on the loop; has to be quick and thread-safe."""

    def batch(self, images: int, run_s: float) -> None:
        """A batch of `images` ran for `run_s` seconds."""

    def dropped(self, reason: str, jobs: int) -> None:
        """Jobs left the queue without running: "expired", "abandoned" or "shed"."""

    def late(self, jobs: int) -> None:
        """Jobs finished after their deadline."""


class Silent:
    """An observer that does nothing."""

    def batch(self, images: int, run_s: float) -> None:
        """Nothing."""

    def dropped(self, reason: str, jobs: int) -> None:
        """Nothing."""

    def late(self, jobs: int) -> None:
        """Nothing."""


Run = Callable[[Sequence[Part[Job[P, R]]]], Sequence[R]]


class Sizes(Protocol):
    """Decides how large a batch is; called under the batcher's lock."""

    @property
    def largest(self) -> int:
        """The largest batch."""

    def best_batch(self, waiting: int) -> int:
        """Images to take when so many wait, at least 1."""

    def cautious_s(self, images: int) -> float:
        """Seconds that running so many rarely exceeds."""

    def observe(self, images: int, seconds: float) -> None:
        """A batch ran."""

    def doubt(self, images: int) -> None:
        """The forecast for so many left nothing to run."""


class OneByOne:
    """Batches of one, of unknown length: for work that gains nothing from company."""

    largest = 1

    def best_batch(self, waiting: int) -> int:
        """Always 1."""
        del waiting
        return 1

    def cautious_s(self, images: int) -> float:
        """Nothing is known."""
        del images
        return 0.0

    def observe(self, images: int, seconds: float) -> None:
        """Nothing is learned."""

    def doubt(self, images: int) -> None:
        """Nothing was forecast."""


class _Batch(NamedTuple, Generic[P, R]):
    """A batch that ran, or failed; times are monotonic seconds."""

    taken: Taken[Job[P, R]]
    results: Sequence[R]
    error: ConvoyError | None
    began: float
    ended: float


class Batcher(Generic[P, R]):
    """A queue and the threads that own the executors.

    Args:
        runs: one callable for each executor; each gets the parts of a batch and returns one result for each part, in
            order. It is called on its own thread only.
        sizes: how large a batch is, and how long it takes.
        name: for thread names.
        in_turn: batches of at most so many images run on the event loop itself, at the end of a turn, with what that
            turn submitted: work so short that waking a thread and being woken by it takes longer. The first executor is
            for those, and for all if there is no other.
        window_s: how long an executor waits for a fuller batch after the first image came, unless a deadline is nearer;
            0 never waits.
        codel: sheds from a standing queue; None never sheds.
        observer: receives counts and times.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        runs: Sequence[Run[P, R]],
        *,
        sizes: Sizes,
        name: str,
        in_turn: int = 0,
        window_s: float = 0.0,
        codel: CoDel | None = None,
        observer: Observer | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._here = runs[0] if in_turn else None
        self._in_turn = in_turn
        self._sizes = sizes
        self._window_s = window_s
        self._codel = codel
        self._observer = observer or Silent()
        self._clock = clock
        self._queue: FairQueue[Job[P, R]] = FairQueue()
        self._wake = threading.Condition()
        self._closed = False
        self._running = 0  # images in batches that run now
        self._notifying = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._threads = [
            threading.Thread(target=self._own, args=(run,), name=f"{name}-{number}", daemon=True)
            for number, run in enumerate(runs[1:] if in_turn else runs)
        ]

    def start(self) -> None:
        """Starts the owner threads. Call it on the event loop that will submit."""
        self._loop = asyncio.get_running_loop()
        for thread in self._threads:
            thread.start()

    @property
    def queued_images(self) -> int:
        """Images waiting."""
        return self._queue.images

    @property
    def running_images(self) -> int:
        """Images in batches that run now."""
        return self._running

    def submit(
        self,
        payload: P,
        size: int,
        deadline: float,
        *,
        flow: Hashable = None,
        priority: int = 0,
    ) -> asyncio.Future[Done[R]]:
        """Queues a job. Cancelling the future takes the job out before it runs.

        Args:
            payload: what `run` gets.
            size: images, at least 1.
            deadline: monotonic seconds.
            flow: what shares fairly.
            priority: smaller goes first.

        Returns:
            A future with the results. It fails with ExpiredError (never ran, or not wholly), OverloadedError
            (shed), DrainingError (closed) or whatever `run` raised.
        """
        if self._loop is None:
            raise RuntimeError("start() the batcher before submitting to it")
        future: asyncio.Future[Done[R]] = self._loop.create_future()
        job: Job[P, R] = Job(payload, size, deadline, future, self._clock(), priority)
        with self._wake:
            if self._closed:
                future.set_exception(DrainingError())
                return future
            number = self._queue.push(job, flow)
        future.add_done_callback(functools.partial(self._ended, job, number))
        if not self._notifying:
            self._notifying = True
            self._loop.call_soon(self._notify)
        return future

    async def close(self) -> None:
        """Fails what still waits, lets running batches finish, and ends the threads."""
        with self._wake:
            self._closed = True
            waiting = self._queue.drain()
            self._wake.notify_all()
        for job in waiting:
            self._fail(job, DrainingError())
        await asyncio.gather(*(asyncio.to_thread(thread.join) for thread in self._threads if thread.ident))

    def _ended(self, job: Job[P, R], number: int, future: asyncio.Future[Done[R]]) -> None:
        """Takes a job out of the queue whose caller has gone or whose deadline has passed.

        Its images would stay in memory until its turn comes, and nobody counts them any more; and the size of the next
        batch would be chosen for jobs that never run.
        """
        if job.finished == job.size:
            return
        with self._wake:
            discarded = self._queue.discard(number)
        if discarded:
            expired = not future.cancelled() and isinstance(future.exception(), ExpiredError)
            self._observer.dropped("expired" if expired else "abandoned", 1)

    def _notify(self) -> None:
        """Wakes an owner, once for all jobs of this turn of the loop; or runs them here, `in_turn`.

        Waking it for each would part what belongs together, and make two threads fight for the interpreter's lock.
        """
        self._notifying = False
        with self._wake:
            images = self._next_images() if self._here else 0
            if self._here is None or (self._threads and images > self._in_turn):
                self._wake.notify()
                return
            taken = self._close_batch(images)
        self._deliver(self._ran(self._here, taken)) if taken.parts else self._drop(taken)
        if self.queued_images and not self._notifying:  # the rest after what else the loop has to do
            self._notifying = True
            self._call(self._notify)

    # --- on the owner threads

    def _own(self, run: Run[P, R]) -> None:
        threads.computes()
        while (taken := self._take()) is not None:
            if taken.parts:
                self._call(self._deliver, self._ran(run, taken))
            else:
                self._call(self._drop, taken)
            del taken  # or its images would stay until there is another batch

    def _take(self) -> Taken[Job[P, R]] | None:
        """Blocks until there is something to do; None when closed."""
        with self._wake:
            self._wake.wait_for(lambda: self._closed or len(self._queue))
            if self._window_s:
                self._wait_for_company()
            if self._closed:
                return None
            taken = self._close_batch(self._next_images())
            if len(self._queue):
                self._wake.notify()  # a notify that reached a busy thread must not be lost
            return taken

    def _wait_for_company(self) -> None:
        """Until the window of the first image has passed, or all that may run together is there. Under the lock.

        It ends sooner where a job would miss its deadline, and with the batcher.
        """
        while not self._closed and 0 < self._queue.images < self._sizes.largest:
            now = self._clock()
            spare_s = _WAKING_S + _WINDOW_CAUTION * self._sizes.cautious_s(self._queue.images)
            left_s = min(min(job.submitted + self._window_s, job.deadline - spare_s) for job in self._queue) - now
            if left_s <= 0:
                return
            self._wake.wait(left_s)

    def _next_images(self) -> int:
        """Size of the next batch. Under the lock."""
        return self._sizes.best_batch(max(1, self._queue.images))

    def _close_batch(self, images: int) -> Taken[Job[P, R]]:
        """Takes what runs next, at most so many images. Under the lock."""
        now = self._clock()
        taken = self._queue.take(images, now + self._sizes.cautious_s(images), self._shedder(now))
        if self._codel is not None and not len(self._queue):
            self._codel.emptied()
        if not taken.parts and any(job.deadline >= now for job in taken.expired):
            self._sizes.doubt(images)
        self._running += taken.images
        return taken

    def _shedder(self, now: float) -> Callable[[Job[P, R]], bool] | None:
        codel = self._codel
        return None if codel is None else lambda job: codel.sheds(now - job.submitted, now)

    def _ran(self, run: Run[P, R], taken: Taken[Job[P, R]]) -> _Batch[P, R]:
        began = self._clock()
        images = taken.images
        error: ConvoyError | None = None
        results: Sequence[R] = ()
        try:
            results = run(taken.parts)
            if len(results) != len(taken.parts):
                error = EngineError(f"{len(results)} results for {len(taken.parts)} parts")
        except ConvoyError as raised:
            error = raised
        except BaseException as raised:  # noqa: BLE001  # a panic in a Rust library is no Exception, and the thread
            # owns the executor: it must outlive any batch
            error = EngineError(f"{type(raised).__name__}: {raised}")
            error.__cause__ = raised
        ended = self._clock()
        with self._wake:
            self._running -= images
            if error is None:  # how soon a batch failed says nothing of how long it takes
                self._sizes.observe(images, ended - began)
        self._observer.batch(images, ended - began)
        return _Batch(taken, results, error, began, ended)

    def _call(self, function: Callable[..., None], *args: Any) -> None:
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(function, *args)

    # --- on the event loop

    def _deliver(self, batch: _Batch[P, R]) -> None:
        late = 0
        for number, part in enumerate(batch.taken.parts):
            job = part.job
            done = job.done
            done.queue_s = max(done.queue_s, batch.began - job.submitted)
            done.run_s = max(done.run_s, batch.ended - batch.began)
            if batch.error is not None:
                self._fail(job, batch.error)
                continue
            done.results.append((part.start, batch.results[number]))
            job.finished += part.stop - part.start
            if job.finished < job.size:
                continue
            late += batch.ended > job.deadline  # also where its caller did not wait any longer than that
            if not job.future.done():
                job.future.set_result(done)
        if late:
            self._observer.late(late)
        self._drop(batch.taken)

    def _drop(self, taken: Taken[Job[P, R]]) -> None:
        for job in taken.expired:
            passed = job.deadline < self._clock()
            why = "passed while the request waited for its turn" if passed else "is too near for the work to end by it"
            self._fail(job, ExpiredError(f"the deadline {why}"))
        if taken.expired:
            self._observer.dropped("expired", len(taken.expired))
        for job in taken.shed:
            self._fail(job, OverloadedError("the queue has been too long for too long", "codel", retry_after_ms=100))
        if taken.shed:
            self._observer.dropped("shed", len(taken.shed))
        if taken.abandoned:
            self._observer.dropped("abandoned", len(taken.abandoned))

    def _fail(self, job: Job[P, R], error: ConvoyError) -> None:
        if not job.future.done():
            job.future.set_exception(error)
