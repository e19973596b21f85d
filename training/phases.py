"""Phases of a run: which parts of the network train, and how fast. From scratch there is one phase.

Transfer strategies (`training.transfer.plan`) are lists of phases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from training.models import within


@dataclass(frozen=True)
class Phase:
    """So many epochs in which each stage of the network learns at its own multiple of the learning rate.

    `stages`: module prefixes and the multiple of their learning rate; 0 freezes a stage. Parameters outside of all
    stages (auxiliary heads) learn at the full rate. `freeze_norm`: BatchNorm keeps its statistics everywhere.
    """

    name: str
    epochs: int
    peak: float = 1.0
    stages: tuple[tuple[tuple[str, ...], float], ...] = ()
    freeze_norm: bool = False

    def freeze(self, model: nn.Module) -> None:
        """Takes gradients from what is frozen, and gives them to everything else."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.multiple(name) > 0)

    def keep_frozen(self, model: nn.Module) -> None:
        """Puts frozen BatchNorm layers back into evaluation mode, which `train()` has taken them out of.

        Otherwise their statistics would follow the new images although their weights may not.
        """
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm) and (self.freeze_norm or not self.multiple(name)):
                module.eval()

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Optimiser groups {params, multiple, decays}: one per multiple and kind.

        Vectors and scalars (biases, normalisation) are spared by weight decay.
        """
        groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault((self.multiple(name), parameter.ndim > 1), []).append(parameter)
        return [{"params": p, "multiple": multiple, "decays": decays} for (multiple, decays), p in groups.items()]

    def multiple(self, name: str) -> float:
        """Multiple of the learning rate for a parameter or module; the first stage that holds it counts."""
        for prefixes, multiple in self.stages:
            if within(name, prefixes):
                return multiple
        return 1.0
