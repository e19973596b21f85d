"""What a person sees while training runs: bars on a terminal, plain lines in a log file."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from service import terminal
from service.artifact import RejectedVariant, Variant
from training.calibrate import Calibration
from training.evaluate import TOP_K, Evaluation
from training.journal import Journal
from training.metrics import ClassScores
from training.read import Fault

_MOST_ROWS = 20


class _Rate(ProgressColumn):
    """Images per second, over the last seconds."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} img/s" if speed else "", style="cyan")


class Display:
    """Writes to one console; on anything but a terminal there are no bars, only a line per epoch."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, line: str) -> None:
        """One line; markup is not interpreted, so that paths stay as they are."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def show(self, table: Table) -> None:
        """A table."""
        self.console.print(table)

    @contextmanager
    def reading(self, files: int | None, what: str = "images") -> Iterator[Callable[[int], None]]:
        """A bar for reading so many files (None: unknown); yields what is told the number just done."""
        with self._bar() as bar:
            task = bar.add_task(f"Reading {what}", total=files, note="")
            yield lambda done: bar.advance(task, done)

    @contextmanager
    def training(
        self, images_per_epoch: int, epochs: int, done: int = 0, journal: Journal | None = None
    ) -> Iterator[TrainingView]:
        """A bar for the whole run, with the epoch, the loss and the latest validation figures beside it.

        `done`: epochs of a resumed run. `journal`: where the figures go, too.
        """
        with self._bar() as bar:
            yield TrainingView(self, bar, images_per_epoch, epochs, done, journal)

    @contextmanager
    def working(self, step: str) -> Iterator[Callable[[str], None]]:
        """A spinner with the time since the step began; yields what is told the next step."""
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        terminal = self.console.is_terminal
        with Progress(*columns, console=self.console, transient=True, disable=not terminal) as bar:
            task = bar.add_task(step, total=None)
            yield lambda following: bar.reset(task, total=None, description=following)

    def faults(self, faults: Sequence[Fault]) -> None:
        """Lists files that were set aside."""
        for fault in faults[:_MOST_ROWS]:
            self.say(f"  left out {fault.path}: {fault.message}")
        if len(faults) > _MOST_ROWS:
            self.say(f"  and {len(faults) - _MOST_ROWS} more")

    def evaluation(self, evaluation: Evaluation, classes: Sequence[str], what: str) -> None:
        """Accuracy, top-5 where it says something, and a table per class, hardest first if there are many."""
        top5 = f", top-{TOP_K} {evaluation.top5:.2%}" if len(classes) > TOP_K else ""
        self.say(f"{what}: accuracy {evaluation.accuracy:.2%}{top5} on {len(evaluation.labels)} images")
        self.console.print(class_table(evaluation.per_class(), classes))

    def calibration(self, found: Calibration) -> None:
        """What the temperature does to the confidence on the held-out images."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("calibration")
        table.add_column("before", justify="right")
        table.add_column(f"after, T = {found.temperature:.3g}", justify="right")
        table.add_row("expected calibration error", f"{found.error_before:.4f}", f"{found.error_after:.4f}")
        table.add_row("negative log-likelihood", f"{found.likelihood_before:.4f}", f"{found.likelihood_after:.4f}")
        self.console.print(table)

    def variants(self, kept: Sequence[Variant], rejected: Sequence[RejectedVariant]) -> None:
        """What the version has besides the float model, and why not more: a server takes the fastest that is right."""
        for variant in kept[1:]:
            self.say(f"{variant.name}: kept, accuracy {variant.accuracy:.2%}; {variant.note}")
        for refused in rejected:
            self.say(f"{refused.name}: not kept: {refused.reason}")

    def caution(self, *remarks: str) -> None:
        """What to know before the figures are believed; empty ones are left out."""
        for remark in filter(None, remarks):
            self.console.print(f"Note: {remark}", style="yellow", markup=False, highlight=False, soft_wrap=True)

    def _bar(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )


def console_of_process() -> Display:
    """A display on standard output; of several processes only the first one speaks.

    The stream is bound here: rich would look it up anew for every frame, and the frames would be lost while quantising,
    where the standard output is redirected to silence ONNX Runtime.
    """
    return Display(terminal.console(file=sys.stdout, quiet=os.environ.get("RANK", "0") != "0"))


class TrainingView:
    """Watches the loop (`training.loop.Watcher`)."""

    def __init__(
        self, display: Display, bar: Progress, images_per_epoch: int, epochs: int, done: int, journal: Journal | None
    ) -> None:
        self._display = display
        self._journal = journal
        self._loss = math.nan
        self._bar = bar
        self._epochs = epochs
        self._epoch = done
        self._validated = ""
        self._task = bar.add_task("", total=images_per_epoch * epochs, completed=images_per_epoch * done, note="")
        self._describe()

    def step(self, images: int, loss: float) -> None:
        """Moves the bar."""
        self._loss = self._loss if math.isnan(loss) else loss
        self._bar.update(self._task, advance=images, note=f"loss {self._loss:.3f}{self._validated}")

    def epoch(self, history: Sequence[Mapping[str, float]]) -> None:
        """Logs the epoch, and prints it where there is no bar to show it."""
        if self._journal:
            self._journal.write(history)
        figures = history[-1]
        self._epoch = int(figures["epoch"])
        if "val_accuracy" in figures:
            self._validated = f"  validation {figures['val_accuracy']:.2%}"
        if not self._display.console.is_terminal:
            self._display.say(
                f"epoch {self._epoch}/{self._epochs}  loss {figures['train_loss']:.4f}{self._validated}  "
                f"{figures['images_per_second']:,.0f} img/s"
            )
        self._describe()

    def _describe(self) -> None:
        self._bar.update(self._task, description=f"Training epoch {min(self._epoch + 1, self._epochs)}/{self._epochs}")


def class_table(scores: ClassScores, classes: Sequence[str]) -> Table:
    """Scores of each class; of many classes the hardest of those that have an image to be judged by."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("class")
    for name in ("precision", "recall", "F1", "images"):
        table.add_column(name, justify="right")
    rows = list(range(len(classes)))
    if len(rows) > _MOST_ROWS:
        rows = sorted((k for k in rows if scores.support[k]), key=lambda k: scores.f1[k])[:_MOST_ROWS]
        table.title = f"the {len(rows)} hardest of {len(classes)} classes"
    for k in rows:
        figures = (scores.precision[k], scores.recall[k], scores.f1[k])
        table.add_row(
            Text(terminal.printable(classes[k])), *(f"{figure:.3f}" for figure in figures), str(scores.support[k])
        )
    return table
