import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from service.errors import TrainingError
from training.assemble import build_source, build_stepper
from training.config import Experiment
from training.distributed import Group
from training.finder import HIGHEST, LOWEST, Sweep, plot, sweep
from training.models import describe
from training.phases import Phase


def sweep_of(data, **tree):
    experiment = Experiment.model_validate({"loop": {"batch_size": 32}, **tree})
    stepper, _ = build_stepper(experiment, describe("lenet5"), data, Group())
    return sweep(stepper, build_source(experiment, data, Group()))


@pytest.mark.parametrize("fall", [1.0, 0.2])
@pytest.mark.parametrize("first", [0.8, -0.8])
def test_what_moves_before_anything_is_learnt_is_no_suggestion(first, fall):
    """The mean of the first few losses swings from batch to batch."""
    rates = np.geomspace(LOWEST, HIGHEST, 100)
    smooth = 1 - fall / (1 + (1e-2 / rates) ** 2) + np.where(rates > 0.3, (rates - 0.3) * 5, 0)
    smooth[:8] += np.linspace(first, 0, 8)
    smooth += 0.002 * np.sin(np.arange(100))
    assert 3e-3 < Sweep(rates, smooth, smooth).suggestion < 3e-2


def test_a_sweep_that_ends_at_once_suggests_one_of_its_rates():
    rates = np.geomspace(LOWEST, 1e-6, 3)
    assert Sweep(rates, np.ones(3), np.ones(3)).suggestion in rates


def test_only_what_the_phase_trains_is_swept(digit_data):
    experiment = Experiment.model_validate({"loop": {"batch_size": 32}})
    entry = describe("lenet5")
    stepper, _ = build_stepper(experiment, entry, digit_data, Group())
    before = {name: tensor.clone() for name, tensor in stepper.model.state_dict().items()}
    body = tuple({name.split(".")[0] for name in before} - {entry.head})
    phase = Phase("probe", 1, stages=((body, 0.0),))
    sweep(stepper, build_source(experiment, digit_data, Group()), phase, steps=40)
    changed = {name for name, tensor in stepper.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(name.startswith(entry.head) for name in changed)
    assert math.isfinite(stepper.learning_rate)


def test_rates_are_those_that_the_settings_would_have(digit_data):
    """A phase with half the peak learns at half of what --learning-rate says."""
    experiment, rates = Experiment.model_validate({"loop": {"batch_size": 32}}), []
    for peak in (1.0, 0.5):
        stepper, _ = build_stepper(experiment, describe("lenet5"), digit_data, Group())
        source = build_source(experiment, digit_data, Group())
        rates.append(sweep(stepper, source, Phase("all", 1, peak=peak), steps=20).rates)

    assert np.allclose(rates[1], 2 * rates[0])


def test_suggests_a_rate_at_which_the_loss_falls(digit_data, tmp_path):
    found = sweep_of(digit_data)
    assert 1e-4 < found.suggestion < 0.1
    assert found.smooth.max() > 2 * found.smooth.min() or found.rates[-1] > 1
    plot(found, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_that_cannot_start_is_said_so(digit_data):
    with pytest.raises(TrainingError, match="smallest learning rates"):
        sweep_of(digit_data, optimiser={"name": "sgd", "momentum": 0.0, "weight_decay": 1e12})


class Canned:
    """A stepper whose losses are known."""

    def __init__(self, losses):
        self.losses, self.fixed_rate = losses, None

    def begin(self, *_):
        pass

    def train(self):
        pass

    def __call__(self, batch, step):
        return torch.tensor(self.losses[step])


ENDLESS = SimpleNamespace(batches=lambda epoch, first: iter([None]))


def test_rates_rise_by_one_factor_from_the_lowest_to_the_highest():
    found = sweep(Canned([1.0] * 30), ENDLESS, Phase("all", 1), steps=30)
    np.testing.assert_allclose(found.rates, np.geomspace(LOWEST, HIGHEST, 30))
    np.testing.assert_allclose(found.smooth, 1)


def test_the_sweep_ends_when_the_loss_has_grown_fourfold():
    found = sweep(Canned([1.0] * 20 + [2.0**n for n in range(20)]), ENDLESS, Phase("all", 1), steps=40)
    assert len(found.rates) < 40
    assert found.smooth[-1] > 4 * found.smooth.min() >= found.smooth[-2]
