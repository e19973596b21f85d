import pytest
from scipy import stats

from training import wording


@pytest.mark.parametrize(("right", "images"), [(0, 10), (198, 200), (50, 50), (3, 7)])
def test_the_interval_is_wilsons(right, images):
    wanted = stats.binomtest(right, images).proportion_ci(method="wilson")

    assert wording.wilson_interval(right / images, images) == pytest.approx((wanted.low, wanted.high), abs=1e-9)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ({"train": 8, "validation": 1, "test": 1}, ""),
        ({"train": 8, "validation": 1, "test": 0}, "chose the epoch and the temperature"),
        ({"train": 8, "validation": 0, "test": 1}, "The temperature was fitted to the same images"),
    ],
)
def test_a_part_that_serves_twice_is_told(images, words):
    said = wording.reservations(images)

    assert said.startswith("The") if words else said == ""
    assert words in said


def test_no_images_say_nothing():
    assert wording.wilson_interval(0, 0) == (0, 1)


@pytest.mark.parametrize(
    ("value", "text"),
    [(999, "999 bytes"), (1024, "1.0 KiB"), (46_827_520, "44.7 MiB"), (3 << 30, "3.0 GiB"), (5 << 40, "5120.0 GiB")],
)
def test_sizes_for_people(value, text):
    assert wording.size(value) == text


@pytest.mark.parametrize(("value", "text"), [(9_946, "9,946"), (93_322, "93.3 k"), (11_689_512, "11.7 M")])
def test_counts_for_people(value, text):
    assert wording.short(value) == text


def test_nested_settings_become_dotted_lines():
    tree = {"a": {"b": 0.123456, "c": {"d": None}}, "e": [1, 2.0], "f": (), "g": True}

    assert dict(wording.flattened(tree)) == {"a.b": "0.1235", "a.c.d": "none", "e": "1, 2", "f": "none", "g": "yes"}


def test_shares_are_percent_with_two_digits():
    assert wording.percent(0.98765) == "98.77%"
