import pytest

from service.errors import TrainingError
from training.assemble import build_source, build_stepper
from training.config import Experiment
from training.distributed import Group
from training.finder import plot, sweep
from training.models import describe


def sweep_of(data, **tree):
    experiment = Experiment.model_validate({"loop": {"batch_size": 32}, **tree})
    stepper, _ = build_stepper(experiment, describe("lenet5"), data, Group())
    return sweep(stepper, build_source(experiment, data, Group()))


def test_suggests_a_rate_at_which_the_loss_falls(digit_data, tmp_path):
    found = sweep_of(digit_data)
    assert 1e-4 < found.suggestion < 0.1
    assert found.smooth.max() > 2 * found.smooth.min() or found.rates[-1] > 1
    plot(found, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_that_cannot_start_is_said_so(digit_data):
    with pytest.raises(TrainingError, match="smallest learning rates"):
        sweep_of(digit_data, optimiser={"name": "sgd", "momentum": 0.0, "weight_decay": 1e12})
