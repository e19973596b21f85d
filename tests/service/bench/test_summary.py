"""Figures worked out by hand from samples made up for it."""

import numpy as np
import pytest

from service.bench.load import OK, Level, Measurement, Sample
from service.bench.summary import histogram, summarise


def sample(intended_s, latency_ms, status=OK, late_ms=0.0, images=1, bad=0):
    times = (intended_s, intended_s + late_ms / 1e3, intended_s + latency_ms / 1e3)
    return Sample(*times, status, images if status == OK else 0, bad, 1000, 2000, 3000)


def measurement(
    samples, level=None, window_s=(10.0, 12.0), lag_s=(0.001,), cpu_share=0.2, deadline_s=0.5, sending_s=None
):
    sending_s = window_s[1] - window_s[0] if sending_s is None else sending_s
    return Measurement(level or Level("closed", 2), deadline_s, samples, window_s, lag_s, cpu_share, sending_s)


def test_percentiles_are_order_statistics():
    found = summarise(measurement([sample(10 + k / 1000, k + 1) for k in range(1000)]))

    assert found.percentiles_ms == pytest.approx({"p50": 500, "p90": 900, "p99": 990, "p99.9": 999})
    assert found.max_ms == pytest.approx(1000)
    assert found.mean_ms == pytest.approx(500.5)


def test_a_single_slow_request_is_in_the_tail_and_not_in_the_median():
    found = summarise(measurement([sample(10, 5)] * 99 + [sample(10, 900)]))

    assert found.percentiles_ms["p50"] == found.percentiles_ms["p99"] == pytest.approx(5)
    assert found.percentiles_ms["p99.9"] == found.max_ms == pytest.approx(900)


def test_only_what_was_meant_for_the_window_is_counted():
    found = summarise(measurement([sample(9.9, 5), sample(10.5, 7), sample(12.0, 9)]))

    assert found.sent == 1
    assert found.max_ms == pytest.approx(7)


def test_rates_are_of_what_ended_in_the_window():
    before = sample(9.9, 200)  # ends at 10.1
    beyond = sample(11.9, 200)  # ends at 12.1: a latency that counts, an answer that does not
    found = summarise(measurement([before, sample(10.5, 7), sample(11, 7), beyond]))

    assert found.throughput == pytest.approx(3 / 2)
    assert found.offered == pytest.approx(3 / 2)
    assert found.max_ms == pytest.approx(200)


def test_what_is_offered_is_of_the_time_of_sending_and_not_of_waiting_for_the_last_answer():
    samples = [sample(10 + k / 100, 1500) for k in range(100)]
    found = summarise(measurement(samples, Level("open", 100), window_s=(10.0, 12.5), sending_s=1.0))

    assert found.offered == pytest.approx(100)
    assert found.throughput == pytest.approx(100 / 2.5)
    assert not found.warnings


def test_a_latency_begins_when_the_request_was_meant_to_be_sent():
    """However late it was sent, because others had held up the sender: to leave that out is coordinated omission."""
    found = summarise(measurement([sample(10, 400, late_ms=390), sample(10, 600, late_ms=590)]))

    assert found.max_ms == pytest.approx(600)
    assert found.percentiles_ms["p50"] == pytest.approx(400)
    assert found.goodput == pytest.approx(0.5)  # the other one came after its deadline of half a second


def test_an_answer_counts_where_it_ended():
    found = summarise(measurement([sample(9.0, 1500), sample(11.9, 1500)]))

    assert found.throughput == pytest.approx(1 / 2)  # ended at 10.5, and at 13.4


def test_the_median_of_failures_is_that_of_any_order():
    found = summarise(measurement([sample(10, ms, "UNAVAILABLE") for ms in (9, 1, 5, 7, 3)]))

    assert found.failures["UNAVAILABLE"].p50_ms == pytest.approx(5)


def test_goodput_leaves_out_late_and_failed_requests():
    samples = [sample(10, 400), sample(10, 600), sample(10, 3, "UNAVAILABLE"), sample(10, 5, "UNAVAILABLE")]
    samples.append(sample(10, 500, "DEADLINE_EXCEEDED"))
    found = summarise(measurement(samples))

    assert found.throughput == pytest.approx(1.0)
    assert found.goodput == pytest.approx(0.5)
    assert found.failures["UNAVAILABLE"].count == 2
    assert found.failures["UNAVAILABLE"].p50_ms == pytest.approx(3)
    assert found.failures["DEADLINE_EXCEEDED"].p50_ms == pytest.approx(500)


def test_images_that_could_not_be_classified_are_not_throughput():
    found = summarise(measurement([sample(10, 5, images=8, bad=3)]))

    assert found.images == pytest.approx(2.5)
    assert found.bad_images == 3


def test_server_times_are_medians_in_milliseconds():
    assert summarise(measurement([sample(10, 5)])).server_ms == {"queue": 1.0, "decode": 2.0, "inference": 3.0}


def test_nothing_answered_leaves_no_latencies():
    found = summarise(measurement([sample(10, 3, "UNAVAILABLE")]))

    assert found.percentiles_ms == {}
    assert found.max_ms is None
    assert found.server_ms == {}
    assert found.as_json()["histogram"] == []


def test_an_empty_window_gives_zeros():
    found = summarise(measurement([], window_s=(10.0, 10.0), lag_s=()))

    assert (found.sent, found.throughput, found.lag_p99_ms) == (0, 0, 0)


def test_a_healthy_generator_gives_no_warning():
    level = Level("open", 100)
    samples = [sample(10 + k / 100, 5, late_ms=1) for k in range(200)]

    assert summarise(measurement(samples, level)).warnings == ()


@pytest.mark.parametrize(
    ("changes", "late_ms", "count", "words"),
    [
        ({"cpu_share": 0.97}, 0, 200, "97% of a core"),
        ({"lag_s": (0.001,) * 50 + (0.05,) * 50}, 0, 200, "lagged by 50 ms"),
        ({}, 30, 200, "sent 30 ms late"),
        ({}, 0, 100, "only 50 of 100 requests/s"),
    ],
    ids=["cpu", "lag", "late", "too few"],
)
def test_a_generator_that_cannot_keep_up_is_told(changes, late_ms, count, words):
    samples = [sample(10 + 2 * k / count, 50, late_ms=late_ms) for k in range(count)]

    warnings = summarise(measurement(samples, Level("open", 100), **changes)).warnings

    assert len(warnings) == 1
    assert words in warnings[0]


def test_histogram_bins_are_logarithmic_and_hold_everything():
    bins = histogram(np.array([0.9, 1.0, 1.1, 9.9, 10.0, 99.0]))

    assert [bound for bound, _ in bins] == pytest.approx([10 ** (k / 10) for k in range(21)])
    assert sum(count for _, count in bins) == 6
    assert bins[0][1] == 2  # up to and with 1 ms
    assert histogram(np.array([])) == []
