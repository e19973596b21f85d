"""When a run is stopped because it goes nowhere."""

import math

import pytest

from service.errors import TrainingError
from training.health import check_moving

CHANCE = math.log(5)


def history(*epochs):
    return [{"learning_rate": rate, "train_loss": loss} for rate, loss in epochs]


def test_a_loss_that_stays_at_guessing_stops_the_run():
    with pytest.raises(TrainingError, match="guessing among 5 classes"):
        check_moving(history(*[(0.1, CHANCE)] * 3), 3, 5)


def test_auxiliary_heads_guess_too():
    with pytest.raises(TrainingError, match=r"guessing among 5 classes \(2\.575\)"):
        check_moving(history(*[(0.1, 1.59 * CHANCE)] * 3), 3, 5, heads=1.6)
    check_moving(history(*[(0.1, 1.2 * CHANCE)] * 3), 3, 5, heads=1.6)


def test_epochs_of_a_warm_up_do_not_count():
    rising = [(0.01 * n, CHANCE + 0.05) for n in range(1, 8)]
    check_moving(history(*rising), 5, 5)
    check_moving(history(*rising, *[(0.07, CHANCE)] * 4), 5, 5)

    with pytest.raises(TrainingError, match="5 epochs"):
        check_moving(history(*rising, *[(0.07, CHANCE)] * 5), 5, 5)


def test_one_better_epoch_is_movement():
    check_moving(history((0.1, CHANCE), (0.1, 0.9 * CHANCE), (0.1, CHANCE)), 3, 5)


@pytest.mark.parametrize("epochs", [0, 4])
def test_too_few_epochs_say_nothing(epochs):
    check_moving(history(*[(0.1, CHANCE)] * 3), epochs, 5)
