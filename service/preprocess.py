"""Image bytes to the pixels that the model sees: `uint8[H, W, C]`.

One implementation for both rooms: the service decodes requests with it, training decodes its data set with it, so
that the two cannot drift.

Stages: header and limits (`service.image_header`), decode, crop and resize in one step (`service.geometry`),
orientation, channels. The result is that of the textbook pipeline (apply the EXIF orientation, convert, resize the
shorter side with antialiasing, cut the centre) to within rounding, with these conventions for what it leaves open:

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

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from service import geometry
from service.artifact import InputSpec
from service.errors import ImageFault, InvalidImageError
from service.geometry import Window
from service.image_header import Header, read_header

FORMATS = frozenset({"JPEG", "PNG", "WEBP", "BMP", "GIF"})

Pixels = NDArray[np.uint8]

# Opened by class and not through Image.open: no other plugin can be reached, none is loaded in mid-request, and
# limits are ours alone instead of a process-wide setting.
_OPENERS: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WEBP": WebPImageFile,
    "BMP": BmpImageFile,
    "GIF": GifImageFile,
}
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
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
    data: bytes, spec: InputSpec, limits: Limits | None = None, out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """Decodes, orients, converts, resizes and crops one image. Safe to call from any number of threads.

    Args:
        data: one encoded image; of an animation the first frame is taken.
        spec: shape and resize rule of the model's input.
        limits: what may be decoded; None takes the defaults.
        out: uint8[H, W, C], C-contiguous, written in place (a slot of a batch buffer); None allocates.

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
    header = read_header(data)
    _check_limits(header, limits or _DEFAULT_LIMITS)
    window = geometry.window(header.width, header.height, header.orientation, spec)
    try:
        stored = _decode(data, header, window, spec)
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


def _decode(data: bytes, header: Header, window: Window, spec: InputSpec) -> Pixels:
    """The window's pixels, uint8[height, width, C or 1], oriented as stored."""
    with _OPENERS[header.format](io.BytesIO(data)) as file:
        if file.size != (header.width, header.height):
            raise ValueError("two readings of the header differ")
        scale = _draft(file, header, window, spec)
        file.load()
        image = _convert(file, spec.channels)
    box = (window.left / scale, window.top / scale, window.right / scale, window.bottom / scale)
    image = image.resize((window.width, window.height), _FILTERS[spec.resize.interpolation], box)
    return _channels(image, spec.channels)


def _draft(file: ImageFile.ImageFile, header: Header, window: Window, spec: InputSpec) -> int:
    """Asks a JPEG decoder for an image scaled down in the DCT, still twice as large as needed; returns the scale."""
    if header.format != "JPEG":
        return 1
    scale = next((s for s in (8, 4, 2) if window.shrink >= 2 * s), 1)
    file.draft("L" if spec.channels == 1 else None, (header.width // scale, header.height // scale))
    return scale


def _convert(image: Image.Image, channels: int) -> Image.Image:
    """Mode L or RGB, or RGBa (colour multiplied by alpha) where there is transparency.

    Interpolating premultiplied colour and compositing afterwards equals compositing first, and is cheaper.
    """
    if image.mode == "I;16":
        image = _upper_byte(image)
    if image.has_transparency_data:
        return image.convert("RGBA").convert("RGBa")
    if image.mode in {"1", "L"}:
        return image.convert("L")
    return image.convert("RGB" if channels == 3 else "L")  # noqa: PLR2004 - RGB


def _upper_byte(image: Image.Image) -> Image.Image:
    samples = np.asarray(image)
    gray = Image.fromarray((samples >> 8).astype(np.uint8))
    key = image.info.get("transparency")
    if key is None:
        return gray
    opaque = Image.fromarray(np.where(samples == key, 0, 255).astype(np.uint8))
    return Image.merge("LA", (gray, opaque))


def _channels(image: Image.Image, channels: int) -> Pixels:
    if image.mode == "RGBa":
        pixels = np.asarray(image)
        # Rounding may leave a premultiplied colour one above its alpha.
        over_white = np.minimum(pixels[..., :3].astype(np.uint16) + (255 - pixels[..., 3:]), 255).astype(np.uint8)
        image = Image.fromarray(over_white)
    if channels == 1 and image.mode == "RGB":
        image = image.convert("L")
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., np.newaxis]  # noqa: PLR2004 - rows, columns, channels
