"""A state machine over a real batcher: each request has exactly one outcome, from its own images, whatever happens."""

import asyncio
import queue

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from service.batcher import Batcher, OneByOne
from service.errors import DrainingError, EngineError, ExpiredError

LARGEST = 4
FEW = 3  # submissions before the batcher may be closed
PICK = st.integers(0, 999)
BOUND_S = 10  # nothing may take longer than this of real time


class UpTo(OneByOne):
    largest = LARGEST

    def best_batch(self, waiting):
        return min(waiting, LARGEST)


class Batch:
    """One call of `run`: what it was given, and the order that lets it end."""

    def __init__(self, parts, now):
        self.images = [image for part in parts for image in part.job.payload[part.start : part.stop]]
        self.sizes = [part.stop - part.start for part in parts]
        self.owners = [part.job for part in parts]
        self.dead = [job for job in self.owners if job.abandoned or job.deadline < now]
        self.order = queue.Queue()

    def run(self):
        error = self.order.get(timeout=BOUND_S)
        if error is not None:
            raise error
        images = iter(self.images)
        return [[("answer", *next(images)) for _ in range(size)] for size in self.sizes]


class BatcherMachine(RuleBasedStateMachine):
    """Requests are numbered; image `i` of request `n` is (n, i), and its answer is ("answer", n, i)."""

    @initialize(executors=st.integers(1, 3))
    def start(self, executors):
        self.loop = asyncio.new_event_loop()
        self.now = 1000.0
        self.executors = executors
        self.closing = None
        self.batches = []  # everything that ever ran
        self.running = []  # batches that a test holds
        self.futures = []
        self.sizes = []
        self.outcomes = []
        self.ran = {}
        self.failed = 0
        self.happened = asyncio.Event()
        self.batcher = Batcher(
            [self.run_batch] * executors, sizes=UpTo(), name="machine", observer=self, clock=lambda: self.now
        )
        self.within_bound(self.begin())

    async def begin(self):
        self.batcher.start()

    # --- what the batcher calls

    def run_batch(self, parts):
        batch = Batch(parts, self.now)
        self.loop.call_soon_threadsafe(self.note, batch)
        return batch.run()

    def note(self, batch):
        self.batches.append(batch)
        self.running.append(batch)
        self.happened.set()

    def batch(self, images, run_s):
        self.loop.call_soon_threadsafe(self.happened.set)

    def dropped(self, reason, jobs):
        self.happened.set()

    def late(self, jobs):
        self.happened.set()

    # --- what happens

    # The threads decide which batch ends up where, so what is drawn must not depend on the state: no preconditions,
    # and picks that are taken modulo what there is.

    @rule(
        size=st.integers(1, 11),
        patience=st.sampled_from([-1.0, 0.0, 1.0, 5.0, 1e9]),
        flow=st.sampled_from("ab"),
        priority=st.integers(0, 1),
    )
    def submit(self, size, patience, flow, priority):
        if self.closing is not None:
            return
        number = len(self.futures)
        images = [(number, image) for image in range(size)]

        async def submit():
            return self.batcher.submit(images, size, self.now + patience, flow=flow, priority=priority)

        future = self.within_bound(submit())
        future.add_done_callback(lambda _: self.outcomes.append(number))
        self.futures.append(future)
        self.sizes.append(size)
        self.settle()

    @rule(pick=PICK)
    def cancel(self, pick):
        open_ones = [future for future in self.futures if not future.done()]
        if open_ones:
            open_ones[pick % len(open_ones)].cancel()
            self.settle()

    @rule(seconds=st.sampled_from([0.5, 1.0, 3.0, 10.0]))
    def time_passes(self, seconds):
        self.now += seconds
        self.settle()

    @rule(pick=PICK)
    def finish(self, pick):
        if self.running:
            self.running.pop(pick % len(self.running)).order.put(None)
            self.settle()

    @rule(pick=PICK, error=st.sampled_from([EngineError("broken"), KeyError("x"), BaseException("panic")]))
    def fail(self, pick, error):
        if self.running:
            self.failed += 1
            self.running.pop(pick % len(self.running)).order.put(error)
            self.settle()

    @rule()
    def close(self):
        if self.closing is not None or len(self.futures) <= FEW:
            return

        async def close():
            self.closing = asyncio.create_task(self.batcher.close())
            await asyncio.sleep(0)

        self.within_bound(close())
        self.settle()

    # --- what holds

    @invariant()
    def nothing_dead_was_batched(self):
        assert not [job for batch in self.batches for job in batch.dead]

    @invariant()
    def no_image_ran_twice(self):
        images = [image for batch in self.batches for image in batch.images]
        assert len(images) == len(set(images))

    @invariant()
    def batches_are_bounded(self):
        assert all(1 <= len(batch.images) <= LARGEST for batch in self.batches)
        assert len(self.running) <= self.executors

    @invariant()
    def counts_are_those_of_what_runs(self):
        assert self.batcher.running_images == sum(len(batch.images) for batch in self.running)
        assert self.batcher.queued_images == 0 or len(self.running) == self.executors

    @invariant()
    def each_request_has_at_most_one_outcome(self):
        assert len(self.outcomes) == len(set(self.outcomes))

    def teardown(self):
        """Everything ends once the executors run, and then N in is N out."""
        for batch in self.running:
            batch.order.put(None)
        self.running.clear()
        self.settle()
        while self.running:
            self.running.pop().order.put(None)
            self.settle()
        assert (self.batcher.queued_images, self.batcher.running_images) == (0, 0)
        if self.futures:
            self.within_bound(asyncio.wait(self.futures))
        if self.closing is None:
            self.closing = self.loop.create_task(self.batcher.close())
        self.within_bound(self.closing)
        for number, future in enumerate(self.futures):
            self.check_outcome(number, future)
        assert sorted(self.outcomes) == list(range(len(self.futures)))
        self.loop.close()

    def check_outcome(self, number, future):
        if future.cancelled():
            return
        error = future.exception()
        if error is None:
            found = future.result().rejoined(lambda parts: [answer for part in parts for answer in part])
            assert found == [("answer", number, image) for image in range(self.sizes[number])]
        else:
            assert isinstance(error, (ExpiredError, DrainingError, EngineError))
            assert self.failed or not isinstance(error, EngineError)

    # --- waiting

    def within_bound(self, awaitable):
        async def bounded():
            async with asyncio.timeout(BOUND_S):
                return await awaitable

        return self.loop.run_until_complete(bounded())

    def settle(self):
        """Lets the batcher do what it can without the machine: afterwards free executors mean an empty queue."""

        async def settled():
            while self.batcher.running_images != sum(len(batch.images) for batch in self.running) or (
                self.batcher.queued_images and len(self.running) < self.executors
            ):
                await self.happened.wait()
                self.happened.clear()
            await asyncio.sleep(0)

        self.within_bound(settled())


BatcherMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestBatcher = BatcherMachine.TestCase
