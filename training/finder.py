"""Looking for a learning rate: raise it from step to step until the loss breaks out (Smith, arXiv:1506.01186)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.errors import TrainingError
from training.batches import Source
from training.phases import Phase
from training.step import Stepper

LOWEST, HIGHEST = 1e-7, 10.0
_SMOOTHING = 0.9
_DIVERGED = 4.0
_FEWEST = 10
_VISIBLE = 0.05  # of the whole fall


@dataclass(frozen=True)
class Sweep:
    """Learning rates, as the settings have them, and the loss at each: float64[N].

    `smooth`: exponential mean of the losses, bias corrected.
    """

    rates: NDArray[np.float64]
    losses: NDArray[np.float64]
    smooth: NDArray[np.float64]

    @property
    def suggestion(self) -> float:
        """The rate at which the smoothed loss falls fastest per factor of rate: a good peak."""
        # At first the mean is that of a few losses, and steps of 1e-7 change none of them: what moves there is noise.
        first = min(_FEWEST, len(self.smooth) - 1)
        lowest = first + int(self.smooth[first:].argmin())
        fall = self.smooth[first] - self.smooth[lowest]
        slopes = np.gradient(self.smooth, np.log(self.rates))
        fallen = self.smooth[first:lowest] <= self.smooth[first] - _VISIBLE * fall
        places = first + np.flatnonzero(fallen) if fallen.any() else np.array([lowest])
        return float(self.rates[places[slopes[places].argmin()]])


def sweep(stepper: Stepper, source: Source, phase: Phase | None = None, steps: int = 100) -> Sweep:
    """Trains for up to `steps` steps at rates from 1e-7 to 10, and stops when the loss has grown fourfold.

    `phase`: what learns, and at which multiples of the rate; None: everything, at the same.

    The weights are worthless afterwards.

    Raises:
        TrainingError: the loss broke out at once.
    """
    ratio = (HIGHEST / LOWEST) ** (1 / (steps - 1))
    rates, losses, smooth = [], [], []
    mean, best = 0.0, math.inf
    batches = chain.from_iterable(source.batches(epoch, 0) for epoch in count())
    phase = phase or Phase("sweep", 1)
    stepper.begin(phase, 1.0, 0, steps)
    stepper.train()
    for step in range(steps):
        stepper.fixed_rate = LOWEST * ratio**step
        loss = float(stepper(next(batches), step))
        if not math.isfinite(loss):
            break
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * loss
        corrected = mean / (1 - _SMOOTHING ** (step + 1))
        best = min(best, corrected)
        rates.append(stepper.fixed_rate / phase.peak)
        losses.append(loss)
        smooth.append(corrected)
        if corrected > _DIVERGED * best:
            break
    if len(rates) < _FEWEST:
        raise TrainingError("the loss breaks out at the smallest learning rates; check the images and their labels")
    return Sweep(np.array(rates), np.array(losses), np.array(smooth))


def plot(found: Sweep, file: Path) -> None:
    """Writes the curve as a picture, with the suggestion marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(found.rates, found.losses, color="0.8", label="loss")
    axes.plot(found.rates, found.smooth, label="smoothed")
    axes.axvline(found.suggestion, linestyle="--", color="tab:red", label=f"suggestion {found.suggestion:.1e}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss", ylim=(0, 1.5 * float(found.smooth[0])))
    axes.legend()
    figure.savefig(file, dpi=120)
