"""The training loop: phases of epochs of steps, figures after each epoch, checkpoints to go on from exactly."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from service.errors import DataError, TrainingError
from training import checkpoint
from training.batches import Examples, Source
from training.config import Experiment
from training.distributed import Group
from training.evaluate import evaluate
from training.folders import LAST
from training.health import check_finite, check_moving
from training.phases import Phase
from training.pixels import Normaliser
from training.precision import Precision
from training.step import Stepper

BEST = "best.pt"

_CHECK_STEPS = 16  # a GPU is asked for its losses this often, so that it need not wait for Python


class Watcher(Protocol):
    """What the loop tells while it runs."""

    def step(self, images: int, loss: float) -> None:
        """So many images are done; `loss` is the latest known."""

    def epoch(self, history: Sequence[Mapping[str, float]]) -> None:
        """An epoch is done; the last entry is its figures."""


@dataclass
class Progress:
    """Where a run stands: all that is not inside the model and the optimiser.

    `epoch`: epochs done. `step`: steps done in all. `batch`: steps done in the current epoch, `loss_sum` and `images`
    over them. `learning_rate`: of the latest step. `best`: validation accuracy and negative loss of the best epoch,
    `best_epoch` its number from 1.
    """

    epoch: int = 0
    step: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    images: int = 0
    learning_rate: float = 0.0
    best: tuple[float, float] | None = None
    best_epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


class StoppedError(Exception):
    """The loop was asked to stop, and has written its checkpoint."""


class Trainer:
    """Trains one model. `evaluated` is what is validated and kept: the averaged weights, or the model itself."""

    def __init__(
        self,
        stepper: Stepper,
        source: Source,
        validation: Examples,
        normalise: Normaliser,
        experiment: Experiment,
        *,
        phases: Sequence[Phase],
        peak: float,
        folder: Path,
        identity: Mapping[str, Any],
        group: Group,
    ) -> None:
        """`identity`: what a checkpoint has to agree in to be continued (data, precision ...); plain values."""
        self.progress = Progress()
        self._stepper = stepper
        self._source = source
        self._validation = validation
        self._normalise = normalise
        self._loop = experiment.loop
        self._starts = dict(zip(accumulate((0, *(phase.epochs for phase in phases))), phases, strict=False))
        self._epochs = sum(phase.epochs for phase in phases)
        self._peak = peak
        self._folder = folder
        self._identity = dict(identity)
        self._group = group
        self._classes = stepper.model.config.num_classes
        self._begun: int | None = None
        self._pending: list[tuple[Tensor, int]] = []

    @property
    def evaluated(self) -> nn.Module:
        """The model that is validated and exported."""
        return self._stepper.average.model if self._stepper.average else self._stepper.model

    @property
    def precision(self) -> Precision:
        """Number format of the forward pass."""
        return self._stepper.precision

    @property
    def epochs(self) -> int:
        """Epochs of all phases."""
        return self._epochs

    def fit(self, watcher: Watcher, stop: Callable[[], bool] = lambda: False) -> None:
        """Trains to the end, then puts the best weights into `evaluated`.

        Args:
            watcher: told about steps and epochs.
            stop: asked after each step; True writes a checkpoint and raises `StoppedError`.

        Raises:
            TrainingError: the loss is no number any more or does not move, or a checkpoint cannot be written.
            StoppedError: `stop` was answered with True.
        """
        while self.progress.epoch < self.epochs and not self._out_of_patience():
            self._enter_phase()
            self._run_epoch(watcher, stop)
        self._group.wait()
        self.evaluated.load_state_dict(checkpoint.load(self._folder / BEST)["model"])

    def resume(self) -> None:
        """Takes over the run's last checkpoint.

        Raises:
            DataError: there is none, or it cannot be read; or the best weights are gone.
            TrainingError: it belongs to other data or another computation.
        """
        state = checkpoint.load(self._folder / LAST)
        before = state["identity"]
        changed = [_change(key, before.get(key), now) for key, now in self._identity.items() if before.get(key) != now]
        if changed:
            raise TrainingError(
                f"{self._folder / LAST} cannot be continued with what there is now: {'; '.join(changed)}. "
                "Resume with what it began with, or start a new run"
            )
        self.progress = Progress(**state["progress"])
        if self.progress.best_epoch and not (self._folder / BEST).is_file():
            raise DataError(
                f"{self._folder / BEST} is gone, the weights of epoch {self.progress.best_epoch}, the best so far; "
                "start a new run"
            )
        self._enter_phase()
        # At the very start of a phase its optimiser is new, and the checkpoint holds the one before it.
        new_phase = self.progress.epoch == self._phase_start() and self.progress.batch == 0
        self._stepper.load(state["stepper"], with_optimiser=not new_phase)

    def _phase_start(self) -> int:
        """First epoch of the phase that the current epoch belongs to; after the end, of the last phase."""
        return max(start for start in self._starts if start <= self.progress.epoch)

    def _enter_phase(self) -> None:
        """Begins the phase of the current epoch, unless it has begun."""
        start, steps = self._phase_start(), self._source.steps
        if self._begun != start:
            phase = self._starts[start]
            self._stepper.begin(phase, self._peak * phase.peak, start * steps, phase.epochs * steps)
            self._begun = start

    def _run_epoch(self, watcher: Watcher, stop: Callable[[], bool]) -> None:
        started, images_before = time.monotonic(), self.progress.images
        self._stepper.train()
        progress = self.progress
        for batch in self._source.batches(progress.epoch, progress.batch):
            self._pending.append((self._stepper(batch, progress.step), batch.whole))
            progress.step += 1
            progress.batch += 1
            progress.learning_rate = self._stepper.learning_rate
            last_check = self._drain() if self._due() else None
            watcher.step(batch.whole, last_check if last_check is not None else math.nan)
            self._pause(stop)
        self._drain()
        seconds = time.monotonic() - started
        self._close_epoch((progress.images - images_before) / seconds)
        watcher.epoch(progress.history)
        check_moving(progress.history, self._loop.stuck_epochs, self._classes, self._stepper.heads)

    def _due(self) -> bool:
        return self._stepper.device.type == "cpu" or len(self._pending) >= _CHECK_STEPS

    def _drain(self) -> float | None:
        """Reads the losses of the steps since the last time and adds them up; returns the latest."""
        latest = None
        for share, images in self._pending:
            (latest,) = self._group.sum([float(share)])
            check_finite(latest, self.progress.epoch + 1, self.progress.step)
            self.progress.loss_sum += latest * images
            self.progress.images += images
        self._pending.clear()
        return latest

    def _pause(self, stop: Callable[[], bool]) -> None:
        every = self._loop.checkpoint_steps
        if self._group.any(stop()):
            self._drain()
            self._save(LAST)
            raise StoppedError
        if every and self.progress.step % every == 0:
            self._drain()
            self._save(LAST)

    def _close_epoch(self, images_per_second: float) -> None:
        progress = self.progress
        figures = {
            "epoch": float(progress.epoch + 1),
            "learning_rate": progress.learning_rate,
            "train_loss": progress.loss_sum / progress.images,
            "images_per_second": images_per_second,
            **self._validate(),
        }
        progress.history.append(figures)
        progress.epoch += 1
        progress.batch, progress.images, progress.loss_sum = 0, 0, 0.0
        if self._is_best(figures):
            progress.best_epoch = progress.epoch
            self._save_best()
        self._save(LAST)

    def _validate(self) -> dict[str, float]:
        if not len(self._validation):
            return {}
        found = evaluate(
            self.evaluated, self._validation, self._normalise, at_once=self._loop.images_at_once, group=self._group
        )
        return {"val_loss": found.loss, "val_accuracy": found.accuracy}

    def _is_best(self, figures: Mapping[str, float]) -> bool:
        """Highest validation accuracy, then lowest validation loss; without validation images always the newest."""
        if "val_accuracy" not in figures:
            return True
        score = (figures["val_accuracy"], -figures["val_loss"])
        if self.progress.best is not None and not score > self.progress.best:  # a loss that is no number beats none
            return False
        self.progress.best = score
        return True

    def _out_of_patience(self) -> bool:
        """Only in the last phase, and by its epochs: the earlier ones are short, and what they train is not all."""
        patience, last, progress = self._loop.patience, max(self._starts), self.progress
        return patience is not None and progress.epoch - max(progress.best_epoch, last) >= patience

    def _save(self, name: str) -> None:
        if self._group.main:
            state = {
                "stepper": self._stepper.state(),
                "progress": vars(self.progress),
                "identity": self._identity,
            }
            checkpoint.save(self._folder / name, state)

    def _save_best(self) -> None:
        if self._group.main:
            config = self._stepper.model.config
            state = {
                "model": self.evaluated.state_dict(),
                "architecture": config.name,
                "num_classes": config.num_classes,
                "in_channels": config.in_channels,
                "options": config.options(),
                "mean": self._normalise.mean,
                "std": self._normalise.std,
                "epoch": self.progress.epoch,
            }
            checkpoint.save(self._folder / BEST, state)


def _change(key: str, before: Any, now: Any) -> str:
    if key == "data":
        return "images were added, removed or changed, or their labels or the split were"
    return f"{key} was {before}, and is {now}"
