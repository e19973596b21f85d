"""Which part of the stored image becomes the model's input, and how large.

The convention is that of torchvision's `Resize(shorter_side)` and `CenterCrop`, rounding included: the shorter side
becomes S, the longer one `int(S * longer / shorter)`, and the crop starts at `round((side - crop) / 2)` with halves
rounded to even. Here the crop is taken back to the source, so that the resize makes only pixels that are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from service.artifact import InputSpec

# EXIF 2.32, tag 0x0112: orientations above 4 swap rows and columns.
_FIRST_TRANSPOSED = 5
# Orientations (as stored) whose columns, whose rows run against those of the upright image.
_COLUMNS_REVERSED = frozenset({2, 3, 7, 8})
_ROWS_REVERSED = frozenset({3, 4, 6, 7})


@dataclass(frozen=True, slots=True)
class Window:
    """A box of the stored image, in pixels (fractions allowed), and the size it is resized to, before orienting."""

    left: float
    top: float
    right: float
    bottom: float
    width: int
    height: int

    @property
    def shrink(self) -> float:
        """How many source pixels become one, on the axis where they are fewest; below 1 the image is enlarged."""
        return min((self.right - self.left) / self.width, (self.bottom - self.top) / self.height)


def window(stored_width: int, stored_height: int, orientation: int, spec: InputSpec) -> Window:
    """The window of an image of that size and EXIF orientation for a model's input."""
    transposed = is_transposed(orientation)
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
    return Window(
        max(left, 0), max(top, 0), min(right, stored_width), min(bottom, stored_height), out_width, out_height
    )


def is_transposed(orientation: int) -> bool:
    """Whether rows and columns of the stored image are swapped."""
    return orientation >= _FIRST_TRANSPOSED


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
