"""One optimisation step: forward, loss, backward, clip, update, average."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from training.augment import Augmenter
from training.batches import Batch
from training.config import Experiment
from training.distributed import Group
from training.mix import Mixed, Mixer
from training.models import Classifier, TrainingOutputs
from training.optimise import Average, build_optimiser
from training.phases import Phase
from training.pixels import Normaliser
from training.precision import Precision, autocast
from training.schedule import rate
from training.seeds import Purpose, derive, reseed


class Stepper:
    """Turns batches into updates of `model`. What it changes beside the weights is in `state`.

    `average`: the averaged weights, if any. `heads`: what the losses of all heads count together, that of the main
    one being 1. `learning_rate`: of the latest step. `fixed_rate`: instead of the schedule, if not None. `precision`:
    of the forward pass; set it before `begin`.
    """

    def __init__(
        self,
        model: Classifier,
        experiment: Experiment,
        normalise: Normaliser,
        *,
        class_weights: NDArray[np.float32] | None,
        device: torch.device,
        group: Group,
    ) -> None:
        # PyTorch's stubs leave memory_format out of the overloads.
        self.model: Classifier = model.to(device=device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = Average(model, experiment.loop.ema_decay) if experiment.loop.ema_decay else None
        self.learning_rate = 0.0
        self.heads = 1.0
        self.fixed_rate: float | None = None
        self.precision: Precision = "float32"
        self._experiment = experiment
        self._normalise = normalise
        self._augment = Augmenter(experiment.augment)
        self._mix = Mixer(experiment.augment, experiment.loop.seed)
        self._class_weights = None if class_weights is None else torch.from_numpy(class_weights).to(device)
        self.device = device
        self._group = group

    def begin(self, phase: Phase, peak: float, first_step: int, steps: int) -> None:
        """Starts a phase of training: what is frozen, and a new optimiser with a schedule of its own.

        Args:
            phase: what trains, and how fast.
            peak: learning rate that the phase's multiples refer to.
            first_step: number of the phase's first step.
            steps: in the phase.
        """
        self._phase, self._peak, self._first_step, self._steps = phase, peak, first_step, steps
        phase.freeze(self.model)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "float16")
        self._optimiser = build_optimiser(phase.groups(self.model), self._experiment.optimiser)
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._wrapped = self._group.wrap(self.model)
        self._forward = _compiled(self._wrapped) if self._experiment.loop.compile else self._wrapped

    def state(self) -> dict[str, Any]:
        """Tensors and plain values: weights, average, optimiser, scaler."""
        return {
            "model": self.model.state_dict(),
            "average": self.average.model.state_dict() if self.average else None,
            "optimiser": self._optimiser.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def load(self, state: dict[str, Any], *, with_optimiser: bool) -> None:
        """Takes over what `state` gave, after `begin`; optimiser and scaler only if they are of the same phase."""
        self.model.load_state_dict(state["model"])
        if self.average:
            self.average.model.load_state_dict(state["average"])
        if with_optimiser:
            self._optimiser.load_state_dict(state["optimiser"])
            self._scaler.load_state_dict(state["scaler"])

    def train(self) -> None:
        """Training mode, but for what the phase keeps frozen."""
        self._wrapped.train()
        self._phase.keep_frozen(self.model)

    def __call__(self, batch: Batch, step: int) -> Tensor:
        """One update; returns this process's share of the mean loss, detached, still on the device."""
        # The workers' dropout masks differ; those of a resumed run are the same as without the interruption.
        reseed(self.device, derive(self._experiment.loop.seed, Purpose.DROPOUT, step, self._group.rank))
        self._set_rate(step)
        self._optimiser.zero_grad()
        loss = torch.zeros((), device=self.device)
        pieces = list(self._pieces(batch))
        for number, piece in enumerate(pieces, 1):
            with self._synchronised(last=number == len(pieces)):
                loss += self._backward(piece, step)
        self._update(step)
        return loss

    def trial(self, batch: Batch) -> Callable[[Precision], None]:
        """Forward and backward on a copy of the model, of as many images as a step has at once: what is measured."""
        model, piece = copy.deepcopy(self.model).train(), next(self._pieces(batch))
        mixed = Mixed(self._inputs(piece), piece.labels.to(self.device))

        def run(precision: Precision) -> None:
            with autocast(precision, self.device):
                outputs = model(mixed.inputs)
            torch.autograd.backward(self._loss(outputs, mixed))

        return run

    def _set_rate(self, step: int) -> None:
        position = step - self._first_step
        scheduled = self._peak * rate(self._experiment.schedule, position, self._steps)
        self.learning_rate = scheduled if self.fixed_rate is None else self.fixed_rate
        for group in self._optimiser.param_groups:
            group["lr"] = self.learning_rate * group["multiple"]

    def _pieces(self, batch: Batch) -> Iterator[Batch]:
        # BatchNorm cannot learn from one image, and mixing needs two.
        pieces = min(self._experiment.loop.accumulate, max(1, len(batch.labels) // 2))
        columns: Sequence[Sequence[Tensor]] = [t.tensor_split(pieces) for t in batch[:3]]
        for images, labels, uniform in zip(*columns, strict=True):
            yield Batch(images, labels, uniform, batch.whole)

    def _synchronised(self, *, last: bool) -> Any:
        """Gradients travel between processes once per step, not once per piece."""
        if last or not isinstance(self._wrapped, DistributedDataParallel):
            return nullcontext()
        return self._wrapped.no_sync()

    def _backward(self, batch: Batch, step: int) -> Tensor:
        mixed = self._mix(self._inputs(batch), batch.labels.to(self.device, non_blocking=True), step)
        with autocast(self.precision, self.device):
            outputs = self._forward(mixed.inputs)
        loss = self._loss(outputs, mixed) / batch.whole
        # The processes' gradients are averaged, but their losses are shares of one mean: hence times world.
        torch.autograd.backward(self._scaler.scale(loss * self._group.world))
        return loss.detach()

    def _inputs(self, batch: Batch) -> Tensor:
        images = batch.images.to(self.device, non_blocking=True)
        return self._normalise(self._augment(images, batch.uniform.to(self.device, non_blocking=True)))

    def _loss(self, outputs: Tensor | TrainingOutputs, mixed: Mixed) -> Tensor:
        """Sum over the images, in float32, auxiliary heads included."""
        if isinstance(outputs, Tensor):
            return self._cross_entropy(outputs, mixed)
        self.heads = 1 + self.model.aux_weight * len(outputs.aux_logits)
        auxiliary = torch.stack([self._cross_entropy(aux, mixed) for aux in outputs.aux_logits])
        return self._cross_entropy(outputs.logits, mixed) + self.model.aux_weight * auxiliary.sum()

    def _cross_entropy(self, logits: Tensor, mixed: Mixed) -> Tensor:
        loss = self._entropy_of(logits.float(), mixed.labels)
        if mixed.partners is None:
            return loss
        return mixed.share * loss + (1 - mixed.share) * self._entropy_of(logits.float(), mixed.partners)

    def _entropy_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        smoothing = self._experiment.loop.label_smoothing
        if self._class_weights is None:
            return functional.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum")
        # PyTorch's own weights count in the smoothing, too: an image of a frequent class would be pulled to the rare
        # ones by more than it is to its own.
        each = functional.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")  # [N]
        return (each * self._class_weights[labels]).sum()

    def _update(self, step: int) -> None:
        clip_norm = self._experiment.optimiser.clip_norm
        if clip_norm is not None:
            self._scaler.unscale_(self._optimiser)
            nn.utils.clip_grad_norm_(self._parameters, clip_norm)
        self._scaler.step(self._optimiser)
        self._scaler.update()
        if self.average:
            self.average.update(step)


def _compiled(model: nn.Module) -> Callable[[Tensor], Tensor | TrainingOutputs]:
    with warnings.catch_warnings():
        # PyTorch's compiler imports a module of its own that uses what PyTorch has deprecated.
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.script_method", category=DeprecationWarning)
        return torch.compile(model)


def class_weights(labels: NDArray[np.int64], classes: int) -> NDArray[np.float32]:
    """float32[K], one over each class's size, scaled so that the mean over the images is 1; 1 for absent classes."""
    counts = np.bincount(labels, minlength=classes)
    weights = len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return np.where(counts > 0, weights, 1.0).astype(np.float32)
