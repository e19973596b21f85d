"""Image bytes to the pixels that the model sees: `uint8[H, W, C]`.

One implementation for both rooms: the service decodes requests with it, training decodes its data set with it, so
that the two cannot drift.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.artifact import InputSpec

FORMATS = frozenset({"JPEG", "PNG", "WEBP", "BMP", "GIF"})


@dataclass(frozen=True)
class Limits:
    """What may be decoded. `max_pixels` and `max_side` (pixels) are held against the header, before decoding."""

    max_pixels: int = 64_000_000
    max_side: int = 32_768
    formats: frozenset[str] = FORMATS


def preprocess(
    data: bytes, spec: InputSpec, limits: Limits | None = None, out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """Decodes, orients, converts, resizes and crops one image.

    Args:
        data: one encoded image; of an animation the first frame is taken.
        spec: shape and resize rule of the model's input.
        limits: what may be decoded; None takes the defaults.
        out: uint8[H, W, C], C-contiguous, written in place (a slot of a batch buffer); None allocates.

    Returns:
        uint8[H, W, C], `out` if it was given.

    Raises:
        InvalidImageError: the image cannot be used; the reason is in the error.
    """
    raise NotImplementedError
