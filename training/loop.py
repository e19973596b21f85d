"""The training loop: batches through the model, epoch after epoch, the best state kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from service.errors import TrainingError
from training import checkpoint
from training.augment import Augmenter, draws
from training.batches import batches_per_epoch, epoch_batches
from training.config import Experiment
from training.evaluate import evaluate
from training.models import Classifier, Outputs
from training.optimise import Average, build_optimiser, peak_rate
from training.pixels import Normaliser, unit_range
from training.schedule import rate
from training.seeds import Purpose, derive

BEST = "best.pt"
LAST = "last.pt"


@dataclass(frozen=True)
class Examples:
    """Images of one part of the split: `images[indices]` is uint8[N, H, W, C], `labels[indices]` int64[N]."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    indices: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, positions: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """uint8[N, H, W, C] and int64[N] at these positions of the part."""
        chosen = self.indices[positions]
        return torch.from_numpy(self.images[chosen]), torch.from_numpy(self.labels[chosen])


class Watcher(Protocol):
    """What the loop tells while it runs."""

    def step(self, images: int, loss: float) -> None:
        """A batch of so many images is done."""

    def epoch(self, figures: Mapping[str, float]) -> None:
        """An epoch is done."""


@dataclass
class Progress:
    """Where a run stands: all that is not inside the model and the optimiser."""

    epoch: int = 0
    step: int = 0
    best: tuple[float, float] | None = None
    history: list[dict[str, float]] = field(default_factory=list)


class Trainer:
    """Trains one model on in-memory images.

    `model` is trained in place; `averaged` is what is evaluated and kept: the moving average, or the model itself.
    """

    def __init__(
        self, model: Classifier, train: Examples, validation: Examples, normalise: Normaliser, experiment: Experiment
    ) -> None:
        self.model = model
        self.progress = Progress()
        self._train = train
        self._validation = validation
        self._normalise = normalise
        self._experiment = experiment
        self._loop = experiment.loop
        self._augment = Augmenter(experiment.augment)
        self._peak_rate = peak_rate(experiment.optimiser, model.config.name)
        self._optimiser = build_optimiser(model, experiment.optimiser, self._peak_rate)
        self._average = Average(model, self._loop.ema_decay) if self._loop.ema_decay else None
        self._total_steps = self._loop.epochs * batches_per_epoch(len(train), self._loop.batch_size)

    @property
    def averaged(self) -> nn.Module:
        """The model that is evaluated."""
        return self._average.model if self._average else self.model

    def fit(self, folder: Path, watcher: Watcher) -> None:
        """Trains to the last epoch, then puts the best state into `averaged`.

        Args:
            folder: where `best.pt` and `last.pt` go.
            watcher: told about each step and epoch.

        Raises:
            TrainingError: the loss is no number any more, or a checkpoint cannot be written.
        """
        while self.progress.epoch < self._loop.epochs:
            started = time.monotonic()
            loss = self._run_epoch(watcher.step)
            figures = self._figures(loss, time.monotonic() - started)
            self.progress.epoch += 1
            self.progress.history.append(figures)
            if self._is_best(figures):
                checkpoint.save(folder / BEST, self.export_state())
            checkpoint.save(folder / LAST, self.state())
            watcher.epoch(figures)
        self.averaged.load_state_dict(checkpoint.load(folder / BEST)["model"])

    def export_state(self) -> dict[str, Any]:
        """The averaged model alone, for the `best.pt` that evaluation and export read."""
        return {
            "model": self.averaged.state_dict(),
            "architecture": self.model.config.name,
            "options": self.model.config.options(),
            "epoch": self.progress.epoch,
        }

    def state(self) -> dict[str, Any]:
        """All that is needed to go on."""
        return {
            "model": self.model.state_dict(),
            "average": self._average.model.state_dict() if self._average else None,
            "optimiser": self._optimiser.state_dict(),
            "progress": vars(self.progress),
            "experiment": self._experiment.model_dump(mode="json"),
        }

    def _run_epoch(self, advance: Callable[[int, float], None]) -> float:
        self.model.train()
        epoch = self.progress.epoch
        uniform = draws(len(self._train), self._loop.seed, epoch)
        total = 0.0
        for positions in epoch_batches(len(self._train), self._loop.batch_size, self._loop.seed, epoch):
            images, labels = self._train.batch(positions)
            loss = self._run_step(images, labels, uniform[torch.from_numpy(positions)])
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss became {loss} in epoch {epoch + 1}, step {self.progress.step + 1}; "
                    "use a lower --learning-rate, a longer warm-up, or clip the gradient"
                )
            self.progress.step += 1
            total += loss * len(labels)
            advance(len(labels), loss)
        return total / len(self._train)

    def _run_step(self, images: Tensor, labels: Tensor, uniform: Tensor) -> float:
        torch.manual_seed(derive(self._loop.seed, Purpose.DROPOUT, self.progress.step))
        learning_rate = self._peak_rate * rate(self._experiment.schedule, self.progress.step, self._total_steps)
        for group in self._optimiser.param_groups:
            group["lr"] = learning_rate
        inputs = self._normalise(self._augment(unit_range(images), uniform))
        loss = self._loss(self.model(inputs), labels)
        self._optimiser.zero_grad()
        torch.autograd.backward(loss)
        clip_norm = self._experiment.optimiser.clip_norm
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), clip_norm)
        self._optimiser.step()
        if self._average:
            self._average.update(self.model, self.progress.step)
        return float(loss.detach())

    def _loss(self, outputs: Tensor | Outputs, labels: Tensor) -> Tensor:
        smoothing = self._loop.label_smoothing
        if isinstance(outputs, Tensor):
            return functional.cross_entropy(outputs, labels, label_smoothing=smoothing)
        auxiliary = [functional.cross_entropy(aux, labels, label_smoothing=smoothing) for aux in outputs.aux_logits]
        main = functional.cross_entropy(outputs.logits, labels, label_smoothing=smoothing)
        return main + self.model.aux_weight * torch.stack(auxiliary).sum()

    def _figures(self, loss: float, seconds: float) -> dict[str, float]:
        figures = {
            "epoch": float(self.progress.epoch + 1),
            "learning_rate": float(self._optimiser.param_groups[0]["lr"]),
            "train_loss": loss,
            "images_per_second": len(self._train) / seconds,
        }
        if len(self._validation):
            part = self._validation
            found = evaluate(self.averaged, part.images[part.indices], part.labels[part.indices], self._normalise)
            figures |= {"validation_loss": found.loss, "validation_accuracy": found.accuracy}
        return figures

    def _is_best(self, figures: Mapping[str, float]) -> bool:
        """Highest validation accuracy, then lowest validation loss; without validation images always the newest."""
        if "validation_accuracy" not in figures:
            return True
        score = (figures["validation_accuracy"], -figures["validation_loss"])
        if self.progress.best is not None and score <= self.progress.best:
            return False
        self.progress.best = score
        return True
