"""Some rows of an array that may be mapped from disk, read when they are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Rows:
    """`images[indices]`, uint8[V, H, W, C], without a copy of all of them.

    A set that is mapped because it does not fit memory has held-out images that may not fit either.
    """

    images: NDArray[np.uint8]
    indices: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: Any) -> NDArray[np.uint8]:
        """A copy of a row, a slice of rows, or those of an array of places."""
        found: NDArray[np.uint8] = self.images[self.indices[key]]
        return found

    @property
    def shape(self) -> tuple[int, ...]:
        """That of all of them."""
        return (len(self), *self.images.shape[1:])


# Held-out images: in memory, or rows of what may be on disk.
Images = NDArray[np.uint8] | Rows
