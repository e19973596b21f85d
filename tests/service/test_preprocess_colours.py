"""Encoded images of every kind become the right colours, worked out here: four quadrants of known ones."""

import struct

import numpy as np
import pytest
from PIL import Image
from quadrants import GOLDEN, GRAY_QUADRANTS, QUADRANTS
from toys import encoded

from service.artifact import InputSpec, Resize
from service.preprocess import preprocess


def colours_of(pixels):
    """The colour in the middle of each quadrant."""
    height, width = pixels.shape[:2]
    rows, columns = (height // 4, height * 3 // 4), (width // 4, width * 3 // 4)
    return [tuple(int(v) for v in pixels[r, c]) for r in rows for c in columns]


def luma(colours):
    """ITU-R 601-2."""
    return [(round(0.299 * r + 0.587 * g + 0.114 * b),) for r, g, b in colours]


@pytest.mark.parametrize("name", GOLDEN)
def test_every_kind_of_image_gives_its_colours(name):
    data, colours, tolerance = GOLDEN[name]

    found = colours_of(preprocess(data, QUADRANTS))

    np.testing.assert_allclose(found, colours, atol=tolerance)


@pytest.mark.parametrize("name", GOLDEN)
def test_every_kind_of_image_gives_its_luma_as_one_channel(name):
    data, colours, tolerance = GOLDEN[name]

    found = colours_of(preprocess(data, GRAY_QUADRANTS))

    np.testing.assert_allclose(found, luma(colours), atol=tolerance + 1)


@pytest.mark.parametrize("options", [{}, {"transparency": 3}])
def test_beside_a_gif_frame_that_is_smaller_than_the_canvas_nothing_is_drawn(options):
    colours = ((0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255))
    image = Image.new("P", (32, 24), 1)
    image.putpalette([v for colour in colours for v in colour])
    data = bytearray(encoded(image, "GIF", optimize=False, **options))
    data[6:10] = struct.pack("<HH", 64, 48)
    data[11] = 2  # the background's colour, which nobody shows

    assert colours_of(preprocess(bytes(data), QUADRANTS)) == [colours[1], *[(255, 255, 255)] * 3]


def test_what_lies_under_transparent_pixels_does_not_matter():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 4), np.uint8)
    pixels[..., 3] = 255 * (pixels[..., 3] > 100)
    hidden = pixels[..., 3:] == 0
    other = np.where(hidden, np.array([1, 2, 3, 0], np.uint8), pixels)
    spec = InputSpec(height=20, width=20)

    first, second = (preprocess(encoded(version, "PNG"), spec) for version in (pixels, other))

    np.testing.assert_array_equal(first, second)
    composited = np.where(hidden, 255, pixels)[..., :3].astype(np.uint8)
    assert np.abs(first.astype(int) - preprocess(encoded(composited, "PNG"), spec)).max() <= 2


def bitmap(alpha):
    """A BMP of 4x4 pixels with a mask for alpha (BITMAPV4HEADER), all of one colour."""
    masks = struct.pack("<4I", 0x00FF0000, 0x0000FF00, 0x000000FF, 0xFF000000)
    fields = struct.pack("<IiiHHIIiiII", 108, 4, 4, 1, 32, 3, 64, 2835, 2835, 0, 0)
    head = struct.pack("<2sIHHI", b"BM", 14 + 108 + 64, 0, 0, 14 + 108)
    return head + fields + masks + bytes(52) + bytes([30, 20, 10, alpha]) * 16


@pytest.mark.parametrize(("alpha", "colour"), [(0, (10, 20, 30)), (255, (10, 20, 30))])
def test_alpha_that_nobody_filled_hides_nothing(alpha, colour):
    spec = InputSpec(height=4, width=4, resize=Resize(mode="stretch"))

    assert preprocess(bitmap(alpha), spec)[0, 0].tolist() == list(colour)
