"""Which part of the stored image becomes the model's input, and how large.

The convention is that of torchvision's `Resize(shorter_side)` and `CenterCrop`, rounding included: the shorter side
becomes S, the longer one `int(S * longer / shorter)`, and the crop starts at `round((side - crop) / 2)` with halves
rounded to even. Here the crop is taken back to the source, so that the resize makes only pixels that are kept.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from service.artifact import InputSpec

# EXIF 2.32, tag 0x0112: orientations above 4 swap rows and columns.
_FIRST_TRANSPOSED = 5
# Orientations whose stored columns, whose stored rows run against those of the upright image.
_COLUMNS_REVERSED = frozenset({2, 3, 7, 8})
_ROWS_REVERSED = frozenset({3, 4, 6, 7})
# Half width of the widest filter (bicubic), in pixels of the smaller of the two images.
_SUPPORT = 2


class Window(NamedTuple):
    """A box of the stored image, in pixels (fractions allowed), and the size it is resized to, before orienting."""

    left: float
    top: float
    right: float
    bottom: float
    width: int
    height: int

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom."""
        return self.left, self.top, self.right, self.bottom

    @property
    def shrink(self) -> float:
        """How many source pixels become one, on the axis where they are fewest; below 1 the image is enlarged."""
        return min((self.right - self.left) / self.width, (self.bottom - self.top) / self.height)

    def scaled(self, scale: int) -> Window:
        """The same window in an image that was decoded at 1/scale of its size."""
        if scale == 1:
            return self
        left, top, right, bottom = (side / scale for side in self.box)
        return Window(left, top, right, bottom, self.width, self.height)

    def within(self, left: int, top: int) -> Window:
        """The same window in a part of the image that begins at that pixel."""
        return Window(self.left - left, self.top - top, self.right - left, self.bottom - top, self.width, self.height)

    def reach(self, image_width: int, image_height: int) -> tuple[int, int, int, int]:
        """Left, top, right, bottom of the pixels that the resize reads: the box and what its filter reaches beyond."""
        left, right = _reach(self.left, self.right, self.width, image_width)
        top, bottom = _reach(self.top, self.bottom, self.height, image_height)
        return left, top, right, bottom


def window(stored_width: int, stored_height: int, orientation: int, spec: InputSpec) -> Window:
    """The window of an image of that size and EXIF orientation for a model's input."""
    transposed = orientation >= _FIRST_TRANSPOSED
    width, height = (stored_height, stored_width) if transposed else (stored_width, stored_height)
    (left, right), (top, bottom) = _upright_box(width, height, spec)
    out_width, out_height = spec.width, spec.height
    if transposed:
        (left, right), (top, bottom) = (top, bottom), (left, right)
        out_width, out_height = out_height, out_width
    if orientation in _COLUMNS_REVERSED:
        left, right = stored_width - right, stored_width - left
    if orientation in _ROWS_REVERSED:
        top, bottom = stored_height - bottom, stored_height - top
    # Fractions may come out past the edge by an ulp.
    right, bottom = min(right, stored_width), min(bottom, stored_height)
    return Window(max(left, 0), max(top, 0), right, bottom, out_width, out_height)


def resized_size(width: int, height: int, shorter_side: int) -> tuple[int, int]:
    """Width and height after scaling the shorter side, as torchvision rounds them."""
    if width <= height:
        return shorter_side, int(shorter_side * height / width)
    return int(shorter_side * width / height), shorter_side


def _upright_box(width: int, height: int, spec: InputSpec) -> tuple[tuple[float, float], tuple[float, float]]:
    if spec.resize.mode == "stretch":
        return (0, width), (0, height)
    shorter_side = spec.resize.shorter_side or max(spec.width, spec.height)
    scaled_width, scaled_height = resized_size(width, height, shorter_side)
    return _crop(width, scaled_width, spec.width), _crop(height, scaled_height, spec.height)


def _crop(side: int, scaled: int, kept: int) -> tuple[float, float]:
    start = round((scaled - kept) / 2)
    return start * side / scaled, (start + kept) * side / scaled


def _reach(start: float, stop: float, size: int, limit: int) -> tuple[int, int]:
    margin = math.ceil(_SUPPORT * max((stop - start) / size, 1)) + 1
    return max(math.floor(start) - margin, 0), min(math.ceil(stop) + margin, limit)
