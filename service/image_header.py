"""What an encoded image says of itself: format, size and EXIF orientation, without decoding a pixel.

Limits are held against this header before any decoder sees the bytes, so that a pixel bomb costs microseconds. The
parsers follow ITU-T T.81 (JPEG), the PNG specification, third edition, RFC 9649 (WebP), the GIF89a specification and
Microsoft's BITMAPINFOHEADER. Nothing is read past the bytes given, and the number of blocks visited is bounded.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from service import exif, jpeg_markers, png
from service.errors import ImageFault, InvalidImageError

# Far above what encoders write (a 32 MiB PNG in blocks of 4 KiB has 8,192), far below what would hold the
# interpreter for seconds.
MAX_BLOCKS = jpeg_markers.MAX_BLOCKS

# Each scan of a JPEG visits every block of the image, and can be ten bytes long. Of a progressive one encoders write
# about ten; a sequential one has each of its components in one. Large images may have fewer: decoding cannot be
# interrupted, and visiting all blocks of so many pixels takes about a second.
MAX_SCANS = 200
_MAX_VISITED_PIXELS = 1_280_000_000
_ALWAYS_SCANS = 20

# Pillow joins them one by one. More than one is rare: 64 KiB hold what cameras write.
MAX_EXIF_SEGMENTS = 64

_MAGIC = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"GIF87a": "GIF", b"GIF89a": "GIF", b"BM": "BMP"}
# Start-of-frame markers of the Huffman and arithmetic coded, sequential and progressive processes.
_DECODABLE_SOF = frozenset({0xC0, 0xC1, 0xC2, 0xC9, 0xCA})
_OTHER_SOF = frozenset({0xC3, 0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xCE, 0xCF})
_BMP_UNCOMPRESSED = frozenset({0, 3, 6})  # BI_RGB, BI_BITFIELDS, BI_ALPHABITFIELDS
_PROGRESSIVE_SOF = frozenset({0xC2, 0xCA})
_SOS, _EOI, _APP1 = 0xDA, 0xD9, 0xE1
_WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD9)})


class Header(NamedTuple):
    """Size in pixels as stored, before the orientation is applied.

    `orientation` is EXIF's, 1 to 8; 1 is upright and what damaged or missing EXIF counts as. `components` is the
    number of colour channels of a JPEG (1, 3 or 4) and 0 for the other formats.
    """

    format: str
    width: int
    height: int
    orientation: int = exif.UPRIGHT
    components: int = 0


def read_header(data: bytes) -> Header:
    """Finds out what the bytes are.

    Raises:
        InvalidImageError: no bytes (EMPTY), not one of the formats known here or a kind of it that cannot be decoded
            (UNSUPPORTED_FORMAT), or a header that is cut short or contradicts its format (CORRUPT).
    """
    if not data:
        raise InvalidImageError(ImageFault.EMPTY, "The image is empty: it has no bytes.")
    name = sniff(data)
    if name is None:
        raise InvalidImageError(
            ImageFault.UNSUPPORTED_FORMAT, "This is not an image in a known format; send JPEG, PNG, WebP, BMP or GIF."
        )
    try:
        header = _PARSERS[name](data)
    except (struct.error, IndexError, ValueError):
        raise _corrupt(name, "its header is cut short or damaged") from None
    if header.width < 1 or header.height < 1:
        raise _corrupt(name, "its header gives a size of zero")
    return header


def sniff(data: bytes) -> str | None:
    """Name of the format by its first bytes ("JPEG", "PNG", "WEBP", "BMP", "GIF"), or None."""
    if data.startswith(b"RIFF"):
        return "WEBP" if data[8:12] == b"WEBP" else None
    for magic, name in _MAGIC.items():
        if data.startswith(magic):
            return name
    return None


def _corrupt(name: str, what: str) -> InvalidImageError:
    return InvalidImageError(ImageFault.CORRUPT, f"The {name} cannot be decoded: {what}.", name)


def _jpeg(data: bytes) -> Header:
    height = width = components = exif_segments = process = end = 0
    orientation = exif.UPRIGHT
    for marker, start, end in _jpeg_segments(data):
        if marker in _DECODABLE_SOF or marker in _OTHER_SOF:
            if process:
                raise _corrupt("JPEG", "it has two frames")
            precision, height, width, components = struct.unpack_from(">BHHB", data, start)
            _check_jpeg_process(marker, precision, components)
            process = marker
        elif marker == _APP1 and data[start : start + 6] == b"Exif\0\0":
            exif_segments += 1
            if orientation == exif.UPRIGHT:
                orientation = exif.orientation(data[start + 6 : end])
    if exif_segments > MAX_EXIF_SEGMENTS:
        raise _corrupt("JPEG", f"it has more than {MAX_EXIF_SEGMENTS} EXIF segments")
    scans = _most_scans(width * height) if process in _PROGRESSIVE_SOF else components
    if jpeg_markers.has_more_scans_than(data, scans, end):
        raise _corrupt("JPEG", f"it has more than {scans} scans")
    return Header("JPEG", width, height, orientation, components)


def _most_scans(pixels: int) -> int:
    """Of a progressive JPEG."""
    return max(_ALWAYS_SCANS, min(MAX_SCANS, _MAX_VISITED_PIXELS // max(1, pixels)))


def _check_jpeg_process(marker: int, precision: int, components: int) -> None:
    if marker in _OTHER_SOF or precision != 8 or components not in {1, 3, 4}:  # noqa: PLR2004 - bits and channels
        raise InvalidImageError(
            ImageFault.UNSUPPORTED_FORMAT,
            f"This kind of JPEG ({precision} bits, {components} channels, process {marker - 0xC0}) is not supported; "
            "save it as an ordinary 8-bit JPEG.",
            "JPEG",
        )


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker and extent of each segment's content, up to the first scan."""
    position = 2
    for _ in range(MAX_BLOCKS):
        prefix, marker = data[position], data[position + 1]
        if prefix != 0xFF:  # noqa: PLR2004 - what every marker starts with
            raise ValueError("no marker")
        if marker == 0xFF:  # noqa: PLR2004 - a fill byte; the marker comes after any number of them
            position += 1
        elif marker in {_SOS, _EOI}:
            return
        elif marker in _WITHOUT_LENGTH:
            position += 2
        else:
            (length,) = struct.unpack_from(">H", data, position + 2)
            yield marker, position + 4, position + 2 + length
            position += 2 + length
    raise ValueError("too many segments")


# Deflate makes at most so many bytes of one; a little more, for what surrounds the data.
_MOST_UNFOLDED = 1040


def is_hollow(data: bytes, header: Header) -> bool:
    """Whether a PNG claims more pixels than so few bytes can unfold to.

    Decoders find that out when they have made room for all of them, which takes a tenth of a second for a file of 70
    bytes.
    """
    return header.format == "PNG" and png.claimed_bytes(data) > _MOST_UNFOLDED * len(data)


def _png(data: bytes) -> Header:
    if data[12:16] != b"IHDR":
        raise ValueError("no IHDR")
    width, height = struct.unpack_from(">II", data, 16)
    return Header("PNG", width, height, _png_orientation(data))


def _png_orientation(data: bytes) -> int:
    """Orientation of the eXIf chunk, which may stand on either side of the pixels."""
    orientation = exif.UPRIGHT
    for number, (kind, start, stop) in enumerate(png.chunks(data)):
        if number >= MAX_BLOCKS:
            raise ValueError("too many chunks")
        if kind == b"eXIf":
            orientation = exif.orientation(data[start + 8 : stop - 4].removeprefix(b"Exif\0\0"))
    return orientation


def _webp(data: bytes) -> Header:
    kind = data[12:16]
    if kind == b"VP8X":
        width = int.from_bytes(_exactly(data, 24, 3), "little") + 1
        height = int.from_bytes(_exactly(data, 27, 3), "little") + 1
        return Header("WEBP", width, height, _webp_orientation(data))
    if kind == b"VP8L":
        signature, bits = struct.unpack_from("<BI", data, 20)
        if signature != 0x2F:  # noqa: PLR2004 - the byte that opens a lossless bitstream
            raise ValueError("no VP8L signature")
        return Header("WEBP", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return Header("WEBP", width & 0x3FFF, height & 0x3FFF)
    raise ValueError("no bitstream")


def _webp_orientation(data: bytes) -> int:
    position = 12
    for _ in range(MAX_BLOCKS):
        if position + 8 > len(data):
            return exif.UPRIGHT
        kind, length = struct.unpack_from("<4sI", data, position)
        if kind == b"EXIF":
            payload = data[position + 8 : position + 8 + length]
            return exif.orientation(payload.removeprefix(b"Exif\0\0"))
        position += 8 + length + (length & 1)
    raise ValueError("too many chunks")


def _bmp(data: bytes) -> Header:
    (size,) = struct.unpack_from("<I", data, 14)
    if size == 12:  # noqa: PLR2004 - BITMAPCOREHEADER, the only one with 16-bit sizes
        return Header("BMP", *struct.unpack_from("<HH", data, 18))
    width, height, _planes, bits, compression = struct.unpack_from("<iiHHI", data, 18)
    (colours,) = struct.unpack_from("<I", data, 46)
    if compression not in _BMP_UNCOMPRESSED:
        # Run lengths are expanded in Python, byte by byte: a small file would hold the interpreter for seconds.
        raise InvalidImageError(
            ImageFault.UNSUPPORTED_FORMAT, "Compressed BMP is not supported; save it uncompressed or as PNG.", "BMP"
        )
    if bits <= 8 and colours > 1 << bits:  # noqa: PLR2004 - with a palette, which would be read just as slowly
        raise ValueError("more colours than the pixels can name")
    return Header("BMP", width, abs(height))  # a negative height says that the rows run downwards


def _gif(data: bytes) -> Header:
    """The screen, or the first frame where it reaches beyond the screen (decoders then enlarge the screen)."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    position = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)  # after the global colour table
    budget = iter(range(MAX_BLOCKS))
    for _ in budget:
        kind = data[position]
        if kind == 0x2C:  # noqa: PLR2004 - image descriptor
            left, top, frame_width, frame_height = struct.unpack_from("<4H", data, position + 1)
            return Header("GIF", max(width, left + frame_width), max(height, top + frame_height))
        if kind == 0x3B:  # noqa: PLR2004 - trailer
            raise ValueError("no frame")
        position += 1
        if kind == 0x21:  # noqa: PLR2004 - extension: a label, then sub-blocks
            position = _after_sub_blocks(data, position + 1, budget)
    raise ValueError("too many blocks")


def _after_sub_blocks(data: bytes, position: int, budget: Iterator[int]) -> int:
    for _ in budget:
        length = data[position]
        position += 1 + length
        if length == 0:
            return position
    raise ValueError("too many sub-blocks")


def _exactly(data: bytes, start: int, count: int) -> bytes:
    piece = data[start : start + count]
    if len(piece) != count:
        raise ValueError("cut short")
    return piece


_PARSERS: dict[str, Callable[[bytes], Header]] = {
    "JPEG": _jpeg,
    "PNG": _png,
    "WEBP": _webp,
    "BMP": _bmp,
    "GIF": _gif,
}
