"""Decode and resize with Pillow: every format but the JPEGs that `service.decode_jpeg` takes."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from service.artifact import InputSpec
from service.geometry import Window
from service.image_header import Header

Pixels = NDArray[np.uint8]

# Opened by class and not through Image.open: no other plugin can be reached, none is loaded in mid-request, and the
# limit of pixels is the caller's instead of a process-wide setting.
_OPENERS: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WEBP": WebPImageFile,
    "BMP": BmpImageFile,
    "GIF": GifImageFile,
}
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_OPAQUE = 255

# Pillow warns, once for each place in the code, of an APNG whose animation is damaged; only the first frame counts.
warnings.filterwarnings("ignore", message="Invalid APNG", category=UserWarning)


def decode(data: bytes, header: Header, window: Window, spec: InputSpec, scale: int = 1) -> Pixels:
    """Pixels of a window of the image.

    Args:
        data: the encoded image.
        header: what it says of itself.
        window: which part, at which size, in the orientation as stored.
        spec: for the number of channels and the interpolation.
        scale: 1, 2, 4 or 8: decodes a JPEG at that fraction of its size, in the DCT; 1 for other formats.

    Returns:
        uint8[window.height, window.width, C]; C may be 1 for a gray image where the spec asks for 3.

    Raises:
        Exception: of nearly any kind, on bytes that break the format.
    """
    with _OPENERS[header.format](io.BytesIO(data)) as file:
        if file.size != (header.width, header.height):
            raise ValueError("two readings of the header differ")
        if isinstance(file, JpegImageFile):
            # Sizes rounded down make draft() choose this very scale.
            file.draft("L" if spec.channels == 1 else None, (header.width // scale, header.height // scale))
        file.load()
        image = _convert(file, spec.channels)
    image = image.resize((window.width, window.height), _FILTERS[spec.resize.interpolation], window.scaled(scale).box)
    if image.mode == "RGBa":
        image = _over_white(image)
        image = image.convert("L") if spec.channels == 1 else image
    pixels = np.asarray(image)
    return pixels if image.mode == "RGB" else pixels[..., np.newaxis]


def _convert(image: Image.Image, channels: int) -> Image.Image:
    """Mode L or RGB, or RGBa (colour multiplied by alpha) where there is transparency.

    Interpolating multiplied colour and compositing afterwards equals compositing first, and is cheaper.
    """
    if image.mode == "I;16":
        image = _upper_byte(image)
    key = image.info.get("transparency")
    if isinstance(key, tuple):
        # Of 16-bit samples only the upper byte is left, so the transparent colour is known by it, too.
        image.info["transparency"] = tuple(v >> 8 for v in key) if max(key) > _OPAQUE else key
    if image.has_transparency_data:
        return image.convert("RGBA").convert("RGBa")
    mode = "L" if channels == 1 or image.mode in {"1", "L"} else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _upper_byte(image: Image.Image) -> Image.Image:
    samples = np.asarray(image)
    gray = Image.fromarray((samples >> 8).astype(np.uint8))
    key = image.info.get("transparency")
    if key is None:
        return gray
    return Image.merge("LA", (gray, Image.fromarray(np.where(samples == key, 0, _OPAQUE).astype(np.uint8))))


def _over_white(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image)
    over = pixels[..., :3].astype(np.uint16) + (_OPAQUE - pixels[..., 3:])
    # Interpolation may leave a multiplied colour above its alpha.
    return Image.fromarray(np.minimum(over, _OPAQUE).astype(np.uint8))
