"""A worker of a study: takes a trial, trains it, reports every epoch, prunes, and takes the next."""

from __future__ import annotations

import gc
import math
import os
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import optuna
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from service.errors import ConfigurationError, TrainingError
from training.assemble import build_stepper, build_trainer, threads_for
from training.config import Experiment
from training.distributed import Group
from training.loop import StoppedError, Trainer
from training.memory import kept_memory
from training.models import describe
from training.prepared import Prepared
from training.run import repeatable
from training.search_space import is_whole, own_values, settled
from training.seeds import Purpose, derive
from training.study import SharedStudy, effective
from training.threads import limited_to
from training.transfer import plan
from training.trial_view import TrialView
from training.tune_config import Choices, Range, TuneConfig
from training.wording import first_line

# What a trial may fail with while the study goes on; PyTorch's running out of memory is a RuntimeError.
_FAULTS = (TrainingError, ConfigurationError, RuntimeError, MemoryError, FloatingPointError)
_LONGEST_MESSAGE = 300


class Worker:
    """Takes trials of a study and trains them, one after the other."""

    def __init__(
        self,
        base: Experiment,
        config: TuneConfig,
        space: Mapping[str, Range | Choices],
        shared: SharedStudy,
        data_of: Callable[[Experiment], Prepared],
        folder: Path,
        view: TrialView,
        stop: Callable[[], bool],
    ) -> None:
        """What a worker needs.

        `data_of`: reads images, or hands out those that are read. `folder`: for checkpoints of running trials. `stop`:
        asked after each step; True ends the work.
        """
        self._base, self._config, self._shared, self._view = base, config, shared, view
        self._data_of, self._folder, self._stop = data_of, folder, stop
        self._space = space
        self._distributions = {key: _distribution(base, key, dimension) for key, dimension in space.items()}

    def work(self) -> None:
        """Until no trial is left or it is told to stop; a trial that is cut short by that will be repeated."""
        while not self._stop() and self._next():
            self._view.finished()
            gc.collect()  # a failed trial's tensors hang on its traceback
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _next(self) -> bool:
        """Takes a trial and trains it; False if there is none, or it was cut short."""
        cut_short: list[int] = []
        with ExitStack() as claim:
            claim.enter_context(self._shared.claiming())
            if not self._shared.remaining(self._config.trials):
                return False
            self._prepare_sampler()

            def objective(trial: optuna.Trial) -> float:
                claim.close()  # this trial is ours, now the others may take theirs
                return self._judge(trial, cut_short)

            try:
                self._shared.study.optimize(objective, n_trials=1, catch=_FAULTS)
            except (StoppedError, KeyboardInterrupt) as stopped:
                for number in cut_short:
                    self._shared.put_back(number)
                if isinstance(stopped, KeyboardInterrupt):
                    raise
                return False
        return True

    def _judge(self, trial: optuna.Trial, cut_short: list[int]) -> float:
        self._view.taken(trial.number)
        try:
            return self._train(trial)
        except (StoppedError, KeyboardInterrupt):
            cut_short.append(trial.number)
            raise
        except _FAULTS as error:
            trial.set_user_attr("error", first_line(error)[:_LONGEST_MESSAGE])
            raise

    def _prepare_sampler(self) -> None:
        """What is drawn depends on the seed, the trial's number and the trials before it, and on no process."""
        study = self._shared.study
        number = len(effective(study.get_trials(deepcopy=False)))
        own = own_values(self._base, self._space)
        if number == 0 and own is not None:
            study.enqueue_trial(own)  # so that the result is never worse than what there was
        seed = derive(self._base.loop.seed, Purpose.SEARCH, number) % 2**32
        study.sampler = optuna.samplers.TPESampler(seed=seed)

    def _train(self, trial: optuna.Trial) -> float:
        values = {key: _suggest(trial, key, kind) for key, kind in self._distributions.items()}
        trial.set_user_attr("worker", f"{socket.gethostname()}:{os.getpid()}")
        # A trial that does not learn at all is a finding, not a fault: the sampler should see its figure.
        experiment = settled(self._base, {**values, "loop.stuck_epochs": 0})
        trial.set_user_attr("seed", experiment.loop.seed)
        data, entry = self._data_of(experiment), describe(experiment.model.name)
        phases = plan(experiment, entry)
        stepper, _ = build_stepper(experiment, entry, data, Group())
        with (
            tempfile.TemporaryDirectory(dir=self._folder, prefix=f"trial-{trial.number}-") as folder,
            limited_to(threads_for(experiment, stepper, data)),
            kept_memory(),
            repeatable(experiment.loop.deterministic),
        ):
            trainer = build_trainer(experiment, data, stepper, phases, Path(folder), Group())
            watcher = _Watcher(trial, self._config.objective, trainer, self._view)
            self._view.began(trainer.epochs)
            trainer.fit(watcher, self._stop)
        return watcher.best_value()


class _Watcher:
    """Watches the loop (`training.loop.Watcher`) for a trial: reports, and prunes."""

    def __init__(self, trial: optuna.Trial, objective: str, trainer: Trainer, view: TrialView) -> None:
        self._trial, self._objective, self._trainer, self._view = trial, objective, trainer, view

    def step(self, images: int, loss: float) -> None:
        """Nothing: a trial is told about by its epochs."""

    def epoch(self, history: Sequence[Mapping[str, float]]) -> None:
        """Reports the validation figure, and ends the trial if it is not worth going on."""
        figures = history[-1]
        epoch, value = int(figures["epoch"]), figures[f"val_{self._objective}"]
        if not math.isfinite(figures["val_loss"]):
            raise TrainingError(f"the validation loss became {figures['val_loss']} in epoch {epoch}")
        self._trial.report(value, epoch)
        best = self._best(history)
        self._trial.set_user_attr("best_epoch", int(best["epoch"]))
        self._trial.set_user_attr("val_loss", best["val_loss"])
        self._trial.set_user_attr("val_accuracy", best["val_accuracy"])
        self._view.epoch(epoch, value)
        if epoch < self._trainer.epochs and self._trial.should_prune():
            raise optuna.TrialPruned(f"stopped after epoch {epoch}")

    def best_value(self) -> float:
        """The objective at its best epoch."""
        return self._best(self._trainer.progress.history)[f"val_{self._objective}"]

    def _best(self, history: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
        if self._objective == "loss":
            return min(history, key=lambda figures: figures["val_loss"])
        return max(history, key=lambda figures: (figures["val_accuracy"], -figures["val_loss"]))


def _distribution(experiment: Experiment, key: str, dimension: Range | Choices) -> BaseDistribution:
    if isinstance(dimension, Choices):
        return CategoricalDistribution(dimension.choices)
    if is_whole(experiment, key):
        low, high, step = int(dimension.low), int(dimension.high), int(dimension.step or 1)
        return IntDistribution(low, high, log=dimension.log, step=step)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log, step=dimension.step)


def _suggest(trial: optuna.Trial, key: str, kind: BaseDistribution) -> bool | float | str | None:
    if isinstance(kind, CategoricalDistribution):
        return trial.suggest_categorical(key, kind.choices)
    if isinstance(kind, IntDistribution):
        return trial.suggest_int(key, kind.low, kind.high, log=kind.log, step=kind.step)
    if isinstance(kind, FloatDistribution):
        return trial.suggest_float(key, kind.low, kind.high, log=kind.log, step=kind.step)
    raise TypeError(kind)
