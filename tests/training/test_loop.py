import dataclasses
import math

import numpy as np
import pytest
import torch

from service.errors import ConfigurationError, DataError, TrainingError
from training import checkpoint
from training.assemble import build_source, build_stepper, build_trainer
from training.config import Experiment
from training.distributed import Group
from training.evaluate import evaluate
from training.folders import LAST
from training.loop import BEST, StoppedError
from training.models import create, describe
from training.phases import Phase
from training.pixels import unit_range
from training.schedule import rate
from training.threads import limited_to
from training.transfer import plan

SMALL = {"model": {"name": "lenet5", "options": {"dropout": 0.2}}, "loop": {"epochs": 3, "precision": "float32"}}


class Notes:
    """Writes down what the loop tells."""

    def __init__(self):
        self.images = 0
        self.history = []

    def step(self, images, loss):
        self.images += images

    def epoch(self, history):
        self.history = list(history)


def merged(base, extra):
    return {key: {**base.get(key, {}), **extra.get(key, {})} for key in {*base, *extra}}


def parts_of(data, folder, phases=None, group=None, **tree):
    """A stepper, and a trainer of it."""
    experiment = Experiment.model_validate(merged(SMALL, tree))
    entry, group = describe("lenet5"), group or Group()
    stepper, _ = build_stepper(experiment, entry, data, Group())
    return stepper, build_trainer(experiment, data, stepper, phases or plan(experiment, entry), folder, group)


def trainer_of(data, folder, **tree):
    return parts_of(data, folder, **tree)[1]


def weights_of(trainer):
    return trainer.evaluated.state_dict()


def identical(first, second):
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_learns_and_tells_and_keeps_the_best(digit_data, tmp_path):
    notes = Notes()
    trainer = trainer_of(digit_data, tmp_path, loop={"epochs": 8})
    trainer.fit(notes)
    assert notes.images == 8 * 240
    assert [figures["epoch"] for figures in notes.history] == list(range(1, 9))
    assert notes.history[-1]["train_loss"] < 0.6 * notes.history[0]["train_loss"]
    best = max(notes.history, key=lambda figures: (figures["val_accuracy"], -figures["val_loss"]))
    saved = checkpoint.load(tmp_path / BEST)
    assert saved["epoch"] == best["epoch"]
    assert identical(weights_of(trainer), saved["model"])


def test_the_same_seed_is_the_same_run(digit_data, tmp_path):
    def run(folder, **loop):
        folder.mkdir()
        trainer = trainer_of(digit_data, folder, loop={"epochs": 1, **loop})
        trainer.fit(Notes())
        return weights_of(trainer)

    first = run(tmp_path / "a")
    assert identical(first, run(tmp_path / "b"))
    assert not identical(first, run(tmp_path / "c", seed=1))


@pytest.mark.parametrize("stop_after", [1, 4, 5, 9])
def test_a_stopped_run_goes_on_to_the_same_weights(digit_data, tmp_path, stop_after):
    """Steps 4 and 8 end epochs; 1, 5 and 9 lie within them."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = trainer_of(digit_data, tmp_path / "whole", augment={"mixup": 0.2}, optimiser={"clip_norm": 1.0})
    whole.fit(Notes())
    first = trainer_of(digit_data, tmp_path / "parts", augment={"mixup": 0.2}, optimiser={"clip_norm": 1.0})
    with pytest.raises(StoppedError):
        first.fit(Notes(), lambda: first.progress.step == stop_after)
    torch.rand(7)  # another process has another past
    second = trainer_of(digit_data, tmp_path / "parts", augment={"mixup": 0.2}, optimiser={"clip_norm": 1.0})
    second.resume()
    assert second.progress.step == stop_after
    second.fit(Notes())
    assert identical(weights_of(whole), weights_of(second))
    assert identical(checkpoint.load(tmp_path / "whole" / LAST)["stepper"]["model"],
                     checkpoint.load(tmp_path / "parts" / LAST)["stepper"]["model"])  # fmt: skip
    for a, b in zip(whole.progress.history, second.progress.history, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-12)
        assert a["val_loss"] == b["val_loss"]
        assert a["learning_rate"] == b["learning_rate"]


def test_a_finished_run_resumes_to_its_best_weights(digit_data, tmp_path):
    trainer = trainer_of(digit_data, tmp_path)
    trainer.fit(Notes())
    again = trainer_of(digit_data, tmp_path)
    again.resume()
    again.fit(Notes())
    assert identical(weights_of(trainer), weights_of(again))


def test_other_data_are_not_resumed(digit_data, tmp_path):
    trainer_of(digit_data, tmp_path, loop={"epochs": 1}).fit(Notes())
    other = trainer_of(digit_data, tmp_path, loop={"epochs": 1, "precision": "bfloat16"})
    with pytest.raises(TrainingError, match="precision was float32, and is bfloat16"):
        other.resume()


def test_a_loss_that_is_no_number_stops_with_advice(digit_data, tmp_path):
    trainer = trainer_of(digit_data, tmp_path, optimiser={"name": "sgd", "learning_rate": 1e12})
    with pytest.raises(TrainingError, match=r"the loss became (nan|inf).*--learning-rate"):
        trainer.fit(Notes())


def test_a_loss_that_stays_at_chance_stops_with_advice(digit_data, tmp_path):
    trainer = trainer_of(
        digit_data, tmp_path, optimiser={"learning_rate": 1e-12}, loop={"epochs": 30, "stuck_epochs": 3}
    )
    notes = Notes()
    with pytest.raises(TrainingError, match=r"guessing among 10 classes \(2\.303\), for 3 epochs"):
        trainer.fit(notes)
    assert len(notes.history) == 12  # the log has the last one, too
    assert trainer.progress.epoch == 12  # three after the nine of the warm-up


def test_stops_early_when_nothing_gets_better(digit_data, tmp_path):
    trainer = trainer_of(
        digit_data, tmp_path, optimiser={"learning_rate": 1e-12}, loop={"epochs": 30, "patience": 2, "ema_decay": 0}
    )
    trainer.fit(Notes())
    assert trainer.progress.epoch == trainer.progress.best_epoch + 2 < 30


def test_only_the_last_phase_is_stopped_early_and_by_its_own_epochs(digit_data, tmp_path):
    loop = {"epochs": 30, "patience": 2, "ema_decay": 0, "precision": "float32", "stuck_epochs": 0}
    experiment = Experiment.model_validate(merged(SMALL, {"optimiser": {"learning_rate": 1e-12}, "loop": loop}))
    stepper, _ = build_stepper(experiment, describe("lenet5"), digit_data, Group())
    phases = (Phase("first", 6), Phase("all", 24))
    trainer = build_trainer(experiment, digit_data, stepper, phases, tmp_path, Group())
    trainer.fit(Notes())

    assert trainer.progress.epoch == max(trainer.progress.best_epoch, 6) + 2


def test_batches_too_small_for_the_processes_are_refused(digit_data):
    experiment = Experiment.model_validate(merged(SMALL, {"loop": {"batch_size": 5}}))
    assert build_source(experiment, digit_data, Group(1, 2)).steps
    with pytest.raises(ConfigurationError, match=r"--batch-size 5 .* 3 processes .* 6 at least"):
        build_source(experiment, digit_data, Group(1, 3))


def test_writes_checkpoints_within_epochs(digit_data, tmp_path):
    trainer = trainer_of(digit_data, tmp_path, loop={"checkpoint_steps": 3})
    seen = []

    class Looking(Notes):
        def step(self, images, loss):
            if (tmp_path / LAST).exists():
                seen.append(checkpoint.load(tmp_path / LAST)["progress"]["step"])

    trainer.fit(Looking())
    assert {3, 6, 9} < set(seen)


def test_float16_carries_its_scaler_along(digit_data, tmp_path):
    trainer = trainer_of(digit_data, tmp_path, loop={"precision": "float16", "epochs": 1})
    trainer.fit(Notes())
    assert checkpoint.load(tmp_path / LAST)["stepper"]["scaler"]["scale"] > 1
    assert math.isfinite(trainer.progress.history[-1]["train_loss"])


def test_an_epoch_whose_loss_is_no_number_is_not_the_best(digit_data, tmp_path, monkeypatch):
    """Where NaN makes the first class of everything, as a bad model may, too, the accuracies are equal."""
    trainer = trainer_of(digit_data, tmp_path)
    losses = iter([0.45, math.nan, 0.5])
    monkeypatch.setattr(trainer, "_validate", lambda: {"val_loss": next(losses), "val_accuracy": 0.8})
    trainer.fit(Notes())
    assert trainer.progress.best_epoch == 1


def test_without_validation_the_newest_is_the_best(digit_data, tmp_path):

    empty = dataclasses.replace(digit_data.split, validation=np.array([], dtype=np.int64))
    trainer = trainer_of(dataclasses.replace(digit_data, split=empty), tmp_path)
    trainer.fit(Notes())
    assert trainer.progress.best_epoch == 3
    assert "val_loss" not in trainer.progress.history[-1]


class Voting(Group):
    """Two processes, of which the other one has been told to stop."""

    def from_main(self, make):
        return make()

    def any(self, flag):
        return True

    def sum(self, values):
        return values


def test_what_a_run_goes_on_with_is_what_it_began_with(digit_data, tmp_path):
    trainer_of(digit_data, tmp_path, loop={"epochs": 1}).fit(Notes())
    trainer_of(digit_data, tmp_path, loop={"epochs": 1}).resume()
    dataset = dataclasses.replace(digit_data.dataset, digests=digit_data.dataset.digests[::-1].copy())
    other = dataclasses.replace(digit_data, dataset=dataset)
    with pytest.raises(TrainingError, match="images were added, removed or changed"):
        trainer_of(other, tmp_path, loop={"epochs": 1}).resume()
    with limited_to(2), pytest.raises(TrainingError, match="threads was 1, and is 2"):
        trainer_of(digit_data, tmp_path, loop={"epochs": 1}).resume()
    _, two = parts_of(digit_data, tmp_path, group=Voting(0, 2), loop={"epochs": 1})
    with pytest.raises(TrainingError, match="processes was 1, and is 2"):
        two.resume()


def test_a_run_whose_best_weights_are_gone_is_not_trained_to_the_end(digit_data, tmp_path):
    trainer_of(digit_data, tmp_path, loop={"epochs": 2}).fit(Notes())
    (tmp_path / BEST).unlink()
    with pytest.raises(DataError, match=r"best\.pt is gone, the weights of epoch \d"):
        trainer_of(digit_data, tmp_path, loop={"epochs": 2}).resume()


def test_a_stem_follows_normalised_training_images_and_many_of_them(digit_data):
    settings = Experiment.model_validate({"model": {"name": "resnet8", "options": {"width": 0.25}}})
    stepper, _ = build_stepper(settings, describe("resnet8"), digit_data, Group())
    model = create("resnet8", 10, 1, width=0.25)
    model.adapt_to(digit_data.normalise(unit_range(torch.from_numpy(digit_data.training_sample(512)))))
    torch.testing.assert_close(stepper.model.stem.weight.detach(), model.stem.weight.detach())


def test_a_step_has_as_many_images_in_memory_as_its_pieces():
    loop = Experiment.model_validate({"loop": {"batch_size": 65, "accumulate": 4}}).loop
    assert loop.images_at_once == 17


def test_each_phase_has_a_schedule_of_its_own_and_its_own_peak(digit_data, tmp_path):
    tree = {"optimiser": {"learning_rate": 0.01}, "loop": {"epochs": 5, "ema_decay": 0, "stuck_epochs": 0}}
    phases = (Phase("first", 2), Phase("all", 3, peak=0.5))
    stepper, trainer = parts_of(digit_data, tmp_path, phases, **tree)
    schedule = Experiment.model_validate(tree).schedule
    notes, seen = Notes(), []
    notes.step = lambda images, loss: seen.append(stepper.learning_rate)
    trainer.fit(notes)
    per = len(seen) // 5
    expected = [
        peak * rate(schedule, step, epochs * per)
        for peak, epochs in ((0.01, 2), (0.005, 3))
        for step in range(epochs * per)
    ]
    assert seen == pytest.approx(expected)


def test_an_epoch_that_is_the_best_is_known_so_after_a_crash(digit_data, tmp_path):
    trainer = trainer_of(digit_data, tmp_path, loop={"epochs": 1})
    trainer.fit(Notes())
    assert checkpoint.load(tmp_path / "last.pt")["progress"]["best_epoch"] == 1


def test_all_processes_stop_when_one_of_them_is_told_to(digit_data, tmp_path):
    _, trainer = parts_of(digit_data, tmp_path, group=Voting(0, 1), loop={"epochs": 1})
    with pytest.raises(StoppedError):
        trainer.fit(Notes(), lambda: False)
    assert trainer.progress.step == 1


def test_what_is_validated_and_kept_is_the_average(digit_data, tmp_path):
    stepper, trainer = parts_of(digit_data, tmp_path, loop={"epochs": 1, "ema_decay": 0.99})
    notes = Notes()
    trainer.fit(notes)
    average, kept = stepper.average.model, checkpoint.load(tmp_path / BEST)
    assert identical(kept["model"], average.state_dict())
    assert not identical(kept["model"], stepper.model.state_dict())
    losses = [
        evaluate(model, digit_data.examples("validation"), digit_data.normalise).loss
        for model in (average, stepper.model)
    ]
    assert notes.history[-1]["val_loss"] == pytest.approx(losses[0])
    assert abs(losses[0] - losses[1]) > 1e-4
    assert (kept["mean"], kept["std"]) == (digit_data.normalise.mean, digit_data.normalise.std)


def test_a_run_that_stands_between_its_phases_begins_the_next_afresh(digit_data, tmp_path):
    """There the checkpoint still holds the optimiser of the phase before."""

    def trainer_in(folder):
        folder.mkdir(exist_ok=True)
        phases, loop = (Phase("a", 1), Phase("b", 1)), {"epochs": 2, "ema_decay": 0}
        return parts_of(digit_data, folder, phases, loop=loop)[1]

    class Dying(Notes):
        def epoch(self, history):
            raise KeyboardInterrupt  # after the checkpoint of the first epoch

    trainer_in(tmp_path / "whole").fit(Notes())
    with pytest.raises(KeyboardInterrupt):
        trainer_in(tmp_path / "parts").fit(Dying())
    again = trainer_in(tmp_path / "parts")
    again.resume()
    assert (again.progress.epoch, again.progress.batch) == (1, 0)
    again.fit(Notes())
    whole, parts = (checkpoint.load(tmp_path / name / LAST)["stepper"]["model"] for name in ("whole", "parts"))
    assert identical(whole, parts)
