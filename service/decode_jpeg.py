"""Decode and resize JPEGs the fast way: libjpeg-turbo straight to an array, then a vectorised resize of the window.

Both libraries release the interpreter while they work. The decoder's settings are the exact ones (slow integer DCT,
interpolated chroma), so what comes out differs from Pillow by the rounding of the resize. Measured alternatives are
in docs/preprocessing.md.
"""

from __future__ import annotations

import math

import numpy as np
import simplejpeg
from cykooz_resizer import (  # type: ignore[import-untyped]  # ships no py.typed
    CropBox,
    FilterType,
    ImageData,
    PixelType,
    ResizeAlg,
    ResizeOptions,
    Resizer,
)
from numpy.typing import NDArray

from service import decode_pillow
from service.artifact import InputSpec
from service.geometry import Window
from service.image_header import Header

Pixels = NDArray[np.uint8]

# A decoded image stays at least this many times as large as needed. At 1 the scaled DCT, whose filter is sharper than
# a triangle, puts the mean difference to a full decode above 2/255 on detailed photos; at 2 it stays below 0.7/255.
_HEADROOM = 2
_SCALES = (8, 4, 2)
# Beyond this the copies between the libraries, made while holding the interpreter, would take milliseconds.
_MAX_PIXELS = 4_000_000
_CMYK_COMPONENTS = 4
_ALGORITHMS = {
    "bilinear": ResizeAlg.convolution(FilterType.bilinear),
    "bicubic": ResizeAlg.convolution(FilterType.catmull_rom),  # a = -0.5, which is Pillow's bicubic
}
_PIXEL_TYPES = {1: PixelType.U8, 3: PixelType.U8x3}
# Complaints after which Pillow is asked: every pixel is there (stray bytes between segments), or only this wrapper
# does not know the sampling factors.
_NOT_DAMAGED = ("extraneous bytes before marker", "subsampling")


def decode(data: bytes, header: Header, window: Window, spec: InputSpec) -> Pixels:
    """Pixels of a window of a JPEG; arguments, result and errors as in `service.decode_pillow.decode`."""
    scale = next((s for s in _SCALES if window.shrink >= _HEADROOM * s), 1)
    width, height = math.ceil(header.width / scale), math.ceil(header.height / scale)
    if header.components == _CMYK_COMPONENTS or width * height > _MAX_PIXELS:
        return decode_pillow.decode(data, header, window, spec, scale)
    try:
        pixels = simplejpeg.decode_jpeg(
            data,
            "GRAY" if 1 in {spec.channels, header.components} else "RGB",
            min_height=height,
            min_width=width,
            min_factor=scale,
        )
    except ValueError as error:
        if any(text in str(error) for text in _NOT_DAMAGED):
            return decode_pillow.decode(data, header, window, spec, scale)
        raise
    if pixels.shape[:2] != (height, width):
        raise ValueError("two readings of the header differ")
    return _resize(pixels, window.scaled(scale), spec.resize.interpolation)


def _resize(pixels: Pixels, window: Window, interpolation: str) -> Pixels:
    """Resizes a window of uint8[H, W, C] to uint8[window.height, window.width, C], antialiased."""
    image_height, image_width, channels = pixels.shape
    left, top, right, bottom = window.reach(image_width, image_height)
    kind = _PIXEL_TYPES[channels]
    source = ImageData(right - left, bottom - top, kind, pixels[top:bottom, left:right].tobytes())
    target = ImageData(window.width, window.height, kind)
    part = window.within(left, top)
    # The lower right corner is where rounding could leave the image.
    box = CropBox(
        part.left,
        part.top,
        min(part.right - part.left, source.width - part.left),
        min(part.bottom - part.top, source.height - part.top),
    )
    options = ResizeOptions(resize_alg=_ALGORITHMS[interpolation], crop_box=box, use_alpha=False)
    # A Resizer serves one thread at a time; making one costs a microsecond.
    Resizer().resize(source, target, options)
    resized = np.frombuffer(target.get_buffer(), np.uint8)
    return resized.reshape(window.height, window.width, channels)
