"""Architectures by name."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any

from service.errors import ConfigurationError
from training.models import alexnet, convnet, googlenet, inception, lenet, resnet, resnet8, vgg
from training.models.architecture import Architecture, Classifier, Config, PublishedWeights

_REGISTRY: dict[str, Architecture] = {
    entry.name: entry
    for family in (convnet, lenet, resnet8, alexnet, vgg, resnet, googlenet, inception)
    for entry in family.ARCHITECTURES
}


def names() -> tuple[str, ...]:
    """All architectures, small families first."""
    return tuple(_REGISTRY)


def describe(name: str) -> Architecture:
    """Everything about an architecture short of building it.

    Raises:
        ConfigurationError: there is none of that name; the message lists all and suggests the closest.
    """
    if name not in _REGISTRY:
        raise ConfigurationError(f"there is no architecture {name!r}{_suggestion(name, names())}")
    return _REGISTRY[name]


# Where torchvision publishes them, all under their file names.
WEIGHTS_URL = "https://download.pytorch.org/models/"


def published(file: str) -> tuple[Architecture, PublishedWeights] | None:
    """The architecture and figures of a checkpoint that torchvision publishes under that file name."""
    return next(((entry, w) for entry in _REGISTRY.values() for w in entry.weights if w.file == file), None)


def create(name: str, num_classes: int = 1000, in_channels: int = 3, **options: bool | float) -> Classifier:
    """Builds a model with freshly initialised weights, drawn from PyTorch's global generator.

    Returns:
        A module in training mode: normalised float32[N, in_channels, H, W] to logits float32[N, num_classes]. Its
        `config` stores all arguments.

    Raises:
        ConfigurationError: an unknown name or option, or a value that cannot be; the message says what is there.
    """
    entry = describe(name)
    return entry.build(configure(entry, num_classes, in_channels, options))


def configure(entry: Architecture, num_classes: int, in_channels: int, options: dict[str, bool | float]) -> Config:
    """The checked configuration of one model."""
    if num_classes < 2 or in_channels < 1:  # noqa: PLR2004 - with one class there is nothing to tell apart
        raise ConfigurationError(
            f"{entry.name}: needs at least 2 classes and 1 channel, not {num_classes} and {in_channels}"
        )
    known = {known.name: known for known in entry.options}
    for given in options:
        if given not in known:
            raise ConfigurationError(f"{entry.name} has no option {given!r}{_suggestion(given, known)}")
    checked: dict[str, Any] = {given: known[given].check(value) for given, value in options.items()}
    return dataclasses.replace(entry.config, num_classes=num_classes, in_channels=in_channels, **checked)


def _suggestion(wrong: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(wrong, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else "."
    return f"{hint} There are: {', '.join(known)}"
