"""Image bytes to the pixels that the model sees: `uint8[H, W, C]`.

One implementation for both rooms: the service decodes requests with it, training decodes its data set with it, so
that the two cannot drift.

Stages: header and limits (`service.image_header`); decode, crop and resize in one (`service.geometry` says what,
`service.decode_jpeg` and `service.decode_pillow` do it); orientation and channels. The result is that of the textbook
pipeline (apply the EXIF orientation, convert, resize the shorter side with antialiasing, cut the centre) to within
rounding, with these conventions for what that leaves open:

- Transparency is composited over white, as viewers show it. The colour under transparent pixels is arbitrary
  (encoders drop it), so ignoring alpha would let files that look the same give different pixels.
- 16-bit samples keep their upper byte, so the full range stays the full range.
- CMYK and YCCK JPEGs are read as Adobe writes them (inverted), and become RGB without a colour profile. Profiles and
  gamma are not applied in any format.
- RGB becomes one channel by ITU-R 601-2 luma; one channel becomes RGB by repetition.
- Of an animation the first frame counts, on its canvas.
- An image that is cut short or damaged is refused; missing parts are never filled in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service import decode_jpeg, decode_pillow, geometry
from service.artifact import InputSpec
from service.errors import ImageFault, InvalidImageError
from service.image_header import Header, is_hollow, read_header

FORMATS = frozenset({"JPEG", "PNG", "WEBP", "BMP", "GIF"})

Pixels = NDArray[np.uint8]

# From an image as stored to the upright one, on the first two axes.
_ORIENT: dict[int, Callable[[Pixels], Pixels]] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}


@dataclass(frozen=True)
class Limits:
    """What may be decoded. `max_pixels` and `max_side` (pixels) are held against the header, before decoding."""

    max_pixels: int = 64_000_000
    max_side: int = 32_768
    formats: frozenset[str] = FORMATS


_DEFAULT_LIMITS = Limits()


def preprocess(
    data: bytes,
    spec: InputSpec,
    limits: Limits | None = None,
    out: NDArray[np.uint8] | None = None,
    header: Header | None = None,
) -> NDArray[np.uint8]:
    """Decodes, orients, converts, resizes and crops one image. Safe to call from any number of threads.

    Args:
        data: one encoded image; of an animation the first frame is taken.
        spec: shape and resize rule of the model's input.
        limits: what may be decoded; None takes the defaults.
        out: uint8[H, W, C], C-contiguous, written in place (a slot of a batch buffer); None allocates.
        header: what `read_header` says of the image, where that is known; None reads it.

    Returns:
        uint8[H, W, C], `out` if it was given.

    Raises:
        InvalidImageError: the image cannot be used; the reason is in the error.
        ValueError: `out` is not what the spec asks for.
    """
    if out is None:
        out = np.empty(spec.shape, np.uint8)
    elif out.shape != spec.shape or out.dtype != np.uint8 or not out.flags.c_contiguous:
        raise ValueError(f"out has to be contiguous uint8{list(spec.shape)}, not {out.dtype}{list(out.shape)}")
    header = header or read_header(data)
    _check_limits(header, limits or _DEFAULT_LIMITS)
    if is_hollow(data, header):
        raise InvalidImageError(
            ImageFault.CORRUPT, "The PNG cannot be decoded: its data cannot hold so many pixels.", header.format
        )
    try:
        stored = _decode(data, header, spec)
    except MemoryError:
        raise InvalidImageError(
            ImageFault.TOO_LARGE,
            f"The {header.format} of {header.width}x{header.height} pixels needs more memory than there is; "
            "send a smaller image.",
            header.format,
        ) from None
    except Exception as error:  # on hostile bytes decoders raise nearly everything
        raise InvalidImageError(
            ImageFault.CORRUPT,
            f"The {header.format} cannot be decoded: it is truncated or damaged.",
            header.format,
        ) from error
    out[...] = _ORIENT[header.orientation](stored) if header.orientation in _ORIENT else stored
    return out


def _check_limits(header: Header, limits: Limits) -> None:
    name, width, height = header.format, header.width, header.height
    if name not in limits.formats:
        raise InvalidImageError(
            ImageFault.UNSUPPORTED_FORMAT,
            f"{name} is not accepted here; send {', '.join(sorted(limits.formats))}.",
            name,
        )
    if width * height > limits.max_pixels or max(width, height) > limits.max_side:
        raise InvalidImageError(
            ImageFault.TOO_LARGE,
            f"The image of {width}x{height} pixels is too large: at most {limits.max_pixels:,} pixels and "
            f"{limits.max_side:,} to a side are accepted; scale it down.",
            name,
        )


def _decode(data: bytes, header: Header, spec: InputSpec) -> Pixels:
    """The window's pixels, uint8[height, width, C or 1], oriented as stored."""
    window = geometry.window(header.width, header.height, header.orientation, spec)
    if header.format == "JPEG":
        return decode_jpeg.decode(data, header, window, spec)
    return decode_pillow.decode(data, header, window, spec)
