import math
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from training import calibrate, charts


def parsed(svg):
    return ET.fromstring(str(svg))


def points(svg, kind):
    """Coordinates on the first path of a class."""
    path = next(e for e in parsed(svg).iter("path") if e.get("class").split()[0] == kind)
    return [tuple(map(float, pair.split())) for pair in path.get("d").replace("M", "L").strip("LZ").split("L")]


def test_a_falling_loss_is_drawn_from_upper_left_to_lower_right():
    drawn = points(charts.curves({"train_loss": [3.0, 2.0, 1.0]}), "line")

    assert [x for x, _ in drawn] == sorted(x for x, _ in drawn)
    assert [y for _, y in drawn] == sorted(y for _, y in drawn)  # y grows downwards in SVG
    assert len(drawn) == 3


def test_series_get_lines_of_their_own_class_and_a_description():
    svg = charts.curves({"train_loss": [2.0, 1.0], "val_loss": [2.5, 1.5]})

    assert [e.get("class") for e in parsed(svg).iter("path") if e.get("class").startswith("line")] == [
        "line s0",
        "line s1",
    ]
    assert parsed(svg).get("aria-label") == "train_loss ends at 1; val_loss ends at 1.5"


def test_values_that_are_not_finite_leave_a_gap():
    svg = charts.curves({"loss": [3.0, math.nan, math.inf, 1.0, 0.5]})

    path = next(e for e in parsed(svg).iter("path") if e.get("class") == "line s0").get("d")
    assert path.count("M") == 2
    assert "nan" not in path
    assert "inf" not in path


def test_one_epoch_is_a_dot():
    assert len(list(parsed(charts.curves({"loss": [1.0]})).iter("circle"))) == 1


def test_nothing_to_draw_is_nothing():
    assert charts.curves({}) == ""
    assert charts.curves({"loss": [math.nan]}) == ""


def test_a_thousand_epochs_stay_small():
    svg = charts.curves({"loss": [1 / (i + 1) for i in range(10_000)]})

    assert len(svg) < 12_000
    assert len(points(svg, "line")) <= 402


def test_reliability_bars_are_as_high_as_the_accuracy():
    found = calibrate.reliability(np.array([[0.9, 0.1]] * 4), np.array([0, 0, 0, 1]), bins=10)

    svg = parsed(charts.reliability_diagram(found, "before"))

    (bar,) = [e for e in svg.iter("rect") if e.get("class") == "bar"]
    (gap,) = [e for e in svg.iter("rect") if e.get("class") == "gap"]
    full_height = 220 - 12 - 30
    assert float(bar.get("height")) == pytest.approx(0.75 * full_height, abs=0.1)
    assert float(gap.get("height")) == pytest.approx(0.15 * full_height, abs=0.1)
    assert svg.get("aria-label") == "before: expected calibration error 0.1500"


def test_counts_are_sorted_and_labels_escaped():
    svg = charts.sorted_counts([3, 100, 7])

    heights = [y for _, y in points(svg, "area")[:3]]
    assert heights == sorted(heights)
    assert "from 100 down to 3" in parsed(svg).get("aria-label")


def test_names_of_series_cannot_break_out_of_the_picture():
    svg = charts.curves({'"><script>alert(1)</script>': [1.0, 2.0]})

    assert "<script>" not in svg
    assert "<script>" in parsed(svg).get("aria-label")
