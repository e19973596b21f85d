"""Plots of a study whose figures are hard to draw."""

import itertools
import math

import pytest
from matplotlib.figure import Figure

from training import axes as drawn


def test_names_are_as_short_as_they_can_be_told_apart():
    keys = ["model.name", "optimiser.name", "optimiser.learning_rate"]
    assert drawn.short_names(keys) == ["model.name", "optimiser.name", "learning_rate"]


@pytest.mark.parametrize(
    ("losses", "top"),
    [
        ([0.5, 0.6, 0.55, 0.7, 15_311_877.0, math.nan, None], 1.2),
        ([0.5, 0.6, 0.55, 0.7], 0.75),
        ([0.5], 0.6),
        ([math.inf, None], None),
    ],
)
def test_a_trial_that_diverged_does_not_press_the_others_to_a_line(losses, top):
    axes = Figure().subplots()
    axes.scatter(range(len(losses)), [math.nan if loss is None else loss for loss in losses])
    drawn.cut_off(axes, losses)
    assert top is None or axes.get_ylim()[1] < top
    assert axes.get_title(loc="right") == ("1 above the picture, up to 1.53e+07" if len(losses) == 7 else "")


@pytest.mark.parametrize("places", [[0.0005, 0.001, 0.004], [1e-5, 1e-1], [0.003, 0.003]])
def test_the_labels_of_a_log_axis_have_room(places):
    figure = Figure(figsize=(3, 2))
    axes = figure.subplots()
    axes.scatter(places, [1.0] * len(places))
    drawn.log_axis(axes, places)
    figure.canvas.draw()
    boxes = [label.get_window_extent() for label in axes.get_xticklabels(which="both") if label.get_text()]
    assert len(boxes) == (1 if len(set(places)) == 1 else 4)
    assert not any(one.overlaps(other) for one, other in itertools.pairwise(boxes))
