"""The load generator against a server in the same process."""

import asyncio
import itertools
import statistics
import time

import grpc
import pytest

from service.bench import images
from service.bench.load import OK, Level, Plan, measure, sender
from service.exits import ServerRefusedError, ServerUnreachableError

REQUESTS = images.requests([b"one", b"two", b"three"], 1, "model", None, 5)


def measured(measurement):
    start_s, stop_s = measurement.window_s
    return [sample for sample in measurement.samples if start_s <= sample.intended_s < stop_s]


async def run(target, level, plan, requests=REQUESTS, stopped=None, connections=1):
    async with sender(target, requests, plan.deadline_s, connections) as send:
        return await measure(send, level, plan, stopped or asyncio.Event())


async def test_closed_loop_keeps_as_many_in_flight_as_there_are_callers(target, fake):
    measurement = await run(target, Level("closed", 4), Plan(warmup_s=0, count=240))

    assert fake.most_in_flight == 4
    assert len(measured(measurement)) == 240
    assert {sample.status for sample in measurement.samples} == {OK}
    assert all(sample.sent_s <= sample.ended_s for sample in measurement.samples)


async def test_requests_go_around_in_a_circle(target, fake):
    await run(target, Level("closed", 1), Plan(warmup_s=0, count=6))

    tried, *sent = [request.images[0] for request in fake.requests]
    assert tried == b"one"
    assert sent == [b"one", b"two", b"three"] * 2


async def test_warm_up_is_sent_but_not_counted(target):
    measurement = await run(target, Level("closed", 1), Plan(warmup_s=0.2, count=5))

    assert len(measured(measurement)) == 5
    assert len(measurement.samples) > 5


async def test_duration_ends_a_level(target):
    measurement = await run(target, Level("closed", 2), Plan(warmup_s=0.1, duration_s=0.3))

    start_s, stop_s = measurement.window_s
    assert stop_s - start_s == pytest.approx(0.3, abs=0.01)
    assert max(sample.intended_s for sample in measurement.samples) < stop_s


async def test_open_loop_arrives_at_its_rate_as_a_poisson_process(target):
    measurement = await run(target, Level("open", 400), Plan(warmup_s=0, duration_s=1.5, seed=3))

    times = sorted(sample.intended_s for sample in measurement.samples)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert len(times) == pytest.approx(600, abs=100)  # four standard deviations
    assert statistics.mean(gaps) == pytest.approx(1 / 400, rel=0.17)
    assert statistics.stdev(gaps) == pytest.approx(1 / 400, rel=0.3)  # exponential: as large as the mean


async def test_arrivals_are_the_same_for_the_same_seed(target):
    gaps = []
    for _ in range(2):
        measurement = await run(target, Level("open", 300), Plan(warmup_s=0, count=50, seed=1))
        times = sorted(sample.intended_s for sample in measurement.samples)
        gaps.append([later - times[0] for later in times])

    assert gaps[0] == pytest.approx(gaps[1], abs=1e-6)


async def test_open_loop_does_not_wait_for_answers_and_counts_from_the_intended_time(target, fake):
    """A server that stalls for half a second delays everything meant for that time, by what was left of it."""
    plan = Plan(warmup_s=0, duration_s=0.5, deadline_s=5)
    async with sender(target, REQUESTS, plan.deadline_s) as send:
        fake.gate.clear()
        running = asyncio.create_task(measure(send, Level("open", 200), plan, asyncio.Event()))
        await asyncio.wait([running], timeout=0.6)
        held, opened_s = fake.in_flight, time.monotonic()
        fake.gate.set()
        measurement = await running

    intended_s = [sample.intended_s for sample in measurement.samples]
    # The last few may still have been on their way to a busy server when it was asked.
    assert 60 < 0.8 * len(intended_s) < held <= len(intended_s)
    assert all(sample.ended_s >= opened_s for sample in measurement.samples)
    # However late a busy machine lets them go, they count from when they should have gone: evenly over the half second.
    assert max(intended_s) - min(intended_s) == pytest.approx(0.5, abs=0.1)
    assert statistics.median(intended_s) - min(intended_s) == pytest.approx(0.25, abs=0.08)


@pytest.mark.parametrize("interrupted", [False, True])
async def test_the_time_of_sending_ends_with_the_last_request_and_not_with_its_answer(target, fake, interrupted):
    plan = Plan(warmup_s=0, count=10_000 if interrupted else 100, deadline_s=5, seed=2)
    stopped = asyncio.Event()
    async with sender(target, REQUESTS, plan.deadline_s) as send:
        fake.gate.clear()
        running = asyncio.create_task(measure(send, Level("open", 400), plan, stopped))
        await asyncio.wait([running], timeout=0.5)
        if interrupted:
            stopped.set()
        await asyncio.wait([running], timeout=1)
        fake.gate.set()
        found = await running

    assert found.sending_s == pytest.approx(len(found.samples) / 400, rel=0.5)
    assert found.sending_s < 1


async def test_one_stalled_caller_of_a_closed_loop_sends_nothing_meanwhile(target, fake):
    plan = Plan(warmup_s=0, duration_s=0.3, deadline_s=5)
    async with sender(target, REQUESTS, plan.deadline_s) as send:
        fake.gate.clear()
        running = asyncio.create_task(measure(send, Level("closed", 1), plan, asyncio.Event()))
        await asyncio.wait([running], timeout=0.4)
        fake.gate.set()
        measurement = await running

    assert len(measurement.samples) == 1


async def test_deadline_counts_from_the_intended_time(target, fake):
    async with sender(target, REQUESTS, 0.2) as send:
        fake.gate.clear()
        sample = await send(time.monotonic() - 0.1)
        late = await send(time.monotonic() - 0.3)

    assert sample.status == late.status == "DEADLINE_EXCEEDED"
    assert sample.ended_s - sample.intended_s == pytest.approx(0.2, abs=0.08)
    assert len(fake.requests) == 2  # the trial and one; what is too late already is not sent


async def test_failures_carry_their_status(target, fake):
    async with sender(target, REQUESTS, 1.0) as send:
        fake.status = grpc.StatusCode.UNAVAILABLE
        sample = await send(time.monotonic())

    assert sample.status == "UNAVAILABLE"
    assert sample.images == 0


async def test_answers_carry_images_and_server_times(target, fake):
    fake.bad = 1
    requests = images.requests([b"one", b"two", b"three"], 3, "model", 2, 7)
    async with sender(target, requests, 1.0) as send:
        sample = await send(time.monotonic())

    assert (sample.images, sample.bad_images) == (3, 1)
    assert (sample.queue_us, sample.decode_us, sample.inference_us) == (1000, 2000, 3000)
    sent = fake.requests[-1]
    assert (sent.model, sent.version, sent.top_k, len(sent.images)) == ("model", 2, 7, 3)


async def test_several_connections_are_used(target, fake):
    measurement = await run(target, Level("closed", 4), Plan(warmup_s=0, count=20), connections=3)

    assert len(measurement.samples) == 20


@pytest.mark.parametrize("level", [Level("closed", 3), Level("open", 100)], ids=str)
async def test_stop_ends_a_level_early_and_keeps_what_was_measured(target, level):
    stopped = asyncio.Event()
    plan = Plan(warmup_s=0, duration_s=60)
    async with sender(target, REQUESTS, plan.deadline_s) as send:
        running = asyncio.create_task(measure(send, level, plan, stopped))
        await asyncio.wait([running], timeout=0.3)
        stopped.set()
        measurement = await asyncio.wait_for(running, 5)

    start_s, stop_s = measurement.window_s
    assert 0.25 < stop_s - start_s < 2
    assert measured(measurement)


async def test_stop_during_the_warm_up_leaves_an_empty_window(target):
    stopped = asyncio.Event()
    stopped.set()

    measurement = await run(target, Level("open", 10), Plan(warmup_s=5), stopped=stopped)

    assert measurement.window_s[0] == measurement.window_s[1]


async def test_the_generator_watches_itself(target):
    async with sender(target, REQUESTS, 1.0) as send:

        async def hog(intended_s):
            time.sleep(0.05)  # noqa: ASYNC251 - the stall that has to be noticed
            return await send(intended_s)

        measurement = await measure(hog, Level("closed", 1), Plan(warmup_s=0, duration_s=0.3), asyncio.Event())

    assert max(measurement.lag_s) > 0.02
    assert 0 < measurement.cpu_share < 1.5


async def test_a_refusal_that_more_requests_would_not_change_is_told_at_once(target, fake):
    fake.status = grpc.StatusCode.NOT_FOUND

    with pytest.raises(ServerRefusedError, match="NOT_FOUND: as the test wants it"):
        await run(target, Level("closed", 1), Plan(count=1))
    assert len(fake.requests) == 1


async def test_an_overloaded_server_is_measured_all_the_same(target, fake):
    fake.status = grpc.StatusCode.UNAVAILABLE

    measurement = await run(target, Level("closed", 1), Plan(warmup_s=0, count=3))

    assert [sample.status for sample in measurement.samples] == ["UNAVAILABLE"] * 3


async def test_no_server_is_one_clear_sentence(unused_tcp_port):
    with pytest.raises(ServerUnreachableError, match="convoy serve"):
        async with sender(f"127.0.0.1:{unused_tcp_port}", REQUESTS, 1.0, connect_timeout_s=0.3):
            pass
