"""Signs that a run is going nowhere, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from service.errors import TrainingError

_STUCK = 0.99


def check_finite(loss: float, epoch: int, step: int) -> None:
    """Raises TrainingError if the loss is no number any more; `epoch` and `step` count from 1."""
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss became {loss} in epoch {epoch}, near step {step}; "
            "use a lower --learning-rate, a longer --warmup, or --clip-norm 1"
        )


def check_moving(history: Sequence[Mapping[str, float]], epochs: int, classes: int, heads: float = 1.0) -> None:
    """Raises TrainingError if the loss of the last `epochs` epochs was that of guessing; 0 epochs: never.

    `heads`: what the losses of all heads count together, that of the main one being 1.

    Epochs in which the learning rate still rose do not count: a small set of images has few steps in each, and nothing
    has been learnt at the rates of a warm-up.
    """
    if not epochs or len(history) < epochs:
        return
    rates = [figures["learning_rate"] for figures in history[-epochs - 1 :]]
    losses = [figures["train_loss"] for figures in history[-epochs:]]
    warming_up = any(after > before for before, after in pairwise(rates))
    chance = heads * math.log(classes)
    if not warming_up and min(losses) > _STUCK * chance:
        raise TrainingError(
            f"the loss has stayed at {losses[-1]:.3f}, that of guessing among {classes} classes ({chance:.3f}), for "
            f"{epochs} epochs. Try another --learning-rate (--find-lr), a longer --warmup, less --weight-decay, a "
            "network with BatchNorm (vgg16_bn instead of vgg16), and check that the labels are right"
        )
