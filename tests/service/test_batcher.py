"""Batches form late, every job has exactly one outcome, and the executors survive whatever runs on them."""

import asyncio
import queue
import threading
import time
import weakref
from contextlib import asynccontextmanager

import pytest

from service.batcher import Batcher, OneByOne
from service.codel import CoDel
from service.errors import DrainingError, EngineError, ExpiredError, OutOfMemoryError, OverloadedError
from service.latency import LatencyTable

TIMEOUT_S = 10
FOREVER = float("inf")


class Executor:
    """Doubles each number, one batch for each `finish`; what began is in `batches`, as lists of numbers."""

    def __init__(self):
        self.batches = []
        self.threads = set()
        self._began = threading.Semaphore(0)
        self._orders = queue.Queue()

    def run(self, parts):
        self.threads.add(threading.get_ident())
        self.batches.append([n for part in parts for n in part.job.payload[part.start : part.stop]])
        self._began.release()
        order = self._orders.get(timeout=TIMEOUT_S)
        if isinstance(order, BaseException):
            raise order
        results = [[2 * n for n in part.job.payload[part.start : part.stop]] for part in parts]
        return results[:order]

    def finish(self, batches=1):
        for _ in range(batches):
            self._orders.put(None)

    def fail(self, error):
        self._orders.put(error)

    def finish_with_results(self, count):
        self._orders.put(count)

    async def began(self):
        assert await asyncio.to_thread(self._began.acquire, timeout=TIMEOUT_S), "no batch began"


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Recorder:
    def __init__(self):
        self.batches = []
        self.drops = []
        self.lates = 0

    def batch(self, images, run_s):
        self.batches.append((images, run_s))

    def dropped(self, reason, jobs):
        self.drops.append((reason, jobs))

    def late(self, jobs):
        self.lates += jobs


class UpTo(OneByOne):
    """Batches of everything that waits, up to a size."""

    def __init__(self, largest):
        self.largest = largest

    def best_batch(self, waiting):
        return min(waiting, self.largest)


class Slow(UpTo):
    """A batch of any size takes so many seconds."""

    def __init__(self, largest, seconds):
        super().__init__(largest)
        self._seconds = seconds

    def cautious_s(self, images):
        return self._seconds


@asynccontextmanager
async def batching(*executors, sizes=None, **options):
    batcher = Batcher([e.run for e in executors], sizes=sizes or UpTo(8), name="test", **options)
    batcher.start()
    try:
        yield batcher
    finally:
        for executor in executors:
            executor.finish(100)
        await batcher.close()


def doubled(job):
    return job.rejoined(lambda parts: [n for part in parts for n in part])


async def answer(future):
    return doubled(await asyncio.wait_for(asyncio.shield(future), TIMEOUT_S))


@pytest.fixture
def executor():
    return Executor()


async def test_an_idle_executor_runs_a_single_image_at_once(executor):
    async with batching(executor) as batcher:
        future = batcher.submit([7], 1, FOREVER)
        await executor.began()
        executor.finish()

        assert await answer(future) == [14]


async def test_a_batch_grows_while_the_executor_is_busy(executor):
    async with batching(executor) as batcher:
        batcher.submit([0], 1, FOREVER)
        await executor.began()
        futures = [batcher.submit([n], 1, FOREVER) for n in range(1, 6)]
        assert (batcher.queued_images, batcher.running_images) == (5, 1)
        executor.finish(2)

        assert [await answer(future) for future in futures] == [[2], [4], [6], [8], [10]]
        assert executor.batches == [[0], [1, 2, 3, 4, 5]]


async def test_a_batch_is_never_larger_than_the_largest(executor):
    async with batching(executor, sizes=UpTo(4)) as batcher:
        batcher.submit([0], 1, FOREVER)
        await executor.began()
        futures = [batcher.submit([n], 1, FOREVER) for n in range(11)]
        executor.finish(10)
        await asyncio.wait(futures, timeout=TIMEOUT_S)

        assert [len(batch) for batch in executor.batches] == [1, 4, 4, 3]


async def test_the_earliest_deadline_runs_first_within_a_priority(executor):
    async with batching(executor, sizes=UpTo(1), clock=Clock()) as batcher:
        batcher.submit([0], 1, FOREVER)
        await executor.began()
        orders = [(1, 900, 0), (2, 500, 0), (3, 101, 1), (4, 700, 0)]
        futures = [batcher.submit([n], 1, deadline, priority=priority) for n, deadline, priority in orders]
        executor.finish(5)
        await asyncio.wait(futures, timeout=TIMEOUT_S)

        assert executor.batches == [[0], [2], [4], [1], [3]]


async def test_flows_take_turns(executor):
    async with batching(executor, sizes=UpTo(1)) as batcher:
        batcher.submit([0], 1, FOREVER, flow="a")
        await executor.began()
        futures = [batcher.submit([1], 1, FOREVER, flow="a") for _ in range(5)]
        futures += [batcher.submit([2], 1, FOREVER, flow="b") for _ in range(3)]
        executor.finish(9)
        await asyncio.wait(futures, timeout=TIMEOUT_S)

        assert sorted(executor.batches[1:7]) == [[1], [1], [1], [2], [2], [2]]


async def test_what_expires_in_the_queue_never_runs(executor):
    clock, seen = Clock(), Recorder()
    async with batching(executor, clock=clock, observer=seen) as batcher:
        first = batcher.submit([0], 1, FOREVER)
        await executor.began()
        late, in_time = batcher.submit([1], 1, clock.now + 1), batcher.submit([2], 1, clock.now + 9)
        clock.now += 2
        executor.finish(2)

        with pytest.raises(ExpiredError, match="waited"):
            await answer(late)
        assert (await answer(first), await answer(in_time)) == ([0], [4])
        assert executor.batches == [[0], [2]]
        assert seen.drops == [("expired", 1)]


async def test_a_job_whose_deadline_has_passed_on_arrival_never_runs(executor):
    clock = Clock()
    async with batching(executor, clock=clock) as batcher:
        with pytest.raises(ExpiredError):
            await answer(batcher.submit([1], 1, clock.now - 1))

        assert executor.batches == []


async def test_what_would_end_too_late_is_dropped_before_it_runs(executor):
    clock = Clock()
    sizes = LatencyTable([1, 2, 4, 8], {1: 2.0})
    async with batching(executor, sizes=sizes, clock=clock) as batcher:
        with pytest.raises(ExpiredError, match="too near"):
            await answer(batcher.submit([1], 1, clock.now + 1.9))

        assert executor.batches == []


async def test_a_forecast_that_stopped_everything_is_tried_again(executor):
    """A first batch that took seconds must not keep every later one with an ordinary deadline from running."""
    clock = Clock()
    executor.finish(100)
    async with batching(executor, sizes=LatencyTable([1], {1: 5.0}), clock=clock) as batcher:
        futures = []
        for n in range(40):
            futures.append(batcher.submit([n], 1, clock.now + 1))
            await asyncio.wait(futures, timeout=TIMEOUT_S)

    assert isinstance(futures[0].exception(), ExpiredError)
    assert doubled(futures[-1].result()) == [78]


class Images(list):
    """A payload that can be watched."""


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (lambda future: future.cancel(), "abandoned"),
        (lambda future: future.set_exception(ExpiredError("too late")), "expired"),
    ],
)
async def test_what_nobody_waits_for_leaves_memory_and_queue_at_once(executor, end, reason):
    seen = Recorder()
    async with batching(executor, observer=seen) as batcher:
        running = batcher.submit([1], 1, FOREVER)
        await executor.began()
        payload = Images(range(8))
        future = batcher.submit(payload, 8, FOREVER)
        watched = weakref.ref(payload)
        del payload
        end(future)
        await asyncio.wait([future])
        future.cancelled() or future.exception()
        del future
        await asyncio.sleep(0)

        assert watched() is None
        assert batcher.queued_images == 0
        assert seen.drops == [(reason, 1)]
        executor.finish()
        assert await answer(running) == [2]
    assert executor.batches == [[1]]


async def test_what_is_cancelled_in_the_queue_never_runs_and_leaves_the_others(executor):
    seen = Recorder()
    async with batching(executor, observer=seen) as batcher:
        batcher.submit([0], 1, FOREVER)
        await executor.began()
        gone, here = batcher.submit([1], 1, FOREVER), batcher.submit([2], 1, FOREVER)
        gone.cancel()
        executor.finish(2)

        assert await answer(here) == [4]
        assert executor.batches == [[0], [2]]
        assert seen.drops == [("abandoned", 1)]


async def test_a_caller_that_goes_away_in_mid_batch_leaves_its_batch_mates_alone(executor):
    async with batching(executor) as batcher:
        batcher.submit([0], 1, FOREVER)
        await executor.began()
        mates = [batcher.submit([n], 1, FOREVER) for n in range(1, 5)]
        executor.finish()
        await executor.began()
        mates[1].cancel()
        executor.finish()

        assert [await answer(mates[n]) for n in (0, 2, 3)] == [[2], [6], [8]]
        assert mates[1].cancelled()


async def test_a_large_job_runs_in_parts_and_is_rejoined_in_order(executor):
    async with batching(executor, sizes=UpTo(4)) as batcher:
        future = batcher.submit(list(range(11)), 11, FOREVER)
        executor.finish(3)

        assert await answer(future) == [2 * n for n in range(11)]
        assert executor.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]


async def test_parts_that_end_out_of_order_are_rejoined_in_order():
    fast, slow = Executor(), Executor()
    async with batching(fast, slow, sizes=UpTo(4)) as batcher:
        future = batcher.submit(list(range(8)), 8, FOREVER)
        await fast.began()
        await slow.began()
        first, second = (fast, slow) if fast.batches == [[4, 5, 6, 7]] else (slow, fast)
        first.finish()
        mate = batcher.submit([100], 1, FOREVER)
        await first.began()
        first.finish()
        assert await answer(mate) == [200]
        assert not future.done()
        second.finish()

        assert await answer(future) == [2 * n for n in range(8)]


async def test_when_a_part_fails_the_rest_of_the_job_does_not_run(executor):
    async with batching(executor, sizes=UpTo(4)) as batcher:
        future = batcher.submit(list(range(12)), 12, FOREVER)
        await executor.began()
        executor.fail(EngineError("broken"))
        with pytest.raises(EngineError, match="broken"):
            await answer(future)
        executor.finish(2)  # the next part may have begun before the failure was known

        assert await answer(batcher.submit([1], 1, FOREVER)) == [2]
        assert len([batch for batch in executor.batches if batch != [1]]) <= 2


@pytest.mark.parametrize(
    ("raised", "kind", "text"),
    [
        (OutOfMemoryError("the allocator is exhausted"), OutOfMemoryError, "the allocator is exhausted"),
        (KeyError("x"), EngineError, "KeyError"),
        (MemoryError(), EngineError, "MemoryError"),
        (BaseException("a panic of a Rust library"), EngineError, "panic"),
    ],
)
async def test_an_exception_fails_exactly_its_batch_and_the_next_one_runs(executor, raised, kind, text):
    async with batching(executor) as batcher:
        before = batcher.submit([0], 1, FOREVER)
        await executor.began()
        batch = [batcher.submit([n], 1, FOREVER) for n in (1, 2)]
        executor.finish()
        await executor.began()
        after = batcher.submit([3], 1, FOREVER)
        executor.fail(raised)
        executor.finish()

        for future in batch:
            with pytest.raises(kind, match=text):
                await answer(future)
        assert (await answer(before), await answer(after)) == ([0], [6])
        assert (batcher.queued_images, batcher.running_images) == (0, 0)


@pytest.mark.parametrize("count", [0, 1])
async def test_too_few_results_fail_the_batch_instead_of_leaving_callers_waiting(executor, count):
    async with batching(executor) as batcher:
        batcher.submit([0], 1, FOREVER)
        await executor.began()
        batch = [batcher.submit([n], 1, FOREVER) for n in (1, 2)]
        executor.finish()
        executor.finish_with_results(count)

        for future in batch:
            with pytest.raises(EngineError, match=f"{count} results for 2 parts"):
                await answer(future)


async def test_a_batch_that_failed_teaches_nothing_about_its_time(executor):
    clock = Clock()
    sizes = LatencyTable([1], {1: 2.0})
    async with batching(executor, sizes=sizes, clock=clock) as batcher:
        future = batcher.submit([1], 1, FOREVER)
        await executor.began()
        executor.fail(EngineError("at once"))
        with pytest.raises(EngineError):
            await answer(future)

    assert sizes.mean_s(1) == 2.0


async def test_batch_times_are_learned(executor):
    clock, seen, sizes = Clock(), Recorder(), LatencyTable([1, 2])
    async with batching(executor, sizes=sizes, clock=clock, observer=seen) as batcher:
        future = batcher.submit([1, 2], 2, FOREVER)
        await executor.began()
        clock.now += 3
        executor.finish()
        job = await asyncio.wait_for(future, TIMEOUT_S)

    assert (sizes.mean_s(2), job.run_s, job.queue_s) == (3.0, 3.0, 0.0)
    assert seen.batches == [(2, 3.0)]


async def test_what_ends_after_its_deadline_is_answered_and_counted(executor):
    clock, seen = Clock(), Recorder()
    async with batching(executor, clock=clock, observer=seen) as batcher:
        future = batcher.submit([1], 1, clock.now + 1)
        await executor.began()
        clock.now += 2
        executor.finish()

        assert await answer(future) == [2]
        assert seen.lates == 1


async def test_close_fails_what_waits_and_lets_the_running_batch_finish(executor):
    batcher = Batcher([executor.run], sizes=UpTo(1), name="test")
    batcher.start()
    running = batcher.submit([1], 1, FOREVER)
    await executor.began()
    waiting = [batcher.submit([n], 1, FOREVER) for n in (2, 3)]
    closing = asyncio.create_task(batcher.close())
    for future in waiting:
        with pytest.raises(DrainingError):
            await answer(future)
    assert not running.done()
    executor.finish()
    await asyncio.wait_for(closing, TIMEOUT_S)

    assert doubled(running.result()) == [2]
    assert executor.batches == [[1]]
    with pytest.raises(DrainingError):
        await batcher.submit([4], 1, FOREVER)


async def test_close_ends_an_idle_batcher_and_its_threads(executor):
    before = threading.active_count()
    batcher = Batcher([executor.run] * 3, sizes=UpTo(8), name="test")
    batcher.start()
    assert threading.active_count() == before + 3
    await asyncio.wait_for(batcher.close(), TIMEOUT_S)

    assert not [thread for thread in threading.enumerate() if thread.name.startswith("test-")]


async def test_a_batcher_that_never_started_closes_and_refuses_work(executor):
    batcher = Batcher([executor.run], sizes=UpTo(8), name="test")
    with pytest.raises(RuntimeError, match="start"):
        batcher.submit([1], 1, FOREVER)

    await asyncio.wait_for(batcher.close(), TIMEOUT_S)


async def test_a_full_batch_ends_the_window(executor):
    async with batching(executor, sizes=UpTo(4), window_s=3600) as batcher:
        futures = [batcher.submit([n], 1, FOREVER) for n in range(4)]
        executor.finish()
        await asyncio.wait(futures, timeout=TIMEOUT_S)

        assert executor.batches == [[0, 1, 2, 3]]


async def test_the_window_ends_without_company(executor):
    executor.finish()
    async with batching(executor, window_s=0.01) as batcher:
        assert await answer(batcher.submit([1], 1, FOREVER)) == [2]


async def test_a_deadline_that_comes_near_ends_the_window(executor):
    executor.finish()
    async with batching(executor, sizes=Slow(8, seconds=5.0), window_s=3600) as batcher:
        assert await answer(batcher.submit([1], 1, time.monotonic() + 10.1)) == [2]


async def test_the_window_begins_with_the_first_image(executor):
    """And not when the executor is free: the first image has waited by then."""
    clock = Clock()
    async with batching(executor, window_s=3600, clock=clock) as batcher:
        full = batcher.submit([0] * 8, 8, FOREVER)
        await executor.began()
        second = batcher.submit([2], 1, FOREVER)
        clock.now += 3601
        executor.finish(2)

        assert await answer(full) == [0] * 8
        assert await answer(second) == [4]


async def test_close_ends_the_window(executor):
    batcher = Batcher([executor.run], sizes=UpTo(8), name="test", window_s=3600)
    batcher.start()
    future = batcher.submit([1], 1, FOREVER)
    await asyncio.wait_for(batcher.close(), TIMEOUT_S)

    with pytest.raises(DrainingError):
        future.result()


async def test_several_executors_run_side_by_side_each_on_its_own_thread():
    executors = [Executor() for _ in range(3)]
    async with batching(*executors, sizes=OneByOne()) as batcher:
        futures = [batcher.submit([n], 1, FOREVER) for n in range(9)]
        for executor in executors:
            await executor.began()
        assert (batcher.running_images, batcher.queued_images) == (3, 6)
        for executor in executors:
            executor.finish(9)

        assert sorted([await answer(future) for future in futures]) == [[2 * n] for n in range(9)]
        assert all(len(executor.threads) == 1 for executor in executors)
        assert len(set.union(*(executor.threads for executor in executors))) == 3


async def test_a_standing_queue_is_shed_and_says_so(executor):
    clock, seen = Clock(), Recorder()
    codel = CoDel(target_s=0.005, interval_s=0.1)
    async with batching(executor, sizes=UpTo(1), codel=codel, clock=clock, observer=seen) as batcher:
        batcher.submit([0], 1, FOREVER)
        await executor.began()
        futures = [batcher.submit([n], 1, FOREVER) for n in range(1, 20)]
        for _ in range(10):
            clock.now += 0.05
            executor.finish()
            await executor.began()
        executor.finish(20)
        await asyncio.wait(futures, timeout=TIMEOUT_S)

    shed = [future for future in futures if isinstance(future.exception(), OverloadedError)]
    assert 2 <= len(shed) < 15
    assert sum(jobs for _, jobs in seen.drops) == len(shed)
    assert {future.exception().reason for future in shed} == {"codel"}
    assert all(future.exception().retry_after_ms for future in shed)


async def test_a_queue_that_each_batch_empties_does_not_stand(executor):
    """However long the batches take: to shed would leave executors idle."""
    clock = Clock()
    codel = CoDel(target_s=0.005, interval_s=0.1)
    async with batching(executor, sizes=UpTo(4), codel=codel, clock=clock) as batcher:
        batcher.submit([0], 1, FOREVER)
        await executor.began()
        futures = []
        for turn in range(6):
            futures += [batcher.submit([turn], 1, FOREVER) for _ in range(4)]
            await asyncio.sleep(0)
            clock.now += 0.1
            executor.finish()
            await executor.began()
        executor.finish()

        assert [await answer(future) for future in futures] == [[2 * turn] for turn in range(6) for _ in range(4)]


async def test_what_expired_while_it_waited_casts_no_doubt_on_the_forecast(executor):
    clock, doubts = Clock(), []

    class Sizes(UpTo):
        def doubt(self, images):
            doubts.append(images)

    async with batching(executor, sizes=Sizes(8), clock=clock) as batcher:
        batcher.submit([0], 1, FOREVER)
        await executor.began()
        late = batcher.submit([1], 1, clock.now + 1)
        clock.now += 2
        executor.finish()
        with pytest.raises(ExpiredError):
            await answer(late)
    assert not doubts


async def test_a_later_part_that_is_quicker_shortens_nothing(executor):
    clock = Clock()
    async with batching(executor, sizes=UpTo(1), clock=clock) as batcher:
        future = batcher.submit([0, 1], 2, FOREVER)
        await executor.began()
        clock.now += 5
        executor.finish()
        await executor.began()
        clock.now += 1
        executor.finish()
        done = await future
    assert (done.queue_s, done.run_s) == (5, 5)
