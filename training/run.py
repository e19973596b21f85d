"""One training run from a folder of images to a model version: the composition of all stages."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from service.artifact import InputSpec, Resize, Weights
from service.errors import ConfigurationError
from training.calibrate import fit_temperature
from training.config import Experiment, InputConfig
from training.data import list_images
from training.display import Display
from training.evaluate import Evaluation, evaluate
from training.export import export_version
from training.loop import Examples, Trainer
from training.models import Architecture, create, describe
from training.pixels import Normaliser, channel_statistics
from training.read import Dataset, count_channels, read_images
from training.seeds import Purpose, derive
from training.split import Split, stratified_split, write_split
from training.trained import Trained

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


def run(experiment: Experiment, source: Path, repository: Path, runs: Path, display: Display) -> Result:
    """Reads, splits, trains, evaluates and exports.

    Args:
        experiment: every choice.
        source: folder that holds one folder of images per class.
        repository: where the model version goes.
        runs: where the run's own folder goes: `<runs>/<name>/<number>/` with checkpoints and the settings.
        display: what is shown meanwhile.

    Raises:
        ConfigurationError: a choice that cannot be, or a folder that cannot be written.
        DataError: images that cannot be used.
        TrainingError: training or the checks of the export failed.
    """
    entry = describe(experiment.model.name)
    _check(experiment, repository)
    dataset, spec = _read(experiment, entry, source, display)
    split = stratified_split(
        dataset.labels,
        dataset.classes,
        validation=experiment.data.validation,
        test=experiment.data.test,
        seed=experiment.data.split_seed,
    )
    folder = _new_run(runs / experiment.name, experiment)
    write_split(folder / "split.csv", dataset.listing, split)
    mean, std = channel_statistics(dataset.images, split.train)
    normalise = Normaliser(mean, std)
    trainer = build_trainer(experiment, dataset, split, normalise)
    trainer.model.check_input(spec.height, spec.width)
    display.say(
        f"{len(dataset.classes)} classes; {len(split.train)} images to train, {len(split.validation)} to validate, "
        f"{len(split.test)} to test; {experiment.model.name} on {spec.width}x{spec.height}x{spec.channels}"
    )
    with display.training(len(split.train), experiment.loop.epochs) as view:
        trainer.fit(folder, view)
    trained, evaluation = _examine(experiment, dataset, split, spec, normalise, trainer)
    display.evaluation(evaluation, dataset.classes, "Held-out images")
    version = export_version(trained, repository)
    return Result(version, folder, evaluation, dataset.classes, tuple(trained.holdout_paths))


def input_spec(config: InputConfig, default: InputSpec, channels: int) -> InputSpec:
    """The model's input: the architecture's default, changed by what was asked for.

    The shorter side of the resize keeps its proportion to the crop when only the size is changed.
    """
    size = config.size or default.height
    mode = config.resize or default.resize.mode
    side = config.shorter_side
    if side is None and default.resize.shorter_side is not None and mode == "crop":
        side = round(default.resize.shorter_side * size / default.height)
    if side is not None and side < size:
        raise ConfigurationError(f"input.shorter_side {side} is smaller than the input of {size}x{size}; enlarge it")
    resize = Resize(mode=mode, shorter_side=side, interpolation=default.resize.interpolation)
    return InputSpec(height=size, width=size, channels=1 if channels == 1 else 3, resize=resize)


def _check(experiment: Experiment, repository: Path) -> None:
    """Finds what would fail after training before it begins."""
    if not experiment.data.validation and not experiment.data.test:
        raise ConfigurationError("without --validation and --test no image is left to check the model with; set one")
    try:
        repository.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=repository).cleanup()
    except OSError as error:
        raise ConfigurationError(f"the repository {repository} cannot be written: {error.strerror}") from error


def _read(experiment: Experiment, entry: Architecture, source: Path, display: Display) -> tuple[Dataset, InputSpec]:
    listing = list_images(source)
    channels = experiment.input.channels or count_channels(listing)
    spec = input_spec(experiment.input, entry.input, channels)
    with display.reading(len(listing)) as advance:
        dataset, faults = read_images(
            listing,
            spec,
            min_side_pixels=experiment.data.min_side_pixels,
            workers=len(os.sched_getaffinity(0)),
            advance=advance,
        )
    display.say(f"{source}: {len(dataset)} images read" + (f", {len(faults)} left out:" if faults else ""))
    display.faults(faults)
    return dataset, spec


def _new_run(parent: Path, experiment: Experiment) -> Path:
    """Makes `<parent>/<next number>/` and writes the settings there; earlier runs are never touched."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        taken = [int(entry.name) for entry in parent.iterdir() if entry.name.isdecimal()]
        folder = parent / str(max(taken, default=0) + 1)
        folder.mkdir()
        settings = yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False)
        (folder / "experiment.yaml").write_text(settings, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{parent} cannot be written: {error.strerror}; choose another --runs") from error
    return folder


def build_trainer(experiment: Experiment, dataset: Dataset, split: Split, normalise: Normaliser) -> Trainer:
    """The model with weights drawn from the seed, and the trainer around it."""
    torch.manual_seed(derive(experiment.loop.seed, Purpose.WEIGHTS))
    channels = dataset.images.shape[-1]
    model = create(experiment.model.name, len(dataset.classes), channels, **experiment.model.options)
    train, validation = (Examples(dataset.images, dataset.labels, part) for part in (split.train, split.validation))
    return Trainer(model, train, validation, normalise, experiment)


def _examine(
    experiment: Experiment, dataset: Dataset, split: Split, spec: InputSpec, normalise: Normaliser, trainer: Trainer
) -> tuple[Trained, Evaluation]:
    model, images, labels = trainer.averaged.eval(), dataset.images, dataset.labels
    tuning = split.validation if len(split.validation) else split.test
    holdout = split.test if len(split.test) else split.validation
    tuned = evaluate(model, images[tuning], labels[tuning], normalise)
    evaluation = evaluate(model, images[holdout], labels[holdout], normalise)
    trained = Trained(
        model=model,
        name=experiment.name,
        architecture=experiment.model.name,
        classes=dataset.classes,
        input=spec,
        mean=normalise.mean,
        std=normalise.std,
        temperature=fit_temperature(tuned.logits, tuned.labels),
        metrics=_metrics(evaluation),
        data=_provenance(experiment, dataset, split),
        recipe=experiment.model_dump(mode="json"),
        weights=Weights(),
        canary=[dataset.listing.file(i) for i in _one_per_class(labels, holdout)],
        calibration=images[np.random.default_rng(0).permutation(split.train)[:_CALIBRATION_IMAGES]],
        holdout=images[holdout],
        holdout_labels=labels[holdout],
        history=trainer.progress.history,
        holdout_paths=[dataset.listing.file(i) for i in holdout],
    )
    return trained, evaluation


def _metrics(evaluation: Evaluation) -> Mapping[str, float]:
    macro = evaluation.per_class().macro()
    return {
        "accuracy": evaluation.accuracy,
        "top5_accuracy": evaluation.top5,
        "loss": evaluation.loss,
        **{f"macro_{name}": value for name, value in macro.items()},
    }


def _provenance(experiment: Experiment, dataset: Dataset, split: Split) -> Mapping[str, Any]:
    counts = np.bincount(dataset.labels, minlength=len(dataset.classes))
    return {
        "sha256": dataset.digest(),
        "images": {"train": len(split.train), "validation": len(split.validation), "test": len(split.test)},
        "per_class": {name: int(count) for name, count in zip(dataset.classes, counts, strict=True)},
        "split_seed": experiment.data.split_seed,
    }


def _one_per_class(labels: NDArray[np.int64], indices: NDArray[np.int64]) -> Sequence[int]:
    _, first = np.unique(labels[indices], return_index=True)
    chosen = np.linspace(0, len(first) - 1, min(_CANARY_IMAGES, len(first))).round().astype(int)
    return [int(indices[first[k]]) for k in chosen]
