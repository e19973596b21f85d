"""Transfer learning: trained weights into a new model, and the phases in which it learns from there."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from service.artifact import Weights
from service.errors import ConfigurationError
from training.config import Experiment, TransferConfig
from training.models import Architecture, Classifier, LoadReport, load_weights, within
from training.models.registry import published
from training.phases import Phase

# Of a file that torchvision publishes, with its hash in its name.
_UNSPECIFIED, _TORCHVISION_LICENCE = "unspecified", "BSD-3-Clause (torchvision)"

_FINE_TUNE_PEAK = 0.5


def start_from(model: Classifier, entry: Architecture, config: TransferConfig) -> LoadReport | None:
    """Loads `config.weights`, all but the heads, adapting the first convolution to the input channels.

    Raises:
        TrainingError: the file cannot be read or belongs to another architecture.
    """
    if config.weights is None:
        return None
    return load_weights(model, config.weights, ignore=(entry.head, *entry.aux_heads), adapt_input=True)


def inherited_statistics(
    config: TransferConfig, entry: Architecture, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation that the weights were trained with: trained filters expect the same range.

    One of our own checkpoints names them; for any other file, also one where these names mean something else, they are
    the architecture's. None without weights.
    """
    if config.weights is None:
        return None
    try:
        stored: Any = torch.load(config.weights, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError):
        stored = None  # loading the weights gives the reason; a safetensors file names no statistics
    if isinstance(stored, dict):
        mean, std = (_fitted(_numbers(stored.get(key)), channels) for key in ("mean", "std"))
        if mean and std and min(std) > 0:
            return mean, std
    return entry.normalization(channels)


def _fitted(numbers: tuple[float, ...] | None, channels: int) -> tuple[float, ...] | None:
    """Statistics for so many channels, as the filters of the first convolution are fitted to them."""
    if numbers is None or len(numbers) == channels:
        return numbers
    return numbers * channels if len(numbers) == 1 else (sum(numbers) / len(numbers),) * channels


def _numbers(value: Any) -> tuple[float, ...] | None:
    """Plain numbers, if that is what a file has here; they end in a manifest."""
    if isinstance(value, Tensor) and value.layout == torch.strided:
        value = value.tolist()
    if not isinstance(value, list | tuple) or len(value) not in {1, 3}:
        return None
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in value):
        return None
    return tuple(map(float, value))


def provenance(config: TransferConfig, report: LoadReport | None) -> Weights:
    """What the manifest says about where the weights come from."""
    if report is None:
        return Weights()
    licence = config.licence
    if licence == _UNSPECIFIED and report.verified and published(report.path.name):
        licence = _TORCHVISION_LICENCE
    return Weights(source=f"{config.strategy} from {report.path.name}, SHA-256 {report.sha256}", licence=licence)


def plan(experiment: Experiment, entry: Architecture) -> tuple[Phase, ...]:
    """The phases of a run. Without weights it is a single one in which everything learns.

    Raises:
        ConfigurationError: too few epochs for the strategy.
    """
    config, epochs = experiment.transfer, experiment.loop.epochs
    if config.weights is None:
        return (Phase("training", epochs),)
    head = (entry.head, *entry.aux_heads)
    if config.strategy == "linear-probe":
        return (_probe(entry, head, epochs, config),)
    if config.strategy == "fine-tune":
        return (_fine_tune(entry, head, epochs, config, peak=1.0),)
    if epochs < 2:  # noqa: PLR2004 - one for the head, one for the rest
        raise ConfigurationError(f"strategy {config.strategy} needs at least 2 epochs, not {epochs}; set --epochs")
    if config.strategy == "gradual":
        return _gradual(entry, head, epochs, config)
    probing = min(epochs - 1, max(1, round(epochs * config.probe)))
    return (
        _probe(entry, head, probing, config),
        _fine_tune(entry, head, epochs - probing, config, peak=_FINE_TUNE_PEAK),
    )


def stage_table(model: Classifier, entry: Architecture, report: LoadReport, phases: Sequence[Phase]) -> Table:
    """A row per stage: how many tensors were loaded, adapted or newly drawn, and in which phases it learns how fast."""
    table = Table(title=f"{entry.name} from {report.path.name}", title_justify="left")
    for column in ("stage", "parameters", "weights", *(_headed(phase) for phase in phases)):
        table.add_column(column, justify="right" if column == "parameters" else "left")
    for stage in entry.stages:
        parameters = {n: p for n, p in model.named_parameters() if within(n, stage)}
        if parameters:
            first = next(iter(parameters))
            rates = (_rate(phase.multiple(first) * phase.peak) for phase in phases)
            count = sum(p.numel() for p in parameters.values())
            table.add_row(", ".join(stage), f"{count:,}", _origin(list(parameters), report), *rates)
    return table


def _headed(phase: Phase) -> str:
    return f"{phase.name} ({phase.epochs} epoch{'' if phase.epochs == 1 else 's'})"


def _probe(entry: Architecture, head: tuple[str, ...], epochs: int, config: TransferConfig) -> Phase:
    body = tuple(prefix for stage in entry.stages for prefix in stage)
    return Phase("linear probe", epochs, stages=((head, 1.0), (body, 0.0)), freeze_norm=config.freeze_norm)


def _fine_tune(
    entry: Architecture, head: tuple[str, ...], epochs: int, config: TransferConfig, *, peak: float
) -> Phase:
    return Phase(
        "fine-tuning",
        epochs,
        peak=peak,
        stages=((head, 1.0), *_discriminative(entry, config.spread)),
        freeze_norm=config.freeze_norm,
    )


def _discriminative(entry: Architecture, spread: float) -> list[tuple[tuple[str, ...], float]]:
    """Each stage learns slower than the one after it, by a constant factor; from first to last that is `spread`."""
    last = max(1, len(entry.stages) - 1)
    return [(stage, spread ** (number / last - 1)) for number, stage in enumerate(entry.stages)]


def _gradual(entry: Architecture, head: tuple[str, ...], epochs: int, config: TransferConfig) -> tuple[Phase, ...]:
    """As many phases as stages, or as epochs if these are fewer; each unfreezes further stages."""
    rates = _discriminative(entry, config.spread)
    count = min(len(rates), epochs)
    phases = []
    for number in range(1, count + 1):
        free = round(len(rates) * number / count)
        frozen = [(stage, 0.0) for stage, _ in rates[: len(rates) - free]]
        length = epochs * number // count - epochs * (number - 1) // count
        stages = ((head, 1.0), *frozen, *rates[len(rates) - free :])
        peak = 1.0 if number == 1 else _FINE_TUNE_PEAK
        phases.append(Phase(f"top {free}", length, peak=peak, stages=stages, freeze_norm=config.freeze_norm))
    return tuple(phases)


def _rate(multiple: float) -> str:
    return f"rate x {multiple:.3g}" if multiple else "frozen"


def _origin(names: Sequence[str], report: LoadReport) -> str:
    groups = (("loaded", report.loaded), ("adapted", report.adapted), ("new", report.replaced))
    counts = {word: sum(name in found for name in names) for word, found in groups}
    counts["loaded"] -= counts["adapted"]
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count)
