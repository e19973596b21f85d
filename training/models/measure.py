"""Size and cost of an architecture, counted without computing anything."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from service.artifact import InputSpec
from training.models.registry import create, describe


@dataclass(frozen=True)
class Cost:
    """What one model has and needs.

    Attributes:
        parameters: trainable numbers, without auxiliary heads unless they were asked for.
        multiply_adds: of one image at `input` in evaluation mode; an operation count would be twice that.
        input: the image that was counted.
    """

    parameters: int
    multiply_adds: int
    input: InputSpec


def measure(name: str, num_classes: int | None = None, **options: bool | float) -> Cost:
    """Counts parameters and multiply-adds of convolutions and linear layers on PyTorch's meta device.

    Without `num_classes` the architecture's own count is taken: 1000, or 10 for the smallest.

    Raises:
        ConfigurationError: no such architecture or option.
    """
    entry = describe(name)
    spec = entry.input_for(options)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = create(name, num_classes or entry.config.num_classes, spec.channels, **options).eval()
        model(torch.empty(1, spec.channels, spec.height, spec.width))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Cost(parameters, counter.get_total_flops() // 2, spec)
