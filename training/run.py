"""One training run from images to a model version: the composition of all stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from service.artifact import Weights
from service.errors import ConfigurationError
from training import checkpoint
from training.assemble import build_source, build_stepper, build_trainer
from training.batches import Examples
from training.calibrate import fit_temperature
from training.config import Experiment
from training.display import Display
from training.distributed import Group, device, joined
from training.evaluate import Evaluation, evaluate
from training.export import export_version
from training.finder import plot, sweep
from training.folders import check_writable, new_run
from training.interrupt import InterruptedRunError, held_back
from training.journal import Journal
from training.loop import LAST, StoppedError, Trainer
from training.models import describe
from training.prepare import prepare
from training.prepared import Prepared
from training.threads import limited_to, thread_count
from training.trained import Trained
from training.transfer import plan, provenance, stage_table

_CANARY_IMAGES = 8
_CALIBRATION_IMAGES = 512


@dataclass(frozen=True)
class Result:
    """What a run leaves behind.

    `version`: directory of the model version. `folder`: of the run, with checkpoints, settings and `split.csv`.
    `evaluation`: on the held-out images, whose files are `holdout` in the order of its rows.
    """

    version: Path
    folder: Path
    evaluation: Evaluation
    classes: tuple[str, ...]
    holdout: tuple[Path, ...]


def run(
    experiment: Experiment,
    source: Path,
    repository: Path,
    runs: Path,
    display: Display,
    *,
    resume: Path | None = None,
) -> Result:
    """Reads, splits, trains, evaluates and exports.

    Args:
        experiment: every choice.
        source: the images; see `training.data`.
        repository: where the model version goes.
        runs: where the run's own folder goes: `<runs>/<name>/<number>/` with checkpoints and the settings.
        display: what is shown meanwhile.
        resume: folder of an interrupted run to go on with.

    Raises:
        ConfigurationError: a choice that cannot be, or a folder that cannot be written.
        DataError: images that cannot be used.
        TrainingError: training or the checks of the export failed.
        InterruptedRunError: SIGTERM or Ctrl-C; the checkpoint is written.
    """
    if resume:
        experiment = _as_begun(experiment, resume)
    entry = describe(experiment.model.name)
    phases = plan(experiment, entry)
    if not experiment.data.validation and not experiment.data.test:
        raise ConfigurationError("without --validation and --test no image is left to check the model with; set one")
    check_writable(repository, "the repository")
    with joined() as group:
        data = prepare(experiment, entry, source, runs / experiment.name / "cache", display, group)
        _introduce(display, experiment, source, data)
        folder = resume or group.from_main(lambda: new_run(runs / experiment.name, experiment))
        if group.main:
            data.write_reports(folder)
        stepper, report = build_stepper(experiment, entry, data, group)
        if report:
            display.show(stage_table(stepper.model, entry, report, phases))
        threads = experiment.loop.threads or thread_count(stepper.model, data.spec.shape, experiment.loop.batch_size)
        with limited_to(threads), repeatable(experiment.loop.deterministic):
            trainer = build_trainer(experiment, data, stepper, phases, folder, group)
            if resume:
                trainer.resume()
            _fit(trainer, experiment, len(data.train_labels()), folder, display, group)
            evaluation, trained = examine(experiment, data, trainer, provenance(experiment.transfer, report), group)
        display.evaluation(evaluation, data.dataset.classes, "Held-out images")
        version = group.from_main(lambda: export_version(trained, repository))
        return Result(version, folder, evaluation, data.dataset.classes, tuple(trained.holdout_paths))


def search_learning_rate(experiment: Experiment, source: Path, runs: Path, display: Display) -> float:
    """Sweeps the learning rate, writes the curve into a new run's folder, and says what it suggests."""
    entry, group = describe(experiment.model.name), Group()
    data = prepare(experiment, entry, source, runs / experiment.name / "cache", display, group)
    folder = new_run(runs / experiment.name, experiment)
    stepper, _ = build_stepper(experiment, entry, data, group)
    with limited_to(
        experiment.loop.threads or thread_count(stepper.model, data.spec.shape, experiment.loop.batch_size)
    ):
        found = sweep(stepper, build_source(experiment, data, group))
    plot(found, folder / "learning-rate.png")
    display.say(f"--learning-rate {found.suggestion:.1e}: there the loss falls fastest; {folder / 'learning-rate.png'}")
    return found.suggestion


def examine(
    experiment: Experiment, data: Prepared, trainer: Trainer, weights: Weights, group: Group
) -> tuple[Evaluation, Trained]:
    """Evaluates on held-out images, calibrates on the validation part, and gathers what export needs."""
    model, normalise, dataset = trainer.evaluated.eval(), data.normalise.on(device()), data.dataset
    validation, test = data.examples("validation"), data.examples("test")
    holdout = test if len(test) else validation
    tuned = evaluate(model, validation if len(validation) else test, normalise, group=group)
    evaluation = evaluate(model, holdout, normalise, group=group)
    trained = Trained(
        model=model,
        name=experiment.name,
        architecture=experiment.model.name,
        classes=dataset.classes,
        input=data.spec,
        mean=normalise.mean,
        std=normalise.std,
        temperature=fit_temperature(tuned.logits, tuned.labels),
        metrics=_metrics(evaluation),
        data=data.provenance(experiment.data.split_seed),
        recipe={**experiment.model_dump(mode="json"), "precision": trainer.precision},
        weights=weights,
        canary=[dataset.listing.file(row) for row in _one_per_class(holdout)],
        calibration=data.calibration(_CALIBRATION_IMAGES),
        holdout=dataset.images[holdout.indices],
        holdout_labels=holdout.part_labels,
        history=trainer.progress.history,
        holdout_paths=[dataset.listing.file(row) for row in holdout.indices],
    )
    return evaluation, trained


def _fit(trainer: Trainer, experiment: Experiment, images: int, folder: Path, display: Display, group: Group) -> None:
    done = trainer.progress.epoch
    journal = Journal(folder, tensorboard=experiment.loop.tensorboard, first_epoch=done) if group.main else None
    try:
        with held_back() as interruption, display.training(images, trainer.epochs, done, journal) as view:
            trainer.fit(view, lambda: interruption.requested)
    except StoppedError:
        raise InterruptedRunError(interruption.signal, folder) from None
    finally:
        if journal:
            journal.close()


@contextmanager
def repeatable(wanted: bool) -> Iterator[None]:
    """PyTorch refuses operations whose result varies from run to run, if that is wanted."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _as_begun(experiment: Experiment, folder: Path) -> Experiment:
    """What the run's beginning measured holds to its end, wherever it goes on: precision and threads."""
    begun, loop = checkpoint.load(folder / LAST)["identity"], experiment.loop
    measured = {
        **({"precision": begun["precision"]} if loop.precision == "auto" else {}),
        **({} if loop.threads else {"threads": begun["threads"]}),
    }
    return experiment.model_copy(update={"loop": loop.model_copy(update=measured)})


def _introduce(display: Display, experiment: Experiment, source: Path, data: Prepared) -> None:
    left_out, split, spec = len(data.faults), data.split, data.spec
    read = len(data.train_labels()) + len(split.validation) + len(split.test)
    display.say(f"{source}: {read} images" + (f", {left_out} left out:" if left_out else ""))
    display.faults(data.faults)
    display.say(
        f"{len(data.dataset.classes)} classes; {len(data.train_labels())} images to train, {len(split.validation)} to "
        f"validate, {len(split.test)} to test; {experiment.model.name} on {spec.width}x{spec.height}x{spec.channels}"
    )


def _metrics(evaluation: Evaluation) -> Mapping[str, float]:
    macro = evaluation.per_class().macro()
    return {
        "accuracy": evaluation.accuracy,
        "top5_accuracy": evaluation.top5,
        "loss": evaluation.loss,
        **{f"macro_{name}": value for name, value in macro.items()},
    }


def _one_per_class(examples: Examples) -> list[int]:
    """Rows of a few images of different classes."""
    _, first = np.unique(examples.part_labels, return_index=True)
    chosen = np.linspace(0, len(first) - 1, min(_CANARY_IMAGES, len(first))).round().astype(int)
    return [int(examples.indices[first[k]]) for k in chosen]
