"""Decode and resize with Pillow: every format but the JPEGs that `service.decode_jpeg` takes."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from service import png
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

# Of a PNG (third edition, 11.2): the start of its header and what follows the size there (bits, colour type,
# compression, filter, interlace), for gray and for RGB samples of 8 bits; where the next chunk is; the last one.
_IHDR = b"\0\0\0\rIHDR"
_PLAIN = {bytes((8, 0, 0, 0, 0)): "L", bytes((8, 2, 0, 0, 0)): "RGB"}
_AFTER_IHDR = 33
_UNSEEN: dict[str, int | tuple[int, ...]] = {"L": 129, "RGB": (129, 61, 203)}  # which few pictures end with
_DEPTH, _INTERLACE = 24, 28
_IEND = b"\0\0\0\0IEND"

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
    image = _plain_png(data, header, spec.channels) if header.format == "PNG" else None
    if image is None:
        image = _opened(data, header, spec.channels, scale)
    return resized(image, window.scaled(scale), spec)


def of_jpeg(pixels: Pixels, colours: str, channels: int) -> Image.Image:
    """An image on decoded pixels, without a copy of them: uint8[H, W, C], `colours` "GRAY", "RGBX" or "CMYK".

    CMYK is inverted, as Adobe writes it.
    """
    height, width = pixels.shape[:2]
    if colours == "CMYK":
        return _convert(Image.frombytes("CMYK", (width, height), pixels, "raw", "CMYK;I"), channels)
    mode = {"GRAY": "L", "RGBX": "RGBX"}[colours]
    return Image.frombuffer(mode, (width, height), pixels, "raw", mode, 0, 1)


def resized(image: Image.Image, window: Window, spec: InputSpec) -> Pixels:
    """Pixels of a window of an image in mode L, RGB, RGBX or RGBa; the result is as that of `decode`."""
    if image.size != (window.width, window.height) or window.box != (0, 0, *image.size):
        image = image.resize((window.width, window.height), _FILTERS[spec.resize.interpolation], window.box)
    if image.mode == "RGBX":
        image = image.convert("RGB")
    if image.mode == "RGBa":
        image = _over_white(image)
        image = image.convert("L") if spec.channels == 1 else image
    return np.frombuffer(image.tobytes(), np.uint8).reshape(window.height, window.width, -1)


def _opened(data: bytes, header: Header, channels: int, scale: int) -> Image.Image:
    """The whole image, in mode L, RGB or RGBa."""
    content = png.picture(data) if header.format == "PNG" else data
    with _OPENERS[header.format](io.BytesIO(content)) as file:
        if file.size != (header.width, header.height):
            raise ValueError("two readings of the header differ")
        if isinstance(file, JpegImageFile):
            # Sizes rounded down make draft() choose this very scale.
            file.draft("L" if channels == 1 else None, (header.width // scale, header.height // scale))
        file.load()
        if header.format == "PNG":
            if (data[_INTERLACE] or _ends_empty(file)) and not png.is_whole(data):
                raise ValueError("its data ends early")
            _scale_key(file, data[_DEPTH])
        if isinstance(file, GifImageFile) and not file.has_transparency_data:
            return _convert(_on_canvas(file), channels)
        return _convert(file, channels)


def _plain_png(data: bytes, header: Header, channels: int) -> Image.Image | None:
    """The image of a PNG without anything beside its pixels, which is how data sets of thumbnails are stored.

    It goes straight to the decoder that `PngImageFile` would set up in twice the time that decoding takes. None if it
    is another kind, or if anything at all is wrong with it: then `PngImageFile` judges.
    """
    mode = _PLAIN.get(data[24:29])
    if mode is None or data[8:16] != _IHDR or zlib.crc32(data[12:29]) != int.from_bytes(data[29:_AFTER_IHDR]):
        return None
    (length, kind) = struct.unpack_from(">I4s", data, _AFTER_IHDR)
    start = _AFTER_IHDR + 8
    stop = start + length
    if kind != b"IDAT" or data[stop + 4 : stop + 12] != _IEND:
        return None
    packed = data[start:stop]
    image = Image.new(mode, (header.width, header.height), _UNSEEN[mode])
    try:
        image.frombytes(packed, "zip", mode, 0)
        # Pillow leaves as they are the rows that do not come.
        if image.getpixel((0, header.height - 1)) == _UNSEEN[mode] and not png.is_whole(data):
            return None
    except (ValueError, zlib.error):
        return None
    return image if mode == "L" or channels != 1 else image.convert("L")


def _ends_empty(image: Image.Image) -> bool:
    """Whether the last row is as it was before anything was decoded into it."""
    return not any(image.crop((0, image.height - 1, *image.size)).tobytes())


def _convert(image: Image.Image, channels: int) -> Image.Image:
    """Mode L or RGB, or RGBa (colour multiplied by alpha) where there is transparency.

    Interpolating multiplied colour and compositing afterwards equals compositing first, and is cheaper.
    """
    if image.mode == "I;16":
        image = _upper_byte(image)
    if image.has_transparency_data and not _is_empty_mask(image):
        return image.convert("RGBA").convert("RGBa")
    mode = "L" if channels == 1 or image.mode in {"1", "L"} else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _is_empty_mask(image: Image.Image) -> bool:
    """Whether a BMP has room for alpha that nobody filled, as pictures from clipboards have: nothing would be left."""
    return image.format == "BMP" and image.mode == "RGBA" and image.getchannel("A").getbbox() is None


def _on_canvas(frame: GifImageFile) -> Image.Image:
    """A frame that may be smaller than the canvas: nothing is drawn beside it, where Pillow has the first colour."""
    extent = frame.dispose_extent
    if extent == (0, 0, *frame.size):
        return frame
    canvas = Image.new("RGB", frame.size, "white")
    canvas.paste(frame.convert("RGB").crop(extent), extent)
    return canvas


def _scale_key(image: Image.Image, bits: int) -> None:
    """The colour that is transparent, which a PNG gives in samples as they are stored, in those that Pillow makes."""
    key = image.info.get("transparency")
    if isinstance(key, tuple) and bits == 16:  # noqa: PLR2004
        image.info["transparency"] = tuple(v >> 8 for v in key)  # only the upper byte of the samples is left
    elif isinstance(key, int) and image.mode == "L" and bits in {2, 4}:
        image.info["transparency"] = key * _OPAQUE // ((1 << bits) - 1)


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
