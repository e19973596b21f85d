"""PNGs that are nothing but pixels take a short way: the same pixels, and the same judgement of damage."""

import struct
import zlib

import numpy as np
import pytest
import toys
from PIL import Image

from service.artifact import InputSpec
from service.errors import InvalidImageError
from service.preprocess import preprocess

AFTER_IHDR = 33


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def commented(png):
    """The same image with a comment in it, which takes the long way."""
    return png[:AFTER_IHDR] + chunk(b"tEXt", b"Comment\0a") + png[AFTER_IHDR:]


def noise(mode, size, seed=0):
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    smooth = Image.fromarray(pixels).resize((3, 3)).resize(size)  # so that the encoder uses all of its filters
    return Image.blend(smooth, Image.fromarray(pixels), 0.3)


def judged(png, spec):
    """Pixels, or the reason and the text of the refusal."""
    try:
        return preprocess(png, spec).tobytes()
    except InvalidImageError as fault:
        return fault.reason, str(fault)


def spec(channels, mode="stretch"):
    resize = {"mode": mode, "interpolation": "bilinear"} | ({"shorter_side": 32} if mode != "stretch" else {})
    return InputSpec.model_validate({"height": 28, "width": 28, "channels": channels, "resize": resize})


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(28, 28), (1, 1), (40, 31), (7, 64)])
@pytest.mark.parametrize("compress_level", [0, 6])
def test_a_plain_png_gives_the_pixels_of_one_with_a_comment(mode, channels, size, compress_level):
    image = noise(mode, size)
    png = toys.encoded(image, "PNG", compress_level=compress_level)

    for rule in (spec(channels), spec(channels, "crop")):
        assert judged(png, rule) == judged(commented(png), rule)
    if size == (28, 28) and channels == len(image.getbands()):
        assert judged(png, spec(channels)) == image.tobytes()


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_damage_anywhere_is_judged_alike(mode):
    png = toys.encoded(noise(mode, (6, 5)), "PNG")
    rule = spec(1)
    outcomes = set()
    for position in range(AFTER_IHDR, len(png)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(png)
            damaged[position] ^= flip
            found = judged(bytes(damaged), rule)
            assert found == judged(commented(bytes(damaged)), rule), (position, flip)
            outcomes.add(type(found))
    assert outcomes == {bytes, tuple}  # some of it is harmless, some is not


@pytest.mark.parametrize("position", [24, 25, 26, 27, 28, 29, 32])  # kind of samples, and the header's checksum
def test_a_damaged_header_is_refused(position):
    damaged = bytearray(toys.encoded(noise("L", (6, 5)), "PNG"))
    damaged[position] ^= 0x03
    with pytest.raises(InvalidImageError, match="truncated or damaged"):
        preprocess(bytes(damaged), spec(1))


@pytest.mark.parametrize("kept", [0, 1, 7, 20])
def test_pixels_that_end_too_early_are_refused(kept):
    png = toys.encoded(noise("L", (6, 5)), "PNG")
    (length,) = struct.unpack_from(">I", png, AFTER_IHDR)
    start = AFTER_IHDR + 8
    short = png[:AFTER_IHDR] + chunk(b"IDAT", png[start : start + length][:kept]) + png[start + length + 4 :]
    with pytest.raises(InvalidImageError, match="truncated or damaged"):
        preprocess(short, spec(1))


def test_pixels_in_several_chunks_and_other_kinds_take_the_long_way():
    image = noise("L", (28, 28))
    png = toys.encoded(image, "PNG")
    (length,) = struct.unpack_from(">I", png, AFTER_IHDR)
    data = png[AFTER_IHDR + 8 : AFTER_IHDR + 8 + length]
    parted = png[:AFTER_IHDR] + chunk(b"IDAT", data[:50]) + chunk(b"IDAT", data[50:]) + chunk(b"IEND", b"")

    assert judged(parted, spec(1)) == judged(png, spec(1)) == image.tobytes()
    palette = toys.encoded(image.convert("P"), "PNG")
    assert judged(palette, spec(1)) == image.tobytes()
