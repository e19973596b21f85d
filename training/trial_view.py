"""What a person sees of a study while it runs: a table on a terminal, a line per trial in a log file."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import optuna
from optuna.trial import FrozenTrial, TrialState
from rich.live import Live
from rich.table import Table
from rich.text import Text

from training.display import Display
from training.study import effective
from training.tune_config import TuneConfig

_BEST_ROWS = 5
_NEWEST_ROWS = 10
_STATES = {
    TrialState.COMPLETE: ("done", ""),
    TrialState.PRUNED: ("pruned", "yellow"),
    TrialState.FAIL: ("failed", "red"),
    TrialState.RUNNING: ("running", "cyan"),
    TrialState.WAITING: ("waiting", "dim"),
}


class TrialView:
    """Shows the trials of a study, those of other workers too."""

    def __init__(self, display: Display, study: optuna.Study, config: TuneConfig) -> None:
        self._display, self._study, self._config = display, study, config
        console = display.console
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._number, self._note, self._epochs = -1, "", 0

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()
            self._display.show(self._table())

    def taken(self, number: int) -> None:
        """This process has taken a trial; it may fail before it trains."""
        self._number, self._note = number, ""

    def began(self, epochs: int) -> None:
        """The trial trains, for so many epochs."""
        self._epochs, self._note = epochs, f"0/{epochs}"
        self._refresh()

    def epoch(self, epoch: int, value: float) -> None:
        """An epoch of this process's trial is done, with that validation figure."""
        self._note = f"{epoch}/{self._epochs}  {shown(value, self._config.objective)}"
        self._refresh()

    def finished(self) -> None:
        """This process's trial is over."""
        if self._live:
            self._refresh()
            return
        trial = self._study.get_trials(deepcopy=False)[self._number]
        values = "  ".join(f"{key}={brief(value)}" for key, value in trial.params.items())
        self._display.say(f"trial {trial.number}: {outcome(trial, self._config.objective)}  {values}")

    def _refresh(self) -> None:
        if self._live:
            self._live.update(self._table(), refresh=True)

    def _table(self) -> Table:
        trials = effective(self._study.get_trials(deepcopy=False))
        best = best_of(trials, self._config.objective)
        keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("trial", "state", self._config.objective, *(key.rpartition(".")[2] for key in keys)):
            table.add_column(name.replace("_", "\n"), justify="left" if name == "state" else "right", no_wrap=True)
        for trial in _rows(trials, self._config.objective):
            word, colour = _STATES[trial.state]
            figure = self._note if self._is_mine(trial) else _figure(trial, self._config.objective)
            cells = (str(trial.number), word, figure, *(brief(trial.params.get(key, "")) for key in keys))
            winner = best is not None and trial.number == best.number
            table.add_row(*(Text(cell) for cell in cells), style="bold green" if winner else colour)
        table.title, table.title_justify = f"{self._study.study_name}: {_counts(trials)}", "left"
        return table

    def _is_mine(self, trial: FrozenTrial) -> bool:
        return trial.number == self._number and trial.state == TrialState.RUNNING


def best_of(trials: Sequence[FrozenTrial], objective: str) -> FrozenTrial | None:
    """The best trial that ran to its end; of equally accurate ones that with the lowest validation loss."""
    return next(iter(ranked(trials, objective)), None)


def ranked(trials: Sequence[FrozenTrial], objective: str) -> list[FrozenTrial]:
    """The trials that ran to their end, best first."""
    done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if objective == "loss":
        return sorted(done, key=lambda trial: (trial.user_attrs["val_loss"], trial.number))
    return sorted(done, key=lambda t: (-t.user_attrs["val_accuracy"], t.user_attrs["val_loss"], t.number))


def outcome(trial: FrozenTrial, objective: str) -> str:
    """How a trial ended, in a few words."""
    count = len(trial.intermediate_values)
    epochs = f"{count} epoch" if count == 1 else f"{count} epochs"
    if trial.state == TrialState.FAIL:
        return f"failed: {trial.user_attrs.get('error', 'its worker stopped')}"
    if trial.state == TrialState.PRUNED:
        return f"pruned after {epochs} at {_figure(trial, objective)}"
    seconds = trial.duration.total_seconds() if trial.duration else 0.0
    return f"{_figure(trial, objective)} after {epochs} in {seconds:.1f} s"


def shown(value: float, objective: str) -> str:
    """A figure as people write it."""
    return f"{value:.2%}" if objective == "accuracy" else f"{value:.4f}"


def brief(value: Any) -> str:
    """A setting in a table."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _figure(trial: FrozenTrial, objective: str) -> str:
    if trial.state == TrialState.COMPLETE and trial.value is not None:
        return shown(trial.value, objective)
    last = trial.last_step
    return shown(trial.intermediate_values[last], objective) if last is not None else ""


def _rows(trials: Sequence[FrozenTrial], objective: str) -> list[FrozenTrial]:
    chosen = {trial.number for trial in (*ranked(trials, objective)[:_BEST_ROWS], *trials[-_NEWEST_ROWS:])}
    return [trial for trial in trials if trial.number in chosen]


def _counts(trials: Sequence[FrozenTrial]) -> str:
    counts = {word: sum(trial.state == state for trial in trials) for state, (word, _) in _STATES.items()}
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count)
