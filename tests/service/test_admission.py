"""What may enter, exact counters on every way out, and forecasts that recover from being wrong."""

import asyncio
from contextlib import ExitStack, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.admission import Admission
from service.errors import DrainingError, ExpiredError, OverloadedError

FOREVER = float("inf")


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


class House(Admission):
    """Remembers its guests: a context that nobody holds would end by itself."""

    def __init__(self, clock):
        super().__init__(max_images=100, max_bytes=1000, clock=clock)
        self.guests = []


@pytest.fixture
def admission(clock):
    return House(clock)


def hold(admission, images, nbytes=0, flow="a", deadline=FOREVER, usable=None, priority=0):
    """Admits a request that stays in the house; `close()` lets it out, its (usable) images being answered."""
    stack = ExitStack()
    place = stack.enter_context(admission.admit(flow, images, nbytes, deadline, priority))

    def answer(failure, *_):
        place.answered = 0 if failure else images if usable is None else usable

    stack.push(answer)
    admission.guests.append(stack)
    return stack


def fill(admission, flow, images=1, nbytes=0):
    """Admits requests of a flow until one is refused; how many got in."""
    count = 0
    try:
        while True:
            hold(admission, images, nbytes, flow)
            count += 1
    except OverloadedError:
        return count


def answer_backlog(admission, clock, seconds_per_image, count=20, flow="a"):
    """Lets requests out one after the other while more wait, each taking so long."""
    held = [hold(admission, 1, flow=flow) for _ in range(count)]
    for request in held:
        clock.now += seconds_per_image
        request.close()


def test_what_is_held_is_counted_and_given_back(admission):
    request = hold(admission, 3, 70)
    assert (admission.images, admission.bytes) == (3, 70)
    request.close()

    assert (admission.images, admission.bytes) == (0, 0)


def test_a_single_request_may_fill_the_whole_house(admission):
    hold(admission, 100, 1000)

    assert (admission.images, admission.bytes) == (100, 1000)


@pytest.mark.parametrize(("images", "nbytes", "reason"), [(101, 0, "images"), (1, 1001, "bytes")])
def test_what_is_beyond_a_bound_is_refused_and_says_which(admission, images, nbytes, reason):
    with pytest.raises(OverloadedError) as caught:
        hold(admission, images, nbytes)

    assert (caught.value.reason, caught.value.retry_after_ms > 0) == (reason, True)
    assert (admission.images, admission.bytes) == (0, 0)


@pytest.mark.parametrize(
    ("images", "nbytes", "text"),
    [
        (20, 0, "40 of this model's images are pending, and it may hold no more than what is free, now 50"),
        (1, 200, "400 of this model's bytes are pending, and it may hold no more than what is free, now 500"),
        (60, 0, "50 images are pending, of at most 100"),
        (1, 600, "500 bytes are pending, of at most 1000"),
    ],
)
def test_a_refusal_names_the_bound_that_was_met(admission, images, nbytes, text):
    hold(admission, 40, 400, flow="a")
    hold(admission, 10, 100, flow="b")
    with pytest.raises(OverloadedError, match=text):
        hold(admission, images, nbytes, flow="a")


@pytest.mark.parametrize("weights", [(1, 0), (0, 10)])
def test_two_floods_leave_room_for_a_third(admission, weights):
    """Each flow may hold as much as is free: half, then two thirds, then three quarters of the house."""
    images, nbytes = weights[0] or 1, weights[1]
    room = 100

    first = fill(admission, "a", images, nbytes)
    second = fill(admission, "b", images, nbytes)
    third = fill(admission, "c", images, nbytes)

    assert first == room // 2
    assert 20 <= second <= room // 3
    assert third >= 10
    assert first + second + third < room


def test_a_flow_that_drained_finds_its_room_again(admission):
    floods = [hold(admission, 50, flow="a"), hold(admission, 25, flow="b")]
    with pytest.raises(OverloadedError):
        hold(admission, 30, flow="a")
    for flood in floods:
        flood.close()

    assert fill(admission, "a") == 50


def test_a_refusal_takes_nothing_from_what_is_held(admission):
    hold(admission, 60, 100)
    for _ in range(5):
        with pytest.raises(OverloadedError):
            hold(admission, 60, 100)

    assert (admission.images, admission.bytes) == (60, 100)


@pytest.mark.parametrize("error", [ValueError("x"), asyncio.CancelledError(), KeyboardInterrupt()])
def test_any_way_out_gives_the_place_back(admission, error):
    with pytest.raises(type(error)), admission.admit("a", 3, 70, FOREVER):
        raise error

    assert (admission.images, admission.bytes) == (0, 0)


async def test_cancelled_callers_leave_exact_counters(admission):
    async def request(number):
        with admission.admit(number % 3, 1 + number % 2, number, FOREVER):
            await asyncio.Event().wait()

    tasks = [asyncio.create_task(request(number)) for number in range(12)]
    await asyncio.sleep(0)
    assert (admission.images, admission.bytes) == (18, 66)
    for number in range(0, 12, 2):
        tasks[number].cancel()
    await asyncio.wait(tasks[::2])
    assert (admission.images, admission.bytes) == (12, 36)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)

    assert (admission.images, admission.bytes) == (0, 0)


def test_draining_refuses_what_is_new_and_keeps_what_is_in(admission):
    request = hold(admission, 1)
    admission.drain()
    with pytest.raises(DrainingError):
        hold(admission, 1)
    assert admission.images == 1
    request.close()

    assert admission.images == 0


def test_a_deadline_that_has_passed_is_an_expiry_and_no_overload(admission, clock):
    with pytest.raises(ExpiredError):
        hold(admission, 1, deadline=clock.now)

    assert admission.images == 0


def test_without_experience_nothing_is_forecast(admission, clock):
    hold(admission, 40)

    assert admission.forecast_s("a", 1) == 0.0
    hold(admission, 1, deadline=clock.now + 1e-6)


def test_what_cannot_be_answered_in_time_is_refused_and_told_when_to_come_back(admission, clock):
    answer_backlog(admission, clock, seconds_per_image=0.1)
    hold(admission, 9)
    assert admission.forecast_s("a", 1) == pytest.approx(1.0, rel=0.05)

    with pytest.raises(OverloadedError) as caught:
        hold(admission, 1, deadline=clock.now + 0.9)
    hold(admission, 1, deadline=clock.now + 2)

    assert caught.value.reason == "deadline"
    assert 100 < caught.value.retry_after_ms < 1000


def test_what_no_flow_could_take_is_refused_unseen(admission, clock):
    answer_backlog(admission, clock, 0.01)
    hold(admission, 10)
    before = (admission.images, admission.bytes)

    assert isinstance(admission.refusal(["a"], clock.now + 0.1), OverloadedError)
    assert admission.refusal(["a"], clock.now + 0.2) is None
    assert isinstance(admission.refusal(["a"], clock.now - 0.1), ExpiredError)
    assert (admission.images, admission.bytes) == before


def test_nothing_is_refused_unseen_that_another_flow_might_take(admission, clock):
    answer_backlog(admission, clock, 0.01)
    hold(admission, 10)

    assert admission.refusal(["a", "b"], clock.now + 0.1) is None
    assert admission.refusal([], clock.now + 0.1) is None


def test_a_full_house_refuses_unseen_whatever_the_flow(admission):
    hold(admission, 100)

    assert "images are pending" in str(admission.refusal(["a", "b"], FOREVER))


def test_a_forecast_is_of_the_own_flow(admission, clock):
    answer_backlog(admission, clock, seconds_per_image=0.1)
    hold(admission, 20, flow="a")

    hold(admission, 1, flow="b", deadline=clock.now + 0.01)


def test_an_empty_house_forecasts_nothing(admission, clock):
    answer_backlog(admission, clock, seconds_per_image=0.1)

    assert admission.forecast_s("a", 50) == 0.0


def test_stretches_without_a_backlog_are_no_measure_of_the_pace(admission, clock):
    answer_backlog(admission, clock, seconds_per_image=0.01)
    for _ in range(50):
        request = hold(admission, 1)
        clock.now += 0.01
        request.close()
        clock.now += 10
    hold(admission, 9)

    assert admission.forecast_s("a", 1) == pytest.approx(0.1, rel=0.1)


def test_a_change_of_pace_is_learned(admission, clock):
    answer_backlog(admission, clock, seconds_per_image=0.01, count=40)
    for _ in range(6):
        answer_backlog(admission, clock, seconds_per_image=0.1, count=20)
    hold(admission, 9)

    assert admission.forecast_s("a", 1) == pytest.approx(1.0, rel=0.1)


def test_failures_do_not_make_the_pace_look_faster(admission, clock):
    answer_backlog(admission, clock, seconds_per_image=0.1)
    held = [hold(admission, 1) for _ in range(40)]
    for number, request in enumerate(held):
        clock.now += 0.05
        if number % 2:
            request.close()
        else:
            request.__exit__(TimeoutError, TimeoutError(), None)
    hold(admission, 9)

    assert admission.forecast_s("a", 1) == pytest.approx(1.0, rel=0.15)


@pytest.mark.parametrize("usable", [0, 1, 63])
def test_images_that_cannot_be_used_do_not_make_the_pace_look_faster(admission, clock, usable):
    answer_backlog(admission, clock, seconds_per_image=0.1)
    request = hold(admission, 64, usable=usable)
    clock.now += 0.0001
    request.close()
    hold(admission, 9)

    assert admission.forecast_s("a", 1) == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("known", [True, False])
def test_a_stretch_of_failures_alone_ends_no_request_in_another_way_and_spoils_no_pace(admission, clock, known):
    if known:
        answer_backlog(admission, clock, seconds_per_image=0.01)
    held = [hold(admission, 1) for _ in range(20)]
    clock.now += 0.01
    held[0].close()  # begins a stretch
    for request in held[1:10]:
        clock.now += 1.0
        request.__exit__(ExpiredError, ExpiredError("too late"), None)
    assert admission.images == 10
    clock.now += 0.01
    held[10].close()

    if known:
        assert admission.forecast_s("a", 1) < 0.2


def test_a_pace_spoilt_by_a_pause_recovers_even_if_it_refuses_all_company(admission, clock):
    """While the forecast refuses every second request there is no backlog to measure; the first ones must teach it."""
    answer_backlog(admission, clock, seconds_per_image=0.01)
    answer_backlog(admission, clock, seconds_per_image=100.0, count=30)
    first = hold(admission, 1, deadline=clock.now + 1)
    with pytest.raises(OverloadedError):
        hold(admission, 1, deadline=clock.now + 1)
    clock.now += 0.02
    first.close()

    hold(admission, 1, deadline=clock.now + 1)
    hold(admission, 1, deadline=clock.now + 1)


@given(
    steps=st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 60), st.integers(0, 600), st.booleans()), max_size=60
    )
)
def test_counters_are_the_sum_of_what_is_held_and_never_beyond_the_bounds(steps):
    admission = House(Clock())
    held = []
    for flow, images, nbytes, leave in steps:
        if leave and held:
            held.pop(images % len(held))[0].close()
        else:
            with suppress(OverloadedError):
                held.append((hold(admission, images, nbytes, flow), images, nbytes))
        assert admission.images == sum(images for _, images, _ in held) <= 100
        assert admission.bytes == sum(nbytes for _, _, nbytes in held) <= 1000


HIGH, NORMAL, LOW = -1, 0, 1


@pytest.mark.parametrize(("held", "comes"), [(LOW, NORMAL), (LOW, HIGH), (NORMAL, HIGH)])
def test_what_is_overtaken_delays_nobody(admission, clock, held, comes):
    answer_backlog(admission, clock, 0.1)
    hold(admission, 20, priority=held)
    with pytest.raises(OverloadedError, match="about 2100 ms"):
        hold(admission, 1, deadline=clock.now + 1, priority=held)

    hold(admission, 5, deadline=clock.now + 1, priority=comes)
    assert admission.forecast_s("a", 1, comes) == pytest.approx(0.6)
    assert admission.forecast_s("a", 1, held) == pytest.approx(2.6)


def test_what_left_is_ahead_of_nobody(admission, clock):
    answer_backlog(admission, clock, 0.1)
    hold(admission, 1, priority=LOW)
    hold(admission, 20, priority=HIGH).close()

    assert admission.forecast_s("a", 1, HIGH) == 0
    assert admission.forecast_s("a", 1, LOW) == pytest.approx(0.2)


def test_a_flood_that_may_wait_leaves_room_for_what_may_not(admission):
    with suppress(OverloadedError):
        while True:
            hold(admission, 1, 10, priority=LOW)
    assert (admission.images, admission.bytes) == (33, 330)
    with pytest.raises(
        OverloadedError, match=r"33 of this model's images are pending.*no more than 0\.5 of what is free"
    ):
        hold(admission, 1, 10, priority=LOW)

    assert fill(admission, "a", 1, 10) == 17  # to the half of all


def begins(admission, clock, seconds, count):
    """How many calls that begin now, with so many seconds, may send their message."""
    return sum(admission.refusal(["a"], clock.now + seconds) is None for _ in range(count))


def test_of_calls_that_look_too_late_some_may_show_that_they_are_urgent(admission, clock):
    answer_backlog(admission, clock, 0.1)
    hold(admission, 20)
    assert begins(admission, clock, 1, 160) == 10
    hold(admission, 1, deadline=clock.now + 1, priority=HIGH)
    assert begins(admission, clock, 1, 160) == 160
    clock.now += 61
    assert begins(admission, clock, 1, 160) == 10


def test_urgent_calls_are_refused_as_they_begin_for_what_is_as_urgent(admission, clock):
    answer_backlog(admission, clock, 0.1)
    hold(admission, 20, priority=HIGH)

    assert begins(admission, clock, 1, 160) == 0


def test_where_there_is_no_room_no_call_may_send_its_message(admission, clock):
    hold(admission, 100)

    assert begins(admission, clock, 60, 160) == 0


def test_a_flow_may_hold_just_as_much_as_is_left_free(admission):
    hold(admission, 40)
    hold(admission, 20)
    with pytest.raises(OverloadedError):
        hold(admission, 1)


def test_low_priority_holds_half_as_many_bytes(admission):
    hold(admission, 1, 300, priority=1)
    with pytest.raises(OverloadedError) as caught:
        hold(admission, 1, 51, priority=1)
    assert caught.value.reason == "bytes"

    hold(admission, 1, 50, priority=1)


def test_a_forecast_that_all_but_fills_the_time_is_not_trusted(admission, clock):
    answer_backlog(admission, clock, seconds_per_image=0.1)
    hold(admission, 1)
    forecast_s = admission.forecast_s("a", 1)
    assert forecast_s == pytest.approx(0.2)
    with pytest.raises(OverloadedError, match="deadline"):
        hold(admission, 1, deadline=clock.now + 1.05 * forecast_s)

    hold(admission, 1, deadline=clock.now + 2 * forecast_s)


def test_who_is_refused_by_a_server_that_stops_need_not_wait(admission):
    admission.drain()
    with pytest.raises(DrainingError) as caught:
        hold(admission, 1)

    assert caught.value.retry_after_ms == 0


def test_as_much_as_was_just_answered_is_no_backlog(admission, clock):
    first, second = hold(admission, 10), hold(admission, 10)
    clock.now += 1
    first.close()
    clock.now += 100
    second.close()
    hold(admission, 10)
    assert admission.forecast_s("a", 1) == 0


def test_answers_that_leave_together_are_no_pace_of_their_own(admission, clock):
    held = [hold(admission, 1) for _ in range(48)]
    for number, request in enumerate(held):
        clock.now += 0.08 if number % 8 == 0 else 0
        request.close()
    hold(admission, 9)
    assert admission.forecast_s("a", 1) == pytest.approx(0.1, rel=0.2)
