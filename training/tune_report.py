"""The result of a study: an experiment file that `convoy train` takes, and a page of plots."""

from __future__ import annotations

import base64
import io
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import yaml
from jinja2 import Environment
from optuna.trial import FrozenTrial, TrialState

from service.beside import file_beside
from training.axes import cut_off, log_axis, short_names
from training.config import Experiment
from training.study import effective
from training.trial_view import brief, outcome, ranked, shown

_MOST_ROWS = 200
_BLUE, _ORANGE, _GRAY = "#2563eb", "#ea580c", "#9ca3af"
_FEWEST_FOR_IMPORTANCE = 6

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ study }}</title>
<style>
 body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2rem auto;padding:0 1rem;color:#111827}
 h1{font-size:1.5rem;margin-bottom:.2rem} h2{font-size:1.1rem;margin-top:2rem} img{width:100%}
 table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:13px;display:block;overflow-x:auto}
 th,td{padding:.25rem .6rem;text-align:right;border-bottom:1px solid #e5e7eb;white-space:nowrap}
 th:nth-child(2),td:nth-child(2){text-align:left;white-space:normal;min-width:11rem}
 tr.best{background:#dcfce7;font-weight:600}
</style>
<h1>Study {{ study }}</h1>
<p>{{ summary }}</p>
{% for title, text, picture in plots %}<h2>{{ title }}</h2><p>{{ text }}</p>
<img alt="{{ title }}" src="data:image/svg+xml;base64,{{ picture }}">
{% endfor %}
<h2>Trials</h2>
<table><tr><th>trial</th><th>outcome</th>{% for key in keys %}<th>{{ key }}</th>{% endfor %}</tr>
{% for best, cells in rows %}<tr{% if best %} class="best"{% endif %}>
{%- for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
</html>
"""


def write_experiment(file: Path, experiment: Experiment, best: FrozenTrial, study: str, source: Path) -> None:
    """Writes the best trial's settings, all of them, so that the file means the same when defaults change."""
    accuracy, loss = best.user_attrs["val_accuracy"], best.user_attrs["val_loss"]
    lines = [
        f"Best of study {study}: trial {best.number}, validation accuracy {accuracy:.2%}, validation loss {loss:.4f}",
        f"(epoch {best.user_attrs['best_epoch']} of {experiment.loop.epochs}).",
        "",
        f"  convoy train {shlex.quote(str(source))} --config {shlex.quote(str(file))}",
        "",
        "Tuned:",
        *(f"  {key}: {brief(value)}" for key, value in best.params.items()),
    ]
    head = "".join(f"# {line}".rstrip() + "\n" for line in lines)
    _write(file, head + yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False))


def write_page(file: Path, study: optuna.Study, objective: str, best: FrozenTrial) -> None:
    """Writes one HTML file that needs nothing else: history, importances, slices, parallel coordinates, all trials."""
    trials = effective(study.get_trials(deepcopy=False))
    keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
    order = {trial.number: rank for rank, trial in enumerate(ranked(trials, objective))}
    short = short_names(keys)
    rows = [
        (t.number == best.number, (t.number, outcome(t, objective), *(brief(t.params.get(key, "")) for key in keys)))
        for t in sorted(trials, key=lambda t: (order.get(t.number, len(trials)), t.number))[:_MOST_ROWS]
    ]
    done = len(order)
    summary = (
        f"{len(trials)} trials, {done} of them to the end. The best is trial {best.number}: validation accuracy "
        f"{best.user_attrs['val_accuracy']:.2%}, validation loss {best.user_attrs['val_loss']:.4f}."
    )
    page = Environment(autoescape=True).from_string(_PAGE)
    plots = _plots(study, trials, keys, objective, best)
    _write(file, page.render(study=study.study_name, summary=summary, plots=plots, keys=short, rows=rows))


def _plots(
    study: optuna.Study, trials: Sequence[FrozenTrial], keys: Sequence[str], objective: str, best: FrozenTrial
) -> list[tuple[str, str, str]]:
    done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    importances = _importances(study, done)
    found = [("History", "Every trial in the order it began; the line is the best so far.",
              _svg(lambda axes: _history(axes[0, 0], trials, objective), 9, 3.2))]  # fmt: skip
    if importances:
        text = "Share of each setting in the variance between trials (fANOVA); rough while there are few."
        found.append(
            ("Importance", text, _svg(lambda a: _bars(a[0, 0], importances), 9, 0.7 + 0.36 * len(importances)))
        )
    varied = [key for key in keys if len({repr(trial.params.get(key)) for trial in done}) > 1]
    if varied:
        found.append(("Slices", "The figure over each setting; darker is later.", _slices(done, varied, objective)))
        text = "One line per trial, the darker the better; the best one is orange."
        found.append(
            ("Parallel coordinates", text, _svg(lambda a: _parallel(a[0, 0], done, varied, best, objective), 9, 4))
        )
    return found


def _importances(study: optuna.Study, done: Sequence[FrozenTrial]) -> dict[str, float]:
    """Empty while there are too few trials, or all are equally good."""
    if len(done) < _FEWEST_FOR_IMPORTANCE or len({trial.value for trial in done}) == 1:
        return {}
    found = optuna.importance.get_param_importances(
        study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0)
    )
    return {key: value for key, value in found.items() if math.isfinite(value)}


def _history(axes: Any, trials: Sequence[FrozenTrial], objective: str) -> None:
    done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    pruned = [t for t in trials if t.state == TrialState.PRUNED and t.intermediate_values]
    last = [trial.intermediate_values[max(trial.intermediate_values)] for trial in pruned]
    axes.scatter([t.number for t in pruned], last, s=18, color=_GRAY, marker="x", label="pruned")
    axes.scatter([t.number for t in done], [t.value for t in done], s=22, color=_BLUE, label="done")
    best = np.maximum if objective == "accuracy" else np.minimum
    axes.step(
        [t.number for t in done],
        best.accumulate(np.array([t.value for t in done], dtype=float)),
        where="post",
        color=_ORANGE,
    )
    axes.set(xlabel="trial", ylabel=f"validation {objective}")
    if objective == "loss":
        cut_off(axes, [*(trial.value for trial in done), *last])
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)


def _bars(axes: Any, importances: Mapping[str, float]) -> None:
    names = list(importances)[::-1]
    bars = axes.barh(names, [importances[name] for name in names], color=_BLUE)
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set(xlabel="importance")
    axes.margins(x=0.1)


def _slices(done: Sequence[FrozenTrial], keys: Sequence[str], objective: str) -> str:
    columns = min(3, len(keys))
    rows = math.ceil(len(keys) / columns)

    def draw(all_axes: Any) -> None:
        for key, axes in zip(keys, all_axes.flat, strict=False):
            places, ticks = _places(done, key)
            axes.scatter(places, [t.value for t in done], c=[t.number for t in done], cmap="Blues", s=24,
                         vmin=-len(done) / 2, edgecolors="#1e3a8a", linewidths=0.4)  # fmt: skip
            axes.set(xlabel=key)
            if ticks:
                axes.set_xticks(range(len(ticks)), ticks)
                axes.set_xlim(-0.5, len(ticks) - 0.5)
            elif _is_log(done, key):
                log_axis(axes, places)
        for axes in all_axes.flat[len(keys) :]:
            axes.set_visible(False)
        for axes in all_axes[:, 0]:
            axes.set_ylabel(f"validation {objective}")
        if objective == "loss":
            cut_off(all_axes[0, -1], [trial.value for trial in done])  # all have the same axis

    return _svg(draw, 9, 2.6 * rows, rows, columns)


def _parallel(axes: Any, done: Sequence[FrozenTrial], keys: Sequence[str], best: FrozenTrial, objective: str) -> None:
    """One axis per setting and one for the figure, each from its lowest to its highest value."""
    from matplotlib import colormaps

    values = np.array([trial.value for trial in done], dtype=float)
    columns, labels = [], []
    for key, short in zip(keys, short_names(keys), strict=True):
        places, ticks = _places(done, key)
        column = np.array(places, dtype=float)
        column = np.log(column) if _is_log(done, key) else column
        ends = (
            (ticks[int(min(places))], ticks[int(max(places))])
            if ticks
            else tuple(brief(float(end)) for end in (min(places), max(places)))
        )
        columns.append(_spread(column))
        labels.append((short, *ends))
    lines = np.column_stack([*columns, _spread(values)])
    labels.append((objective, shown(values.min(), objective), shown(values.max(), objective)))
    ranks = values.argsort().argsort() / max(1, len(values) - 1)
    goodness = ranks if objective == "accuracy" else 1 - ranks
    for row in goodness.argsort():
        winner = done[row].number == best.number
        colour = _ORANGE if winner else colormaps["Blues"](0.25 + 0.7 * goodness[row])
        axes.plot(lines[row], color=colour, linewidth=2.5 if winner else 1, zorder=3 if winner else 2)
    for place, (name, low, high) in enumerate(labels):
        axes.vlines(place, 0, 1, color="0.6", linewidth=0.8)
        for text, height, side in ((high, 1.03, "bottom"), (low, -0.03, "top"), (name, -0.12, "top")):
            axes.text(place, height, text, ha="center", va=side, fontsize=9, weight="bold" if text == name else None)
    axes.set_axis_off()
    axes.set(ylim=(-0.2, 1.1))


def _places(done: Sequence[FrozenTrial], key: str) -> tuple[list[float], list[str]]:
    """Where each trial lies on a setting's axis, and the names along it if it is no axis of numbers."""
    kind = next(trial.distributions[key] for trial in done if key in trial.distributions)
    if not isinstance(kind, optuna.distributions.CategoricalDistribution):
        return [trial.params.get(key, math.nan) for trial in done], []
    return [kind.choices.index(trial.params[key]) for trial in done], [str(choice) for choice in kind.choices]


def _is_log(done: Sequence[FrozenTrial], key: str) -> bool:
    return any(getattr(trial.distributions.get(key), "log", False) for trial in done)


def _spread(column: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    low, high = column.min(), column.max()
    return (column - low) / (high - low) if high > low else np.full_like(column, 0.5)


def _svg(draw: Callable[[Any], None], width: float, height: float, rows: int = 1, columns: int = 1) -> str:
    """Base64 of an SVG picture; sizes in inches. `draw` gets the axes as an array [rows, columns]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=rows * columns > 1)
    for one in axes.flat:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(color="0.92")
        one.set_axisbelow(True)
    draw(axes)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return base64.b64encode(buffer.getvalue().encode()).decode("ascii")


def _write(file: Path, text: str) -> None:
    """Atomically: several workers end with the same file."""
    with file_beside(file) as beside:
        beside.write_text(text, encoding="utf-8")
