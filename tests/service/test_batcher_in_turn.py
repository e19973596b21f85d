"""Batches of tiny models: run on the event loop, once a turn, with the same promises."""

import asyncio
import threading

import pytest

from service.batcher import Batcher
from service.errors import DrainingError, EngineError, ExpiredError
from service.latency import LatencyTable

FOREVER = float("inf")


class Doubler:
    """Doubles numbers; remembers its batches and the threads it ran on."""

    def __init__(self):
        self.batches = []
        self.threads = set()
        self.error = None

    def run(self, parts):
        self.threads.add(threading.get_ident())
        self.batches.append([n for part in parts for n in part.job.payload[part.start : part.stop]])
        if self.error is not None:
            raise self.error
        return [[2 * n for n in part.job.payload[part.start : part.stop]] for part in parts]


class AsTheyCome(LatencyTable):
    """Whatever is known, as many as there are."""

    def best_batch(self, waiting):
        return min(waiting, self.largest)


@pytest.fixture
def doubler():
    return Doubler()


@pytest.fixture
async def batcher(doubler):
    """Of one executor, so that everything runs on the loop."""
    made = Batcher([doubler.run], sizes=LatencyTable((1, 2, 4)), name="tiny", in_turn=1)
    made.start()
    yield made
    await made.close()


def answer(job):
    return job.rejoined(lambda parts: [n for part in parts for n in part])


async def test_what_one_turn_submits_runs_together_on_the_loops_thread(batcher, doubler):
    futures = [batcher.submit([n], 1, FOREVER) for n in range(4)]
    jobs = await asyncio.gather(*futures)
    assert [answer(job) for job in jobs] == [[0], [2], [4], [6]]
    assert doubler.batches == [[0, 1, 2, 3]]
    assert doubler.threads == {threading.get_ident()}
    assert batcher.queued_images == batcher.running_images == 0


async def test_more_than_a_batch_takes_several_turns_and_lets_others_in_between(batcher, doubler):
    turns = []

    async def other():
        for _ in range(20):
            turns.append(len(doubler.batches))
            await asyncio.sleep(0)

    beside = asyncio.create_task(other())
    job = await batcher.submit(list(range(11)), 11, FOREVER)
    await beside
    assert answer(job) == [2 * n for n in range(11)]
    assert [n for batch in doubler.batches for n in batch] == list(range(11))
    assert max(map(len, doubler.batches)) == 4
    assert len(set(turns)) > 2  # the other task ran between two batches


async def test_a_failure_is_that_batchs_alone(batcher, doubler):
    doubler.error = KeyError("broken")
    with pytest.raises(EngineError, match="broken"):
        await batcher.submit([1], 1, FOREVER)
    doubler.error = None
    assert answer(await batcher.submit([2], 1, FOREVER)) == [4]


async def test_the_cancelled_and_the_expired_do_not_run(batcher, doubler):
    cancelled, expired, good = (
        batcher.submit([n], 1, deadline) for n, deadline in ((1, FOREVER), (2, 0), (3, FOREVER))
    )
    cancelled.cancel()
    assert answer(await good) == [6]
    with pytest.raises(ExpiredError):
        await expired
    assert doubler.batches == [[3]]


async def test_closing_fails_what_waits(batcher, doubler):
    waiting = batcher.submit([1], 1, FOREVER)
    await batcher.close()
    with pytest.raises(DrainingError):
        await waiting
    await asyncio.sleep(0)
    assert doubler.batches == []


async def test_larger_batches_run_on_the_threads_of_the_other_executors(doubler):
    both = Batcher([doubler.run, doubler.run], sizes=AsTheyCome((1, 2, 4)), name="tiny", in_turn=2)
    both.start()
    small = await asyncio.gather(*(both.submit([n], 1, FOREVER) for n in range(2)))
    here = set(doubler.threads)
    large = await both.submit([1, 2, 3, 4], 4, FOREVER)
    await both.close()

    assert [answer(job) for job in (*small, large)] == [[0], [2], [2, 4, 6, 8]]
    assert doubler.batches == [[0, 1], [1, 2, 3, 4]]
    assert here == {threading.get_ident()}
    assert len(doubler.threads) == 2


async def test_the_loops_executor_belongs_to_the_loop_alone():
    """An engine has one buffer: run by two threads, it would answer one caller with another one's image."""
    loops, threads_ = Doubler(), Doubler()
    both = Batcher([loops.run, threads_.run], sizes=AsTheyCome((1, 2, 4)), name="tiny", in_turn=2)
    both.start()
    await both.submit([1], 1, FOREVER)
    await both.submit([1, 2, 3, 4], 4, FOREVER)
    await both.close()

    assert loops.threads == {threading.get_ident()}
    assert threads_.threads.isdisjoint(loops.threads)
    assert (loops.batches, threads_.batches) == ([[1]], [[1, 2, 3, 4]])
