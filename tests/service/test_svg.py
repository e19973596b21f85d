import pytest

from service.svg import Scale, round_ticks


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.31, 2.4, [0.5, 1, 1.5, 2]),
        (1, 40, [10, 20, 30, 40]),
        (0, 0.0008, [0, 0.0002, 0.0004, 0.0006, 0.0008]),
        (3, 3, [3]),
    ],
)
def test_ticks_are_round_numbers_inside_the_range(low, high, wanted):
    assert round_ticks(low, high) == pytest.approx(wanted)


def test_more_ticks_are_made_on_request():
    assert round_ticks(0, 0.6, about=6) == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert len(round_ticks(0, 100, about=10)) == 11


@pytest.mark.parametrize(("value", "pixel"), [(1, 190), (3, 10), (2, 100)])
def test_a_scale_may_run_upwards_where_pixels_are_counted_down(value, pixel):
    assert Scale(1, 3, start=190, end=10)(value) == pixel


def test_the_only_value_of_a_scale_lies_at_its_start():
    assert Scale(4, 4, start=20, end=60)(4) == 20
