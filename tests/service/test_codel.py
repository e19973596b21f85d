"""A burst passes, a standing queue is shed ever faster, and the end of it is noticed."""

import itertools

import pytest

from service.codel import CoDel

TARGET_S, INTERVAL_S = 0.005, 0.1


@pytest.fixture
def codel():
    return CoDel(TARGET_S, INTERVAL_S)


def shed_times(codel, waited_s, start, seconds, step=0.001):
    """When jobs are shed if one with this waiting time comes to the head every `step` seconds."""
    times = [start + n * step for n in range(round(seconds / step))]
    return [now for now in times if codel.sheds(waited_s, now)]


def test_waiting_below_the_target_is_never_shed(codel):
    assert shed_times(codel, 0.0049, start=10, seconds=5) == []


def test_a_burst_shorter_than_the_interval_is_not_shed(codel):
    assert shed_times(codel, 1.0, start=10, seconds=0.099) == []
    assert not codel.sheds(0.001, 10.099)
    assert shed_times(codel, 1.0, start=10.1, seconds=0.099) == []


def test_a_standing_queue_is_shed_after_one_interval(codel):
    first, *_ = shed_times(codel, 0.02, start=10, seconds=1)

    assert first == pytest.approx(10.1, abs=0.002)


def test_the_gaps_shrink_with_the_square_root_of_the_count(codel):
    times = shed_times(codel, 0.02, start=10, seconds=2)
    gaps = [later - sooner for sooner, later in itertools.pairwise(times)]

    assert gaps[:4] == pytest.approx([INTERVAL_S / n**0.5 for n in range(1, 5)], abs=0.003)
    assert len(times) > 2 * 2 / INTERVAL_S  # faster than at a constant rate


def test_one_short_wait_ends_the_shedding(codel):
    shed_times(codel, 0.02, start=10, seconds=1)

    assert not codel.sheds(0.004, 11.0)
    assert shed_times(codel, 0.02, start=11.001, seconds=0.099) == []


def test_a_relapse_goes_on_near_the_rate_that_worked(codel):
    before = len(shed_times(codel, 0.02, start=10, seconds=2))
    codel.sheds(0.001, 12.0)

    after = shed_times(codel, 0.02, start=12.001, seconds=0.2 + 0.099)
    gaps = [later - sooner for sooner, later in itertools.pairwise(after)]

    assert before > 20
    assert gaps[0] < INTERVAL_S / 4


def test_each_relapse_begins_with_what_the_last_time_added(codel):
    shed = len(shed_times(codel, 0.02, start=10, seconds=0.6))
    for start in (11, 12):
        codel.sheds(0.001, start - 0.1)
        times = shed_times(codel, 0.02, start=start, seconds=0.6)

        assert times[1] - times[0] == pytest.approx(INTERVAL_S / (shed - 1) ** 0.5, abs=0.002)
        shed = len(times)


def test_a_queue_that_was_emptied_does_not_stand(codel):
    codel.sheds(0.02, 10.0)
    codel.emptied()

    assert shed_times(codel, 0.02, start=10.2, seconds=0.099) == []


def test_after_a_long_peace_it_begins_gently_again(codel):
    shed_times(codel, 0.02, start=10, seconds=2)
    codel.sheds(0.001, 12.0)

    times = shed_times(codel, 0.02, start=60, seconds=0.3)

    assert times[1] - times[0] == pytest.approx(INTERVAL_S, abs=0.003)
