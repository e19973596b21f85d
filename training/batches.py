"""The order of training images: shuffled by seed and epoch, cut into batches."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from training.seeds import Purpose, derive


def epoch_batches(count: int, batch_size: int, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """Positions 0..count-1 in this epoch's order, in batches.

    The last batch may be smaller. A last batch of one image joins the one before it: BatchNorm cannot learn from one.
    """
    order = np.random.default_rng(derive(seed, Purpose.ORDER, epoch)).permutation(count)
    starts = np.arange(batch_size, count, batch_size)
    if count % batch_size == 1:
        starts = starts[:-1]
    return np.split(order, starts)


def batches_per_epoch(count: int, batch_size: int) -> int:
    """The length of what `epoch_batches` returns."""
    whole, rest = divmod(count, batch_size)
    return max(1, whole + (rest > 1))
