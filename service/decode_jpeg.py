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

from service import decode_pillow, jpeg_markers
from service.artifact import InputSpec
from service.geometry import Window
from service.image_header import Header

Pixels = NDArray[np.uint8]

# A decoded image stays at least this many times as large as needed. At 1 the scaled DCT, whose filter is sharper than
# a triangle, puts the mean difference to a full decode above 2/255 on detailed photos; at 2 it stays below 0.7/255.
_HEADROOM = 2
_SCALES = (8, 4, 2)
# Beyond this the copies between the libraries, made while holding the interpreter, would take milliseconds: there
# Pillow resizes, which reads the pixels where they are.
_MAX_PIXELS = 4_000_000
_CMYK_COMPONENTS = 4
_ALGORITHMS = {
    "bilinear": ResizeAlg.convolution(FilterType.bilinear),
    "bicubic": ResizeAlg.convolution(FilterType.catmull_rom),  # a = -0.5, which is Pillow's bicubic
}
_PIXEL_TYPES = {1: PixelType.U8, 3: PixelType.U8x3}
# Complaints of what can be taken out; what is complained of then is damage.
_UNTIDY = ("sos parameters", "jfif revision")
# Complaints after which Pillow, which passes over all, is asked: nothing comes behind the end marker, and only this
# wrapper does not know the sampling factors.
_HARMLESS = ("before marker 0xd9", "subsampling")


def decode(data: bytes, header: Header, window: Window, spec: InputSpec) -> Pixels:
    """Pixels of a window of a JPEG; arguments, result and errors as in `service.decode_pillow.decode`."""
    scale = next((s for s in _SCALES if window.shrink >= _HEADROOM * s), 1)
    width, height = math.ceil(header.width / scale), math.ceil(header.height / scale)
    large = header.components == _CMYK_COMPONENTS or width * height > _MAX_PIXELS
    if header.components == _CMYK_COMPONENTS:
        colours = "CMYK"
    elif 1 in {spec.channels, header.components}:
        colours = "GRAY"
    else:
        colours = "RGBX" if large else "RGB"
    try:
        pixels = _decompressed(data, colours, width, height, scale)
    except ValueError as error:
        if not any(text in str(error).lower() for text in _HARMLESS):
            raise
        return decode_pillow.decode(data, header, window, spec, scale)
    if pixels.shape[:2] != (height, width):
        raise ValueError("two readings of the header differ")
    if large:
        return decode_pillow.resized(decode_pillow.of_jpeg(pixels, colours, spec.channels), window.scaled(scale), spec)
    return _resize(pixels, window.scaled(scale), spec.resize.interpolation)


def _decompressed(data: bytes, colours: str, width: int, height: int, scale: int) -> Pixels:
    """uint8[height, width, C], or an error at libjpeg's first complaint: it would fill in what is missing."""

    def once(data: bytes) -> Pixels:
        pixels: Pixels = simplejpeg.decode_jpeg(data, colours, min_height=height, min_width=width, min_factor=scale)
        return pixels

    try:
        return once(data)
    except ValueError as error:
        if not any(text in str(error).lower() for text in _UNTIDY):
            raise
        return once(jpeg_markers.tidied(data))


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
