"""Putting a run's parts together: model, stepper, batches, loop."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from service.errors import ConfigurationError
from service.resources import cpu_count
from training.batches import MemorySource, Source, balancing_weights
from training.config import Experiment
from training.distributed import Group, device
from training.loop import Trainer
from training.models import Architecture, LoadReport, create
from training.optimise import peak_rate
from training.phases import Phase
from training.pixels import unit_range
from training.precision import Precision, fastest
from training.prepared import Prepared
from training.seeds import Purpose, derive
from training.shards import ShardSource
from training.step import Stepper, class_weights
from training.threads import thread_count
from training.transfer import start_from

_ADAPTATION_IMAGES = 512


def build_stepper(
    experiment: Experiment, entry: Architecture, data: Prepared, group: Group
) -> tuple[Stepper, LoadReport | None]:
    """The model, with weights drawn from the seed or loaded, and what updates it."""
    torch.manual_seed(derive(experiment.loop.seed, Purpose.WEIGHTS))
    classes, spec, where = data.dataset.classes, data.spec, device()
    model = create(experiment.model.name, len(classes), spec.channels, **experiment.model.options)
    for size in (spec, data.batch_spec):
        model.check_input(size.height, size.width)
    report = start_from(model, entry, experiment.transfer)
    if report is None and model.adapts:
        model.adapt_to(data.normalise(unit_range(torch.from_numpy(data.training_sample(_ADAPTATION_IMAGES)))))
    stepper = Stepper(
        model,
        experiment,
        data.normalise.on(where),
        class_weights=class_weights(data.train_labels(), len(classes))
        if experiment.loop.balance == "weights"
        else None,
        device=where,
        group=group,
    )
    return stepper, report


def check_model(experiment: Experiment, entry: Architecture) -> None:
    """Finds out before images are read, and without memory for a network, whether it can be built and started from.

    Raises:
        ConfigurationError: an option that the architecture lacks, or images that are too small for it.
        TrainingError: the weights cannot be read or belong to another architecture.
    """
    with torch.device("meta"):
        model = create(entry.name, 2, experiment.input.channels or entry.channels, **experiment.model.options)
    for key in ("size", "train_size"):
        size = getattr(experiment.input, key)
        if size is not None:
            try:
                model.check_input(size, size)
            except ConfigurationError as error:
                raise ConfigurationError(f"input.{key}: {error}") from error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no-op")  # PyTorch's: nothing is copied into an outline
        start_from(model, entry, experiment.transfer)


def build_trainer(
    experiment: Experiment, data: Prepared, stepper: Stepper, phases: Sequence[Phase], folder: Path, group: Group
) -> Trainer:
    """The loop around a stepper, with the precision chosen."""
    source = build_source(experiment, data, group)
    stepper.precision = group.from_main(lambda: choose_precision(experiment, stepper, source))
    return Trainer(
        stepper,
        source,
        data.examples("validation"),
        data.normalise.on(stepper.device),
        experiment,
        phases=phases,
        peak=peak_rate(experiment),
        folder=folder,
        identity={
            "data": data.digest(),
            "precision": stepper.precision,
            "processes": group.world,
            "threads": torch.get_num_threads(),
        },
        group=group,
    )


def build_source(experiment: Experiment, data: Prepared, group: Group) -> Source:
    """The training images in batches.

    Raises:
        ConfigurationError: a sampler for shards, which can only be read in their order, or batches that are too small
            for so many processes.
    """
    loop, train = experiment.loop, data.examples("train")
    if loop.batch_size < 2 * group.world:
        raise ConfigurationError(
            f"--batch-size {loop.batch_size} leaves some of {group.world} processes without two images; "
            f"it has to be {2 * group.world} at least"
        )
    if data.shards:
        if loop.balance == "sampler":
            raise ConfigurationError("tar shards cannot be sampled; use --balance weights")
        options = {"buffer": experiment.data.shuffle_buffer, "workers": cpu_count()}
        return ShardSource(data.shards, data.batch_spec, loop.batch_size, loop.seed, group=group, **options)
    weights = balancing_weights(train.part_labels) if loop.balance == "sampler" else None
    return MemorySource(train, loop.batch_size, loop.seed, group=group, weights=weights)


def threads_for(experiment: Experiment, stepper: Stepper, data: Prepared) -> int:
    """Threads of a step: as many as were asked for, or as suit the model and its batches."""
    loop = experiment.loop
    return loop.threads or thread_count(stepper.model, data.batch_spec.shape, loop.batch_size)


def choose_precision(experiment: Experiment, stepper: Stepper, source: Source) -> Precision:
    """What was asked for; `auto` measures, unless the run has to be repeatable."""
    wanted = experiment.loop.precision
    if wanted != "auto":
        return wanted
    if experiment.loop.deterministic:
        return "float32"
    return fastest(stepper.trial(next(iter(source.batches(0, 0)))), stepper.device)
