"""Axes of the plots of a study that stay readable whatever was tried."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_FAR_OUT = 3.0  # interquartile ranges above the upper quartile
_LABELS_ON_LOG_AXIS = 4


def short_names(keys: Sequence[str]) -> list[str]:
    """The last part of each setting's name, or more where that is that of another, too."""
    last = [key.rpartition(".")[2] for key in keys]
    return [short if last.count(short) == 1 else key for key, short in zip(keys, last, strict=True)]


def cut_off(axes: Any, losses: Sequence[float | None]) -> None:
    """Ends the axis where the loss of a trial that diverged would press all the others to a line, and says so."""
    values = np.array(losses, dtype=float)
    values = values[np.isfinite(values)]
    if not len(values):
        return
    lower, upper = np.quantile(values, [0.25, 0.75])
    most = upper + _FAR_OUT * (upper - lower)
    if values.max() > most > values.min():
        margin = 0.05 * (most - values.min())
        axes.set_ylim(values.min() - margin, most + margin)
        cut = int((values > most).sum())
        axes.set_title(f"{cut} above the picture, up to {values.max():.3g}", fontsize=9, loc="right", color="0.4")


def log_axis(axes: Any, places: Sequence[float]) -> None:
    """Few labels, each with room: of less than a decade matplotlib would write all nine one over the other."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = min(places), max(places)
    axes.set_xscale("log")
    if low == high:
        chosen = [low]
    else:
        margin = (high / low) ** 0.06
        axes.set_xlim(low / margin, high * margin)
        chosen = np.geomspace(low, high, _LABELS_ON_LOG_AXIS).tolist()
    axes.xaxis.set_major_locator(FixedLocator(chosen))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
    axes.xaxis.set_minor_locator(NullLocator())
