"""The optimiser: which parameters decay, and the averaged copy of the weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from training.config import Experiment, OptimiserConfig

_SMALL_MODELS = frozenset({"lenet5", "convnet"})


def peak_rate(experiment: Experiment) -> float:
    """The configured peak learning rate, or a proven one.

    SGD: 0.05, from trained weights 0.01. Adam and AdamW: 4e-3 for the small models, 1e-3 for others, from trained
    weights 2e-3, of which the early stages get a fraction (fastai's default).
    """
    config, transfer = experiment.optimiser, experiment.transfer.weights is not None
    if config.learning_rate is not None:
        return config.learning_rate
    if config.name == "sgd":
        return 0.01 if transfer else 0.05
    if transfer:
        return 2e-3
    return 4e-3 if experiment.model.name in _SMALL_MODELS else 1e-3


def proven_decay(config: OptimiserConfig) -> float:
    """The configured weight decay, or a proven one: AdamW's is apart from the gradient, and 20 times as large.

    In the gradient 0.01 keeps networks without BatchNorm from learning at all.
    """
    if config.weight_decay is not None:
        return config.weight_decay
    return 0.01 if config.name == "adamw" else 5e-4


def build_optimiser(groups: Sequence[Mapping[str, Any]], config: OptimiserConfig) -> torch.optim.Optimizer:
    """An optimiser over groups of {params, multiple, decays}; the loop sets their learning rates at each step."""
    decay = proven_decay(config)
    decayed = [{**group, "weight_decay": decay if group["decays"] else 0.0} for group in groups]
    if config.name == "sgd":
        return torch.optim.SGD(decayed, lr=1.0, momentum=config.momentum, nesterov=config.momentum > 0, fused=True)
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return kind(decayed, lr=1.0, betas=(config.momentum, 0.999), fused=True)


class Average:
    """Exponential moving average of a model's weights and buffers (Polyak and Juditsky, 1992).

    `model`: the averaged copy, in evaluation mode. The decay starts low and rises to `decay`, so that the random
    initial weights are forgotten at once.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Follows `model`, whose tensors have to stay the same ones."""
        self.model = copy.deepcopy(model).eval().requires_grad_(requires_grad=False)
        self._decay = decay
        # Both are looked up once: in small models that takes longer than averaging.
        pairs = list(zip(_tensors(self.model), _tensors(model), strict=True))
        self._floating = [pair for pair in pairs if pair[0].is_floating_point()]
        self._counters = [pair for pair in pairs if not pair[0].is_floating_point()]  # BatchNorm counts its batches

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the model after `step` steps."""
        weight = 1 - min(self._decay, (1 + step) / (10 + step))
        # One call instead of one per tensor.
        torch._foreach_lerp_([mine for mine, _ in self._floating], [theirs for _, theirs in self._floating], weight)
        if self._counters:
            torch._foreach_copy_([mine for mine, _ in self._counters], [theirs for _, theirs in self._counters])


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
