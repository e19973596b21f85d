"""What describes an architecture, and what every model has in common.

A family's file holds a frozen `Config` (what a model is built from), a `Classifier` (the network) and one
`Architecture` per name. A config's fields made with `option` are the options that `training.models.create` takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from service.artifact import InputSpec, Resize
from service.errors import ConfigurationError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_SMALL = 32  # pixels, of CIFAR and of padded MNIST

_TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number"}


class TrainingOutputs(NamedTuple):
    """What a model with auxiliary heads returns in training mode.

    `logits`: float32[N, K]. `aux_logits`: one float32[N, K] per auxiliary head, in the order of the network. The loss
    is that of `logits` plus `Classifier.aux_weight` times that of each auxiliary head.
    """

    logits: Tensor
    aux_logits: tuple[Tensor, ...]


@dataclass(frozen=True)
class Option:
    """One option of an architecture: its type is that of `default`; numbers lie in [`minimum`, `maximum`]."""

    name: str
    default: bool | float
    help: str
    minimum: float | None = None
    maximum: float | None = None

    def check(self, value: object) -> bool | float:
        """Returns `value` as the option's type.

        Raises:
            ConfigurationError: it has another type or lies outside the range.
        """
        wanted = type(self.default)
        if wanted is float and type(value) is int:
            value = float(value)
        if not isinstance(value, bool | int | float) or type(value) is not wanted:
            raise ConfigurationError(f"option {self.name} is {_TYPE_NAMES[wanted]}, not {value!r}")
        low, high = self.minimum, self.maximum
        if (low is not None and not value >= low) or (high is not None and not value <= high):
            raise ConfigurationError(f"option {self.name} is {value!r}, but has to be {self.range}")
        return value

    @property
    def range(self) -> str | None:
        """The numbers that are allowed, in words; None where all are."""
        if self.minimum is None or self.maximum is None:
            return None
        return f"from {self.minimum:g} to {self.maximum:g}"


def within(name: str, prefixes: Iterable[str]) -> bool:
    """Whether a state-dict name is, or lies below, one of the modules: `layer1.0.bn1.bias` lies within `layer1`."""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def option(default: bool | float, help_: str, minimum: float | None = None, maximum: float | None = None) -> Any:
    """A field of a `Config` that users may set."""
    metadata = {"default": default, "help": help_, "minimum": minimum, "maximum": maximum}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What a model is built from. With equal configs come equal networks, so a checkpoint needs to store no more.

    `name`: the architecture. `num_classes`: K of the logits. `in_channels`: C of the input.
    """

    name: str
    num_classes: int = 1000
    in_channels: int = 3

    @property
    def min_size(self) -> int:
        """Smallest height and width in pixels that the network can process."""
        return 1

    @classmethod
    def option_list(cls) -> tuple[Option, ...]:
        """The options in the order of their declaration."""
        return tuple(Option(field.name, **field.metadata) for field in dataclasses.fields(cls) if field.metadata)

    def options(self) -> dict[str, bool | float]:
        """Name and value of each option: `create(c.name, c.num_classes, c.in_channels, **c.options())` rebuilds it."""
        return {entry.name: getattr(self, entry.name) for entry in self.option_list()}


class Classifier(nn.Module):
    """The common part of all models: float32[N, C, H, W], normalised, to logits float32[N, K].

    Attributes:
        config: what it was built from.
        aux_weight: weight of each auxiliary head's loss; 0 for models without such heads.
        adapts: whether `adapt_to` does anything.
    """

    aux_weight: ClassVar[float] = 0.0
    adapts: ClassVar[bool] = False

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def adapt_to(self, images: Tensor) -> None:
        """Lets initial weights follow the training data, before the first step. Few architectures have such weights.

        Args:
            images: float32[N, C, H, W], normalised, as the network will see them.
        """

    def check_input(self, height: int, width: int) -> None:
        """Tells whether images of that size in pixels can be processed.

        Raises:
            ConfigurationError: they are too small.
        """
        least = self.config.min_size
        if min(height, width) < least:
            raise ConfigurationError(
                f"images of {height}x{width} pixels are too small for {self.config.name}, which needs at least "
                f"{least}x{least}; choose a larger image size or another architecture"
            )

    def check_batch(self, x: Tensor) -> None:
        """`check_input` for a batch, plus its rank and channels. Does nothing while the model is traced."""
        if torch.compiler.is_compiling():
            return
        if x.ndim != 4 or x.shape[1] != self.config.in_channels:  # noqa: PLR2004 - N, C, H, W
            raise ConfigurationError(
                f"{self.config.name} takes batches of [N, {self.config.in_channels}, H, W], not {list(x.shape)}"
            )
        self.check_input(x.shape[2], x.shape[3])


@dataclass(frozen=True)
class PublishedWeights:
    """A checkpoint published by torchvision for ImageNet-1k.

    `file`: its name, which ends in the first 8 hexadecimal digits of its SHA-256. `top1`: accuracy in percent.
    `shorter_side`: of the resize before the centre crop at which that accuracy was measured, in pixels.
    """

    file: str
    top1: float
    shorter_side: int = 256


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One entry of the registry.

    Attributes:
        family: name of the file in `training.models`.
        build: class of the model; takes `config` or a changed copy of it.
        config: the default configuration, with the class count and channels that `parameters` counts.
        input: default size, channels and resize rule.
        mean: per channel, in units where pixels run from 0 to 1.
        std: per channel, in the same unit.
        stem: state-dict prefix of the first convolution.
        head: state-dict prefix of the last linear layer.
        aux_heads: state-dict prefixes of the auxiliary heads' last layers.
        stages: module prefixes from input to output; every parameter outside of auxiliary heads is in exactly one.
        parameters: with `config`, without auxiliary heads.
        weights: published checkpoints, best last.
    """

    family: str
    build: type[Classifier]
    config: Config
    input: InputSpec
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    stem: str
    head: str
    aux_heads: tuple[str, ...] = ()
    stages: tuple[tuple[str, ...], ...]
    parameters: int
    weights: tuple[PublishedWeights, ...] = ()

    @property
    def name(self) -> str:
        """The name that `create` knows it by."""
        return self.config.name

    @property
    def channels(self) -> int:
        """Default channels."""
        return self.input.channels

    @property
    def min_size(self) -> int:
        """Smallest height and width in pixels with default options."""
        return self.config.min_size

    @property
    def options(self) -> tuple[Option, ...]:
        """What `create` takes beside the class count and the channels."""
        return self.config.option_list()

    def input_for(self, options: Mapping[str, Any]) -> InputSpec:
        """The default input of a model with these options: 32x32 where `small_images` is set, else `input`."""
        if not options.get("small_images"):
            return self.input
        return InputSpec(height=_SMALL, width=_SMALL, channels=self.input.channels, resize=Resize(shorter_side=_SMALL))

    def normalization(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation for an input of `channels`; averages if they are not the default channels."""
        if channels == self.channels:
            return self.mean, self.std
        mean = round(sum(self.mean) / len(self.mean), 6)
        std = round(sum(self.std) / len(self.std), 6)
        return (mean,) * channels, (std,) * channels
