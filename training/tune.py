"""Tuning: trials of short training runs, each judged by the validation images alone.

The images are read once per process, and the test part is never looked at.
"""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from service.artifact import NAME_PATTERN
from service.errors import ConfigurationError, TrainingError
from training.assemble import build_stepper, build_trainer
from training.config import Experiment
from training.display import Display
from training.distributed import Group, processes
from training.folders import check_apart, check_writable
from training.interrupt import Interruption, held_back
from training.models import describe
from training.prepare import input_spec, prepare
from training.prepared import Prepared
from training.search_space import check_space, default_space, rounded, settled
from training.study import Heartbeat, SharedStudy, storage_url
from training.transfer import plan
from training.trial_view import TrialView, best_of
from training.tune_config import Choices, HyperbandConfig, MedianConfig, Range, TuneConfig, Value
from training.tune_report import write_experiment, write_page
from training.tune_worker import Worker


@dataclass(frozen=True)
class Tuning:
    """A study to work on.

    `experiment`: what every trial is a variation of. `config`: the search. `source`: the images. `runs`: the images'
    cache and checkpoints of running trials go below it. `storage`: URL. `study`: name. `output`: experiment file to
    write; the page with the plots goes beside it.
    """

    experiment: Experiment
    config: TuneConfig
    source: Path
    runs: Path
    storage: str
    study: str
    output: Path
    heartbeat: Heartbeat = field(default_factory=Heartbeat)


@dataclass(frozen=True)
class Outcome:
    """What a worker leaves behind.

    `best`: the best trial of the study so far, None if none has finished; `tuned`: the values it tried, by setting.
    `page`: with the plots. `signal`: that stopped the worker, or None. `left`: trials that are still
    to be begun or repeated. `elsewhere`: trials that other workers are busy with.
    """

    best: FrozenTrial | None
    tuned: Mapping[str, Value]
    page: Path
    signal: int | None
    left: int
    elsewhere: int


def tune(job: Tuning, display: Display) -> Outcome:
    """Works on the study until its trials are used up, the time is over, or a signal comes.

    Raises:
        ConfigurationError: the space, the storage or the experiment cannot be used, or the study is of another kind.
        DataError: the images cannot be used.
        TrainingError: all trials have failed, or the storage fails.
    """
    began = time.monotonic()
    if processes() > 1:
        raise ConfigurationError("tuning is not started by torchrun; start `convoy tune` several times instead")
    check_apart(job.source, {"--runs": job.runs})
    if not re.fullmatch(NAME_PATTERN, job.study):
        raise ConfigurationError(f"study {job.study!r} may hold letters, digits and ._- only; choose another --study")
    space = dict(job.config.space) or default_space(job.experiment)
    check_space(job.experiment, space)
    url = storage_url(job.storage)
    images = Images(job, display)
    data = images.of(job.experiment)
    if not len(data.split.validation):
        raise ConfigurationError("tuning compares trials by validation images, and there are none; set --validation")
    folder = job.runs / job.experiment.name / "tuning" / job.study
    check_writable(folder, "the folder of runs")
    check_writable(job.output.parent, "the folder of the result")
    folder.mkdir(parents=True, exist_ok=True)
    job.output.parent.mkdir(parents=True, exist_ok=True)
    shared = SharedStudy(
        url,
        job.study,
        direction="maximize" if job.config.objective == "accuracy" else "minimize",
        pruner=_pruner(job.config, job.experiment.loop.epochs),
        heartbeat=job.heartbeat,
    )
    try:
        with shared.failures_told():
            agreed = shared.agree(_kind(job, space, data, folder))
            base = settled(job.experiment, {"loop.precision": agreed["free"]["precision"]})
            deadline = began + job.config.timeout_s if job.config.timeout_s else math.inf
            with held_back() as interruption, TrialView(display, shared.study, job.config) as view:

                def stop() -> bool:
                    return interruption.requested or time.monotonic() >= deadline

                Worker(base, job.config, space, shared, images.of, folder, view, stop).work()
            return _conclude(job, base, shared, folder, interruption)
    finally:
        shared.close()


class Images:
    """The images of a study, read once for each input that trials ask for."""

    def __init__(self, job: Tuning, display: Display) -> None:
        self._job = job
        self._display = display
        self._read: dict[str, Prepared] = {}

    def of(self, experiment: Experiment) -> Prepared:
        """The data of a trial."""
        entry = describe(experiment.model.name)
        spec = input_spec(
            experiment.input, entry, experiment.input.channels or entry.channels, experiment.model.options
        )
        weights = entry.name if experiment.transfer.weights else ""
        sizes = f"{spec.model_dump_json()} {experiment.input.train_size}"
        key = f"{sizes} {experiment.model.options.get('small_images')} {weights}"
        if key not in self._read:
            cache = self._job.runs / self._job.experiment.name / "cache"
            self._read[key] = prepare(experiment, entry, self._job.source, cache, self._display, Group())
            self._introduce(self._read[key])
        return self._read[key]

    def _introduce(self, data: Prepared) -> None:
        spec = data.spec
        self._display.faults(data.faults)
        self._display.say(
            f"{self._job.source}: {len(data.train_labels())} images to train, {len(data.split.validation)} to validate "
            f"on {spec.width}x{spec.height}x{spec.channels}; the {len(data.split.test)} of the test part are not used"
        )


def _kind(job: Tuning, space: Mapping[str, Range | Choices], data: Prepared, folder: Path) -> dict[str, object]:
    """What trials must have in common to be comparable; of `free` the study's first worker decides."""
    return {
        "data": data.digest(),
        "objective": job.config.objective,
        "space": {key: dimension.model_dump(mode="json") for key, dimension in space.items()},
        "experiment": job.experiment.model_dump(mode="json"),
        "free": {"precision": _precision(job.experiment, data, folder)},
    }


def _precision(experiment: Experiment, data: Prepared, folder: Path) -> str:
    """Measured once for the whole study: trials in different number formats would not be comparable."""
    if experiment.loop.precision != "auto":
        return experiment.loop.precision
    entry = describe(experiment.model.name)
    stepper, _ = build_stepper(experiment, entry, data, Group())
    return build_trainer(experiment, data, stepper, plan(experiment, entry), folder, Group()).precision


def _pruner(config: TuneConfig, epochs: int) -> optuna.pruners.BasePruner:
    pruner = config.pruner
    if isinstance(pruner, MedianConfig):
        return optuna.pruners.MedianPruner(
            pruner.startup_trials, pruner.warmup_epochs + 1
        )  # counts from 0, epochs from 1
    if isinstance(pruner, HyperbandConfig):
        return optuna.pruners.HyperbandPruner(
            pruner.min_epochs, max(epochs, pruner.min_epochs), pruner.reduction_factor
        )
    return optuna.pruners.NopPruner()


def _conclude(job: Tuning, base: Experiment, shared: SharedStudy, folder: Path, interruption: Interruption) -> Outcome:
    trials = shared.study.get_trials(deepcopy=False)
    running = [trial for trial in trials if trial.state == TrialState.RUNNING]
    left = shared.remaining(job.config.trials)
    if not running and not left:
        for leftover in folder.glob("trial-*"):  # of workers that were killed
            shutil.rmtree(leftover, ignore_errors=True)
    best = best_of(trials, job.config.objective)
    page = job.output.with_suffix(".html")
    if best:
        write_experiment(job.output, settled(base, best.params), best, job.study, job.source)
        write_page(page, shared.study, job.config.objective, best)
    elif not left and not running and interruption.signal is None:
        errors = [trial.user_attrs["error"] for trial in trials if "error" in trial.user_attrs]
        raise TrainingError(f"none of {len(trials)} trials finished; the last failed with: {(errors or ['?'])[-1]}")
    tuned = {key: rounded(value) for key, value in best.params.items()} if best else {}
    return Outcome(best, tuned, page, interruption.signal, left, len(running))
