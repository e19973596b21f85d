"""Training batches: which images, in which order, with which random numbers. Cut by indexing, in a thread ahead.

The order depends on seed and epoch, and an image's random numbers on seed, epoch and image. So a resumed run sees what
the uninterrupted one would have seen, whatever the number of processes; but a last batch without two images for each of
them joins the one before it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.distributed import Group, device
from training.draws import draws
from training.seeds import Purpose, derive

# Several at once: on the CPU each time that the thread wakes it takes a core from the step that is being computed.
_FEWEST_AHEAD, _MADE_AT_ONCE = 2, 4

# Images of a batch for each process.
_FEWEST_EACH = 2


class Batch(NamedTuple):
    """This process's part of one step.

    `images`: uint8[N, H, W, C]. `labels`: int64[N]. `uniform`: float32[N, D] in 0..1, for augmentation. `whole`: images
    in the step over all processes, by which the loss is divided.
    """

    images: Tensor
    labels: Tensor
    uniform: Tensor
    whole: int

    def page_locked(self) -> Batch:
        """The same in memory from which a GPU copies by itself, while the thread that asked for it goes on."""
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.uniform.pin_memory(), self.whole)


class Source(Protocol):
    """Where batches come from: memory, or tar shards."""

    def __len__(self) -> int:
        """Images per epoch over all processes."""

    @property
    def steps(self) -> int:
        """Batches per epoch."""

    def batches(self, epoch: int, first: int) -> Iterator[Batch]:
        """The batches of an epoch, from the one numbered `first`."""


@dataclass(frozen=True)
class Examples:
    """Images of one part of the split: `images[indices]` is uint8[N, H, W, C], `labels[indices]` int64[N]."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    indices: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def part_labels(self) -> NDArray[np.int64]:
        """int64[N], the labels of this part."""
        return self.labels[self.indices]


class MemorySource:
    """Batches from an array in memory, or mapped into it."""

    def __init__(
        self,
        examples: Examples,
        batch_size: int,
        seed: int,
        *,
        group: Group,
        weights: NDArray[np.float64] | None = None,
    ) -> None:
        """`weights`: float64[N], how often each image is drawn, with replacement; None: each once per epoch."""
        self._examples = examples
        self._batch_size = batch_size
        self._seed = seed
        self._group = group
        self._weights = None if weights is None else weights / weights.sum()

    def __len__(self) -> int:
        return len(self._examples)

    @property
    def steps(self) -> int:
        """Batches per epoch."""
        return len(self._starts())

    def batches(self, epoch: int, first: int) -> Iterator[Batch]:
        """The batches of an epoch, from the one numbered `first`; the next ones are made meanwhile."""
        order = self._order(epoch)
        uniform = draws(len(self), self._seed, epoch)
        # An image that is drawn more than once is changed in another way each time.
        rows = order if self._weights is None else np.arange(len(self))
        parts = (np.split(numbers, self._starts()[1:])[first:] for numbers in (order, rows))
        return ahead(self._cut(positions, drawn, uniform) for positions, drawn in zip(*parts, strict=True))

    def _starts(self) -> NDArray[np.int64]:
        return batch_starts(len(self), self._batch_size, self._group.world)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        random = np.random.default_rng(derive(self._seed, Purpose.ORDER, epoch))
        if self._weights is None:
            return random.permutation(len(self))
        return random.choice(len(self), len(self), p=self._weights)

    def _cut(self, positions: NDArray[np.int64], drawn: NDArray[np.int64], uniform: Tensor) -> Batch:
        part = self._group.part(len(positions))
        chosen = self._examples.indices[positions[part]]
        images = torch.from_numpy(self._examples.images[chosen])
        labels = torch.from_numpy(self._examples.labels[chosen])
        return Batch(images, labels, uniform[torch.from_numpy(drawn[part])], len(positions))


def batch_starts(count: int, batch_size: int, world: int = 1) -> NDArray[np.int64]:
    """Where each batch begins. The last may be smaller; without two images for each process it joins the one before it.

    BatchNorm cannot learn from one image.
    """
    starts = np.arange(0, count, batch_size)
    return starts[:-1] if 0 < count % batch_size < _FEWEST_EACH * world and len(starts) > 1 else starts


def balancing_weights(labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """float64[N]: one over the size of each image's class, so that all classes are drawn equally often."""
    return np.asarray(1.0 / np.bincount(labels)[labels], dtype=np.float64)


def ahead(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Makes the next few batches in a thread while the loop works on the current one."""
    iterator, begin, where = iter(batches), None, device()
    if where.type == "cuda":
        iterator = (batch.page_locked() for batch in batches)
        begin = partial(torch.cuda.set_device, where)  # or it would also open the first GPU
    waiting: deque[Future[Batch | None]] = deque()
    with ThreadPoolExecutor(1, initializer=begin) as thread:
        try:
            while True:
                if len(waiting) <= _FEWEST_AHEAD:
                    waiting.extend(thread.submit(next, iterator, None) for _ in range(_MADE_AT_ONCE))
                batch = waiting.popleft().result()
                if batch is None:
                    return
                yield batch
        finally:
            for future in waiting:
                future.cancel()
