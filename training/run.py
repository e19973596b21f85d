"""One training run from images to a model version: the composition of all stages."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from service import artifact
from service.artifact import Weights
from service.errors import ConfigurationError
from training import checkpoint
from training.assemble import build_source, build_stepper, build_trainer, check_model, choose_precision, threads_for
from training.batches import Examples
from training.calibrate import Calibration, calibration, fit_temperature
from training.config import Experiment
from training.display import Display
from training.distributed import Group, device, joined, processes
from training.evaluate import TOP_K, Evaluation, evaluate
from training.export import export_version
from training.finder import plot, sweep
from training.folders import LAST, alone, check_apart, check_writable, new_run, note_published, writing
from training.gates import batches_up_to
from training.idle import idle
from training.interrupt import InterruptedRunError, held_back, stoppable
from training.journal import Journal
from training.listing import TEST, VALIDATION
from training.loop import StoppedError, Trainer
from training.memory import kept_memory, shortage_told
from training.models import Architecture, describe
from training.optimise import peak_rate, proven_decay
from training.phases import Phase
from training.prepare import parts_given, prepare
from training.prepared import Part, Prepared
from training.rows import Rows
from training.schedule import proven_warmup
from training.threads import limited_to
from training.trained import Trained
from training.transfer import plan, provenance, stage_table
from training.wording import reservations


@dataclass(frozen=True)
class Judged:
    """What the model does on the held-out images, and how far its confidence can be believed there."""

    evaluation: Evaluation
    calibration: Calibration

    def metrics(self) -> dict[str, float]:
        """For the manifest. `loss` and `..._uncalibrated` are those of the bare model."""
        macro = self.evaluation.per_class().macro()
        return {
            "accuracy": self.evaluation.accuracy,
            **({"top5_accuracy": self.evaluation.top5} if self.evaluation.logits.shape[1] > TOP_K else {}),
            "loss": self.evaluation.loss,
            **self.calibration.metrics(),
            **{f"macro_{name}": value for name, value in macro.items()},
        }


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
        InterruptedRunError: SIGTERM or Ctrl-C; in the loop a checkpoint is written first.
    """
    with stoppable(LAST) as stopping, joined() as group:
        stopping.folder = resume
        if resume:
            experiment = _as_begun(experiment, resume)
        entry, phases = _checked(experiment)
        check_apart(source, {"--repository": repository, "--runs": runs})
        check_writable(repository, "the repository")
        check_writable(runs / experiment.name, "the folder of runs")
        _check_shares(experiment, source)
        data = prepare(experiment, entry, source, runs / experiment.name / "cache", display, group)
        _check_held_out(experiment, len(data.split.validation), len(data.split.test))  # of which all may be unusable
        _introduce(display, experiment, source, data)
        folder = resume or group.from_main(lambda: new_run(runs / experiment.name, experiment))
        stopping.folder = folder
        if group.main and not resume:
            with writing(folder):
                data.write_reports(folder)
        at_once = experiment.loop.images_at_once
        with shortage_told(at_once):
            stepper, report = build_stepper(experiment, entry, data, group)
        if report:
            display.show(stage_table(stepper.model, entry, report, phases))
        display.caution(*idle(experiment, stepper.model, data))
        threads = threads_for(experiment, stepper, data)
        mine, short = alone(folder) if group.main else nullcontext(), shortage_told(at_once)
        with mine, limited_to(threads), kept_memory(), short, repeatable(experiment.loop.deterministic):
            trainer = build_trainer(experiment, data, stepper, phases, folder, group)
            if resume:
                trainer.resume()
            _fit(trainer, experiment, len(data.train_labels()), folder, display, group)
            with display.working("Judging the model by held-out images"):
                judged, trained = examine(experiment, data, trainer, provenance(experiment.transfer, report), group)
        display.evaluation(judged.evaluation, data.dataset.classes, "Held-out images")
        display.calibration(judged.calibration)
        display.caution(reservations(trained.data["images"]), without_skill(judged.evaluation, data.dataset.classes))
        version = group.from_main(lambda: _export(experiment, trained, repository, display))
        if group.main:
            note_published(folder, version)
        manifest = artifact.read_manifest(version)
        display.variants(manifest.variants, manifest.rejected_variants)
        return Result(version, folder, judged.evaluation, data.dataset.classes, tuple(trained.holdout_paths))


def _checked(experiment: Experiment) -> tuple[Architecture, tuple[Phase, ...]]:
    """The architecture and the phases, after what can be found wrong before any image is read.

    Raises:
        ConfigurationError: settings that contradict each other or the architecture.
        TrainingError: weights that cannot be read or belong to another architecture.
    """
    entry = describe(experiment.model.name)
    phases = plan(experiment, entry)
    check_model(experiment, entry)
    return entry, phases


def _check_held_out(experiment: Experiment, validation: float, test: float) -> None:
    """Whether there is anything to judge by: shares or numbers of images, 0 for none."""
    if not validation and not test:
        raise ConfigurationError("without --validation and --test no image is left to check the model with; set one")
    if experiment.loop.patience is not None and not validation:
        raise ConfigurationError("--patience needs validation images to judge the epochs by; set --validation")


def _check_shares(experiment: Experiment, source: Path) -> None:
    """The same question before the images are read, which may take long."""
    shares = experiment.data
    if not (shares.validation and shares.test):
        given = parts_given(source)
        _check_held_out(experiment, shares.validation or VALIDATION in given, shares.test or TEST in given)


def _export(experiment: Experiment, trained: Trained, repository: Path, display: Display) -> Path:
    config = experiment.export
    with display.working("Exporting") as tell:
        return export_version(
            trained,
            repository,
            variants=config.variants,
            budget_points=config.accuracy_budget_points,
            batches=batches_up_to(config.largest_batch),
            tell=tell,
        )


def search_learning_rate(experiment: Experiment, source: Path, runs: Path, display: Display) -> float:
    """Sweeps the learning rate, writes the curve into a new run's folder, and says what it suggests."""
    if processes() > 1:
        raise ConfigurationError("the search for a learning rate takes one process; start it without torchrun")
    entry, group = describe(experiment.model.name), Group()
    check_apart(source, {"--runs": runs})
    check_writable(runs / experiment.name, "the folder of runs")
    data = prepare(experiment, entry, source, runs / experiment.name / "cache", display, group)
    display.faults(data.faults)
    folder = new_run(runs / experiment.name, experiment)
    with writing(folder):
        data.write_reports(folder)
    with shortage_told(experiment.loop.images_at_once):
        stepper, _ = build_stepper(experiment, entry, data, group)
        with limited_to(threads_for(experiment, stepper, data)), kept_memory():
            images = build_source(experiment, data, group)
            stepper.precision = choose_precision(experiment, stepper, images)
            found = sweep(stepper, images, plan(experiment, entry)[-1])
    plot(found, folder / "learning-rate.png")
    display.say(f"--learning-rate {found.suggestion:.1e}: there the loss falls fastest; {folder / 'learning-rate.png'}")
    return found.suggestion


def examine(
    experiment: Experiment, data: Prepared, trainer: Trainer, weights: Weights, group: Group
) -> tuple[Judged, Trained]:
    """Evaluates on held-out images, calibrates on the validation part, and gathers what export needs."""
    model, normalise, dataset, split = trainer.evaluated.eval(), data.normalise.on(device()), data.dataset, data.split
    held_out: Part = "test" if len(split.test) else "validation"
    tuning: Part = "validation" if len(split.validation) else "test"
    holdout = data.examples(held_out)
    some = experiment.loop.images_at_once
    evaluation = evaluate(model, holdout, normalise, at_once=some, group=group)
    tuned = evaluation
    if tuning != held_out:
        tuned = evaluate(model, data.examples(tuning), normalise, at_once=some, group=group)
    temperature = fit_temperature(tuned.logits, tuned.labels)
    judged = Judged(evaluation, calibration(evaluation.logits, evaluation.labels, temperature))
    files = data.files(held_out)
    trained = Trained(
        model=model,
        name=experiment.name,
        architecture=experiment.model.name,
        classes=dataset.classes,
        input=data.spec,
        mean=normalise.mean,
        std=normalise.std,
        temperature=temperature,
        metrics=judged.metrics(),
        data=data.provenance(experiment.data.split_seed),
        recipe=_recipe(experiment, trainer),
        weights=weights,
        canary=[files[place] for place in _one_per_class(holdout, experiment.export.canary_images)],
        calibration=data.calibration(experiment.export.calibration_images),
        holdout=Rows(holdout.images, holdout.indices),
        holdout_labels=holdout.part_labels,
        history=trainer.progress.history,
        holdout_paths=files,
    )
    return judged, trained


def _recipe(experiment: Experiment, trainer: Trainer) -> dict[str, Any]:
    """The settings, with what was chosen where they leave a choice."""
    tree = {**experiment.model_dump(mode="json"), "precision": trainer.precision}
    chosen = {"learning_rate": peak_rate(experiment), "weight_decay": proven_decay(experiment.optimiser)}
    schedule = {**tree["schedule"], "warmup": proven_warmup(experiment.schedule)}
    return {**tree, "optimiser": {**tree["optimiser"], **chosen}, "schedule": schedule}


def without_skill(evaluation: Evaluation, classes: Sequence[str]) -> str:
    """Says so if the model is right no more often than a constant answer would be; else empty."""
    counts = np.bincount(evaluation.labels, minlength=len(classes))
    most, right = int(counts.argmax()), evaluation.accuracy * len(evaluation.labels)
    if right > counts[most] + 0.5:
        return ""
    share = counts[most] / len(evaluation.labels)
    how = f"more often ({share:.1%} against {evaluation.accuracy:.1%})" if counts[most] > right + 0.5 else "as often"
    return (
        f"Always to answer {classes[most]!r} would be right {how}: the model has learnt nothing that helps. Did the "
        "loss fall? Try another learning rate (--find-lr), more epochs or more images."
    )


def _fit(trainer: Trainer, experiment: Experiment, images: int, folder: Path, display: Display, group: Group) -> None:
    done = trainer.progress.epoch
    journal = Journal(folder, tensorboard=experiment.loop.tensorboard, first_epoch=done) if group.main else None
    try:
        with held_back() as interruption, display.training(images, trainer.epochs, done, journal) as view:
            trainer.fit(view, lambda: interruption.requested)
            late = group.any(interruption.requested)  # after the last step, in the validation
        if late:
            raise InterruptedRunError(interruption.signal, folder)
    except StoppedError:
        raise InterruptedRunError(interruption.signal, folder) from None
    finally:
        if journal:
            journal.close()
    if trainer.progress.epoch < trainer.epochs:
        display.say(
            f"Stopped early after epoch {trainer.progress.epoch} of {trainer.epochs}: none has been better since epoch "
            f"{trainer.progress.best_epoch} (--patience {experiment.loop.patience})"
        )


@contextmanager
def repeatable(wanted: bool) -> Iterator[None]:
    """PyTorch refuses operations whose result varies from run to run, if that is wanted.

    If not, cuDNN tries its kernels for each shape and takes the fastest, which may be another one the next time.
    """
    before, tried = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    if wanted:  # or cuBLAS refuses; it reads this before its first product
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)
    torch.backends.cudnn.benchmark = not wanted
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.benchmark = tried


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
        + (f", trained at {data.train_spec.width}x{data.train_spec.height}" if data.train_spec else "")
    )
    for part, rows in (("validation", split.validation), ("test", split.test)):
        present = np.bincount(data.dataset.labels[rows], minlength=len(data.dataset.classes))
        absent = [name for name, count in zip(data.dataset.classes, present, strict=True) if not count]
        if len(rows) and absent:
            display.caution(f"There is no {part} image of {_listed(absent)}: how well it is told nobody will know.")


def _listed(names: Sequence[str], most: int = 5) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more classes" if more > 0 else "")


def _one_per_class(examples: Examples, most: int) -> list[int]:
    """Places in the examples of at most so many images of different classes."""
    _, first = np.unique(examples.part_labels, return_index=True)
    chosen = np.linspace(0, len(first) - 1, min(most, len(first))).round().astype(int)
    return [int(place) for place in first[chosen]]
