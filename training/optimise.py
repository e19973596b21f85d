"""The optimiser: which parameters decay, and the averaged copy of the weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from training.config import OptimiserConfig

_SMALL_MODELS = frozenset({"lenet5", "convnet"})


def peak_rate(config: OptimiserConfig, architecture: str) -> float:
    """The configured peak learning rate, or a proven one: SGD 0.05; Adam 4e-3 for the small models, else 1e-3."""
    if config.learning_rate is not None:
        return config.learning_rate
    if config.name == "sgd":
        return 0.05
    return 4e-3 if architecture in _SMALL_MODELS else 1e-3


def build_optimiser(model: nn.Module, config: OptimiserConfig, learning_rate: float) -> torch.optim.Optimizer:
    """An optimiser over the trainable parameters; weight decay spares biases and normalisation layers."""
    groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in zip(_by_decay(model), (config.weight_decay, 0.0), strict=True)
        if params
    ]
    if config.name == "sgd":
        nesterov = config.momentum > 0
        return torch.optim.SGD(groups, lr=learning_rate, momentum=config.momentum, nesterov=nesterov, fused=True)
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return kind(groups, lr=learning_rate, betas=(config.momentum, 0.999), fused=True)


def _by_decay(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable matrices and filters, which decay; vectors and scalars (biases, norm), which do not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [p for p in trainable if p.ndim > 1], [p for p in trainable if p.ndim <= 1]


class Average:
    """Exponential moving average of a model's weights and buffers (Polyak and Juditsky, 1992).

    `model`: the averaged copy, in evaluation mode. The decay starts low and rises to `decay`, so that the random
    initial weights are forgotten at once.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(requires_grad=False)
        self._decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Moves the average towards `model` after `step` steps."""
        weight = 1 - min(self._decay, (1 + step) / (10 + step))
        mine, theirs = _tensors(self.model), _tensors(model)
        floating = [(a, b) for a, b in zip(mine, theirs, strict=True) if a.is_floating_point()]
        # One call instead of one per tensor: with small models this is most of the cost.
        torch._foreach_lerp_([a for a, _ in floating], [b for _, b in floating], weight)
        for a, b in zip(mine, theirs, strict=True):
            if not a.is_floating_point():
                a.copy_(b)  # BatchNorm counts its batches in integers


def _tensors(model: nn.Module) -> list[Tensor]:
    both: Iterable[Iterable[Tensor]] = (model.parameters(), model.buffers())
    return [tensor.detach() for group in both for tensor in group]
