"""Order within a flow, fairness between flows, and what is dropped on the way."""

import weakref
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.schedule import FairQueue

FOREVER = float("inf")


@dataclass(eq=False)
class Job:
    size: int = 1
    deadline: float = FOREVER
    priority: int = 0
    abandoned: bool = False
    name: str = ""


def queue_of(*jobs, flow=None):
    queue = FairQueue()
    for job in jobs:
        queue.push(job, flow)
    return queue


def names(taken):
    return [part.job.name for part in taken.parts]


def test_the_earliest_deadline_goes_first():
    queue = queue_of(Job(deadline=3, name="c"), Job(deadline=1, name="a"), Job(deadline=2, name="b"))

    assert names(queue.take(3, horizon=0)) == ["a", "b", "c"]


def test_a_more_urgent_priority_goes_before_an_earlier_deadline():
    queue = queue_of(Job(deadline=1, priority=1, name="later"), Job(deadline=9, priority=0, name="sooner"))

    assert names(queue.take(2, horizon=0)) == ["sooner", "later"]


def test_equals_keep_the_order_in_which_they_came():
    queue = queue_of(*(Job(deadline=5, name=str(n)) for n in range(20)))

    assert names(queue.take(20, horizon=0)) == [str(n) for n in range(20)]


def test_a_job_that_does_not_fit_is_taken_in_parts():
    queue = queue_of(Job(size=10, name="big"))

    parts = [(part.start, part.stop) for _ in range(3) for part in queue.take(4, horizon=0).parts]

    assert parts == [(0, 4), (4, 8), (8, 10)]
    assert (queue.images, len(queue)) == (0, 0)


def test_the_rest_of_a_split_job_shares_the_next_batch():
    queue = queue_of(Job(size=6, deadline=1, name="big"), Job(size=3, deadline=2, name="small"))

    first, second = queue.take(4, horizon=0), queue.take(4, horizon=0)

    assert [(p.job.name, p.start, p.stop) for p in first.parts] == [("big", 0, 4)]
    assert [(p.job.name, p.start, p.stop) for p in second.parts] == [("big", 4, 6), ("small", 0, 2)]


def test_what_cannot_be_done_by_its_deadline_is_taken_out_unserved():
    late, in_time = Job(size=2, deadline=5, name="late"), Job(deadline=10, name="in time")

    taken = queue_of(late, in_time).take(8, horizon=7)

    assert taken.expired == [late]
    assert names(taken) == ["in time"]


def test_a_deadline_exactly_at_the_horizon_is_kept():
    assert names(queue_of(Job(deadline=7, name="just")).take(1, horizon=7)) == ["just"]


def test_the_rest_of_a_split_job_that_expires_is_counted_out():
    queue = queue_of(Job(size=6, deadline=5))
    queue.take(4, horizon=0)

    taken = queue.take(4, horizon=6)

    assert len(taken.expired) == 1
    assert queue.images == 0


def test_abandoned_work_is_skipped_and_reported():
    gone = Job(size=3, abandoned=True)
    queue = queue_of(gone, Job(name="here"))

    taken = queue.take(1, horizon=0)

    assert taken.abandoned == [gone]
    assert names(taken) == ["here"]
    assert queue.images == 0


def test_what_the_shedder_picks_is_taken_out_unserved():
    queue = queue_of(*(Job(deadline=n, name=str(n)) for n in range(4)))

    taken = queue.take(4, 0, lambda job: job.name in {"1", "2"})

    assert [job.name for job in taken.shed] == ["1", "2"]
    assert names(taken) == ["0", "3"]


def test_a_job_that_has_begun_is_never_shed():
    queue = queue_of(Job(size=8, name="big"))
    queue.take(4, 0, lambda _: False)

    assert names(queue.take(4, 0, lambda _: True)) == ["big"]


def test_drain_hands_out_everything_once_even_what_has_begun():
    jobs = [Job(size=6), Job(), Job()]
    queue = FairQueue()
    for number, job in enumerate(jobs):
        queue.push(job, flow=number % 2)
    queue.take(2, horizon=0)

    assert set(map(id, queue.drain())) == set(map(id, jobs))
    assert (queue.images, len(queue), queue.drain()) == (0, 0, [])


def test_iteration_shows_what_waits_and_takes_nothing():
    queue = queue_of(Job(name="a"), Job(name="b"))

    assert {job.name for job in queue} == {"a", "b"}
    assert len(queue) == 2


def test_what_is_discarded_is_gone_at_once_and_never_comes_out():
    queue = FairQueue()
    gone = Job(size=5, deadline=1)
    number = queue.push(gone, "a")
    queue.push(Job(size=2, name="stays"), "a")
    gone = weakref.ref(gone)

    assert queue.discard(number)
    assert gone() is None
    assert (queue.images, len(queue)) == (2, 1)
    assert not queue.discard(number)
    assert names(queue.take(8, horizon=0)) == ["stays"]
    assert (queue.images, len(queue)) == (0, 0)


def test_what_has_begun_is_not_discarded():
    queue = FairQueue()
    number = queue.push(Job(size=8, name="begun"))
    queue.take(4, horizon=0)

    assert not queue.discard(number)
    assert queue.images == 4
    assert names(queue.take(8, horizon=0)) == ["begun"]
    assert not queue.discard(number)


@pytest.mark.parametrize("waits", [0, 1, 40])
def test_many_that_are_discarded_leave_the_order_of_the_others(waits):
    queue = FairQueue()
    stay = [Job(deadline=n, name=str(n)) for n in range(waits)]
    numbers = []
    for n in range(500):
        numbers.append(queue.push(Job(deadline=n % 50), n % 3))
        if n < waits:
            queue.push(stay[n], "others")

    assert all(queue.discard(number) for number in numbers)
    assert (queue.images, len(queue)) == (waits, waits)
    assert names(queue.take(1000, horizon=0)) == [job.name for job in stay]


def test_background_work_waits_for_the_callers_of_every_flow():
    queue = FairQueue()
    for _ in range(4):
        queue.push(Job(priority=1, name="background"), "a")
        queue.push(Job(priority=1000, name="shadow"), "a")
        queue.push(Job(priority=0, name="b"), "b")
        queue.push(Job(priority=-1, name="c"), "c")

    served = [name for _ in range(16) for name in names(queue.take(1, horizon=0))]

    assert sorted(served[:8]) == ["b"] * 4 + ["c"] * 4
    assert served[8:] == ["background"] * 4 + ["shadow"] * 4


def test_background_work_earns_its_flow_no_credit():
    queue = FairQueue()
    queue.push(Job(size=8, priority=1, name="background"), "a")
    for _ in range(50):
        queue.push(Job(size=8, name="steady"), "b")
    for _ in range(20):
        queue.take(8, horizon=0)
    for _ in range(30):
        queue.push(Job(size=8, name="newcomer"), "a")

    served = [name for _ in range(20) for name in names(queue.take(8, horizon=0))]

    assert 9 <= served.count("newcomer") <= 11


def test_a_flood_of_one_flow_does_not_delay_the_other():
    queue = FairQueue()
    for n in range(100):
        queue.push(Job(size=8, deadline=n, name="flood"), "a")
    queue.push(Job(size=8, deadline=1000, name="single"), "b")

    assert "single" in [name for _ in range(2) for name in names(queue.take(8, horizon=0))]


def test_a_caller_with_one_request_at_a_time_does_not_starve_a_backlog():
    """Its flow is empty after each answer, and comes back before the next batch: it still was given its turns."""
    queue = queue_of(*(Job(size=8, name="backlog") for _ in range(50)), flow="b")
    queue.push(Job(size=8, name="one at a time"), "a")
    served = []
    for _ in range(40):
        served += names(queue.take(8, horizon=0))
        if served[-1] == "one at a time":
            queue.push(Job(size=8, name="one at a time"), "a")

    assert 19 <= served.count("backlog") <= 21


def test_idling_earns_no_credit():
    queue = FairQueue()
    for _ in range(100):
        queue.push(Job(size=8, name="steady"), "a")
    for _ in range(50):
        queue.take(8, horizon=0)
    for _ in range(50):
        queue.push(Job(size=8, name="newcomer"), "b")

    served = [name for _ in range(20) for name in names(queue.take(8, horizon=0))]

    assert 9 <= served.count("newcomer") <= 11


@given(
    flows=st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=30), min_size=2, max_size=4),
    batch=st.integers(1, 16),
)
def test_no_backlogged_flow_gets_more_than_its_share_by_more_than_one_batch(flows, batch):
    queue = FairQueue()
    for flow, sizes in enumerate(flows):
        for size in sizes:
            queue.push(Job(size=size, name=str(flow)), flow)
    left = [sum(sizes) for sizes in flows]
    served = [0] * len(flows)
    while all(left):
        for part in queue.take(batch, horizon=0).parts:
            served[int(part.job.name)] += part.stop - part.start
            left[int(part.job.name)] -= part.stop - part.start
        assert not all(left) or max(served) - min(served) <= batch


@given(
    jobs=st.lists(
        st.tuples(st.integers(1, 30), st.integers(0, 20), st.integers(0, 2), st.booleans(), st.sampled_from("abc")),
        max_size=40,
    ),
    batch=st.integers(1, 16),
    horizon=st.integers(0, 20),
)
def test_every_image_comes_out_exactly_once_or_its_job_is_reported(jobs, batch, horizon):
    queue = FairQueue()
    made = []
    for size, deadline, priority, abandoned, flow in jobs:
        made.append(Job(size, deadline, priority, abandoned))
        queue.push(made[-1], flow)
    given_out = {id(job): [] for job in made}
    reported = []
    while len(queue):
        waiting = queue.images
        taken = queue.take(batch, horizon)
        dropped = [*taken.expired, *taken.abandoned]
        reported += dropped
        assert taken.images <= batch
        assert queue.images == waiting - taken.images - sum(job.size for job in dropped)
        for part in taken.parts:
            given_out[id(part.job)].append((part.start, part.stop))

    assert queue.images == 0
    for job in made:
        images = [n for start, stop in given_out[id(job)] for n in range(start, stop)]
        dead = job.abandoned or job.deadline < horizon
        assert images == ([] if dead else list(range(job.size)))
        assert sum(other is job for other in reported) == dead


@given(deadlines=st.lists(st.integers(0, 9), min_size=65, max_size=80), seed=st.randoms())
def test_whatever_is_discarded_the_earliest_of_the_others_goes_first(deadlines, seed):
    queue = FairQueue()
    numbers = {queue.push(job): job for job in (Job(deadline=d, name=str(i)) for i, d in enumerate(deadlines))}
    for number in seed.sample(sorted(numbers), 50):
        queue.discard(number)
        del numbers[number]
    taken = [part.job.deadline for part in queue.take(100, horizon=-1).parts]
    assert taken == sorted(job.deadline for job in numbers.values())


def test_who_was_ahead_and_comes_back_long_after_has_no_credit():
    queue = FairQueue()
    for _ in range(200):
        queue.push(Job(name="b"), "b")
    for _ in range(10):
        queue.push(Job(name="a"), "a")
    queue.take(100, horizon=0)
    for _ in range(50):
        queue.push(Job(name="a"), "a")

    assert 9 <= names(queue.take(20, horizon=0)).count("a") <= 11


def test_who_was_ahead_is_not_made_to_wait_once_the_queue_was_empty():
    queue = FairQueue()
    queue.push(Job(size=50, name="a"), "a")
    for _ in range(2):
        queue.push(Job(name="b"), "b")
    queue.take(100, horizon=0)
    for flow in ("a", "b") * 20:
        queue.push(Job(name=flow), flow)

    assert 9 <= names(queue.take(20, horizon=0)).count("a") <= 11
