"""What of a PNG is its picture, and whether all of it is there, by files written here chunk by chunk."""

import io
import itertools
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from service import png
from service.artifact import InputSpec, Resize
from service.errors import InvalidImageError
from service.preprocess import preprocess

SPEC = InputSpec(height=16, width=16, resize=Resize(mode="stretch"))


def chunk(kind, content, damage=0):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content) ^ damage)


def written(mode="RGB", size=(16, 16), *, interlace=False, parts=1, keep=1.0, beside=()):
    """A picture of one bright level as a PNG of which so much of the data is there, in a stream that is whole."""
    bits, colour = {"1": (1, 0), "L": (8, 0), "RGB": (8, 2), "RGBA": (8, 6), "I;16": (16, 0)}[mode]
    pixel = {"1": 1, "L": 8, "RGB": 24, "RGBA": 32, "I;16": 16}[mode]
    passes = png.PASSES if interlace else ((0, 0, 1, 1),)
    rows = bytearray()
    for x, y, dx, dy in passes:
        columns, lines = -(-(size[0] - x) // dx), -(-(size[1] - y) // dy)
        if columns > 0 and lines > 0:
            rows += (b"\0" + b"\xff" * -(-columns * pixel // 8)) * lines
    packed = zlib.compress(bytes(rows[: round(len(rows) * keep)]))
    step = -(-len(packed) // parts)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, colour, 0, 0, interlace))
    data = b"".join(chunk(b"IDAT", packed[at : at + step]) for at in range(0, len(packed), step))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(beside) + data + chunk(b"IEND", b"")


def kinds(data):
    return [kind for kind, _, _ in png.chunks(data)]


@pytest.mark.parametrize(
    ("mode", "size", "interlace", "parts"),
    [
        *itertools.product(
            ("1", "L", "RGB", "RGBA", "I;16"), ((16, 16), (1, 1), (9, 3), (5, 130)), (False, True), (1, 2)
        )
    ],
)
def test_a_picture_is_whole_or_refused(mode, size, interlace, parts):
    whole = written(mode, size, interlace=interlace, parts=parts)
    assert preprocess(whole, SPEC).min() == 255
    assert png.is_whole(whole)
    if size == (1, 1):
        return
    short = written(mode, size, interlace=interlace, parts=parts, keep=0.7)
    assert not png.is_whole(short)
    with pytest.raises(InvalidImageError, match="truncated or damaged"):
        preprocess(short, SPEC)


@pytest.mark.parametrize("colour", [0, 129, 255, (129, 61, 203)])
def test_an_end_of_one_colour_is_whole_or_cut_short_like_any_other(colour):
    mode = "L" if isinstance(colour, int) else "RGB"
    stream = io.BytesIO()
    Image.new(mode, (16, 16), colour).save(stream, "PNG")
    whole = stream.getvalue()
    rows = zlib.decompress(b"".join(whole[a + 8 : b - 4] for kind, a, b in png.chunks(whole) if kind == b"IDAT"))
    short = whole[:33] + chunk(b"IDAT", zlib.compress(rows[:-1])) + chunk(b"IEND", b"")

    assert (preprocess(whole, SPEC) == colour).all()
    with pytest.raises(InvalidImageError, match="truncated or damaged"):
        preprocess(short, SPEC)


def test_profiles_are_not_counted():
    data = written(beside=[chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(3 << 20)))] * 300)

    assert preprocess(data, SPEC).min() == 255


@pytest.mark.parametrize("size", [(16, 16), (200, 200)])
def test_black_at_the_end_is_no_fault(size):
    pixels = np.zeros((size[1], size[0]), np.uint8)
    pixels[: size[1] // 2] = 255
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")

    assert preprocess(stream.getvalue(), SPEC)[-1].max() == 0


def test_more_data_than_the_picture_needs_is_no_fault():
    rows = (b"\0" + b"\xff" * 48) * 20
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 8, 2, 0, 0, 0))

    assert preprocess(data + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""), SPEC).min() == 255


@pytest.mark.parametrize(
    "beside",
    [
        chunk(b"tEXt", b"Comment\0hello", damage=1),
        chunk(b"gAMA", b"\0\0"),
        chunk(b"pHYs", b"\0"),
        chunk(b"zTXt", b"Raw profile type iptc\0\0" + zlib.compress(bytes(3 << 20))),
        chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(3 << 20))),
        chunk(b"acTL", struct.pack(">II", 0, 0)),
    ],
    ids=lambda content: content[4:8].decode(),
)
def test_what_stands_beside_the_pixels_is_no_reason_to_refuse_them(beside):
    data = written(beside=[beside])

    assert kinds(png.picture(data)) == [b"IHDR", b"IDAT", b"IEND"]
    assert preprocess(data, SPEC).min() == 255


def test_a_file_with_nothing_beside_its_picture_is_not_copied():
    data = written(parts=3)

    assert png.picture(data) is data
    assert png.picture(data[:-5]) == data[:-5]


def test_a_damaged_picture_is_refused_as_before():
    data = bytearray(written())
    data[50] ^= 0xFF
    with pytest.raises(InvalidImageError):
        preprocess(bytes(data), SPEC)


def test_transparency_and_palette_belong_to_the_picture():
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    stream = io.BytesIO()
    image.save(stream, "PNG", transparency=0, pnginfo=None, dpi=(72, 72))

    assert set(kinds(png.picture(stream.getvalue()))) == {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
    assert preprocess(stream.getvalue(), SPEC)[0, 0].tolist() == [200, 100, 50]
