"""What is no image, or damaged, or too large, becomes an InvalidImageError; what is only odd does not."""

import os
import struct
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from quadrants import COLOURS, GOLDEN, GRAY_QUADRANTS, IMAGENET, QUADRANTS, packed, quadrants, raw_png
from toys import encoded

from service.artifact import InputSpec, Resize
from service.errors import ImageFault, InvalidImageError
from service.preprocess import Limits, preprocess

ENCODED = st.sampled_from([data for data, _, _ in GOLDEN.values()])


def refusal(data, limits=None, spec=QUADRANTS):
    with pytest.raises(InvalidImageError) as caught:
        preprocess(data, spec, limits)
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    assert "PIL" not in message
    return caught.value


def test_no_bytes():
    assert refusal(b"").reason is ImageFault.EMPTY


@pytest.mark.parametrize(
    "data", [b"text named .jpg", encoded(quadrants(COLOURS), "TIFF"), encoded(quadrants(COLOURS), "PPM")]
)
def test_other_formats_are_refused_though_pillow_knows_them(data):
    assert refusal(data).reason is ImageFault.UNSUPPORTED_FORMAT


def test_formats_can_be_limited():
    error = refusal(GOLDEN["GIF"][0], Limits(formats=frozenset({"JPEG", "PNG"})))

    assert error.reason is ImageFault.UNSUPPORTED_FORMAT
    assert error.image_format == "GIF"
    assert "JPEG, PNG" in str(error)


@pytest.mark.parametrize("name", ["PNG RGB", "JPEG 4:2:0", "JPEG CMYK", "WebP", "WebP animated", "BMP RGB", "GIF"])
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_truncated_images_are_refused(name, kept):
    data = GOLDEN[name][0]

    error = refusal(data[: int(len(data) * kept)])

    assert error.reason is ImageFault.CORRUPT
    assert error.image_format == name.split()[0].upper()


@pytest.mark.parametrize(
    ("mode", "size"), [("RGB", (640, 427)), ("RGB", (2400, 2400)), ("L", (2400, 2400)), ("CMYK", (512, 512))]
)
def test_truncated_jpeg_with_an_end_marker_put_behind_it_is_refused(photos, mode, size):
    """Whoever decodes it: most would fill in what is missing."""
    data = encoded(photos[0].resize(size).convert(mode), "JPEG", quality=90)
    large = InputSpec(height=2000, width=2000, channels=3)

    preprocess(data, large)
    with pytest.raises(InvalidImageError) as refused:
        preprocess(data[: len(data) // 2] + b"\xff\xd9", large)
    assert refused.value.reason is ImageFault.CORRUPT


def test_jpeg_with_bytes_after_its_end_is_fine(photos):
    data = encoded(photos[0], "JPEG", quality=90)

    np.testing.assert_array_equal(preprocess(data + b"trailer" * 99, IMAGENET), preprocess(data, IMAGENET))


STRAY = b"\x11\x22\x33"


def with_scan_parameters(data):
    start = data.index(b"\xff\xda")
    end = start + 2 + int.from_bytes(data[start + 2 : start + 4])
    return data[: end - 3] + bytes(3) + data[end:]


def with_jfif_2(data):
    return data.replace(b"JFIF\0\x01", b"JFIF\0\x02", 1)


def with_stray_bytes_before_the_end(data):
    return data[:-2] + STRAY + data[-2:]


@pytest.mark.parametrize(
    ("spoil", "mode"),
    [
        (with_stray_bytes_before_the_end, "RGB"),
        (with_stray_bytes_before_the_end, "CMYK"),
        (with_scan_parameters, "RGB"),
        (with_scan_parameters, "CMYK"),
        (with_jfif_2, "L"),
        (with_jfif_2, "RGB"),
    ],
)
def test_what_is_odd_in_a_jpeg_without_a_pixel_missing_is_harmless(photos, spoil, mode):
    data = encoded(photos[0].convert(mode), "JPEG", quality=90)
    odd = spoil(data)

    assert odd != data
    assert np.abs(preprocess(odd, IMAGENET).astype(int) - preprocess(data, IMAGENET)).mean() < 1
    for kept in (0.6, 0.9):  # damage behind it is found all the same
        assert refusal(odd[: int(len(odd) * kept)] + b"\xff\xd9").reason is ImageFault.CORRUPT


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_stray_bytes_in_the_pixels_of_a_jpeg_are_damage(photos, mode):
    """Nothing tells them from a piece that was decoded too short."""
    data = encoded(photos[0].convert(mode), "JPEG", quality=90, restart_marker_blocks=100)
    restart = data.index(b"\xff\xd0")

    assert refusal(data[:restart] + STRAY + data[restart:]).reason is ImageFault.CORRUPT


def test_jpeg_of_unusual_sampling_is_decoded(photos):
    data = bytearray(encoded(photos[0].resize((160, 120)), "JPEG", subsampling=0))
    frame = data.index(b"\xff\xc0")
    # Same number of blocks in all components, so any equal factors read the same file; turbojpeg knows only 1x1.
    data[frame + 11] = data[frame + 14] = data[frame + 17] = 0x11
    plain = preprocess(bytes(data), QUADRANTS)
    data[frame + 11] = 0x31

    assert preprocess(bytes(data), QUADRANTS).shape == plain.shape


@pytest.mark.parametrize(
    "data",
    [
        raw_png(packed((0, 1, 1, 0), 1), 1, 0).replace(struct.pack(">II", 64, 48), struct.pack(">II", 60_000, 60_000)),
        b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + b"\x2c" + struct.pack("<4HB", 0, 0, 9, 9, 0),
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 70, 0, 0, 54, 40, 30_000, -30_000, 1, 24, 0, 0, 0, 0, 0, 0),
        b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\xff\x3f\0\xff\x3f\0",
        b"RIFF\0\0\0\0WEBPVP8L\x0a\0\0\0\x2f\xff\xff\xff\xff\0",
    ],
    ids=["PNG", "GIF", "BMP", "WebP", "WebP lossless"],
)
def test_pixel_bombs_are_refused_by_their_header(data):
    error = refusal(data)

    assert error.reason is ImageFault.TOO_LARGE
    assert "64,000,000" in str(error)


def test_limits_are_inclusive():
    data = GOLDEN["PNG RGB"][0]
    preprocess(data, QUADRANTS, Limits(max_pixels=64 * 48, max_side=64))

    assert refusal(data, Limits(max_pixels=64 * 48 - 1)).reason is ImageFault.TOO_LARGE
    assert refusal(data, Limits(max_side=63)).reason is ImageFault.TOO_LARGE


def test_limits_above_pillows_own_are_respected():
    wide = raw_png(np.zeros((48, 8), np.uint8), 1, 0)  # whatever the pixels say, the header is judged first
    data = wide.replace(struct.pack(">II", 64, 48), struct.pack(">II", 20_000, 20_000))

    assert refusal(data, Limits(max_pixels=10**9)).reason is ImageFault.CORRUPT


MEMORY_SCRIPT = """
    import io, resource, sys
    from PIL import Image
    from service.artifact import InputSpec, Resize
    from service.preprocess import preprocess

    images = []
    for size in ((30_000, 1), (1, 30_000), (30_000, 2)):
        for image_format in ("PNG", "JPEG"):
            stream = io.BytesIO()
            Image.new("RGB", size, "red").save(stream, image_format)
            images.append(stream.getvalue())
    specs = [InputSpec(height=224, width=224, resize=Resize(mode=mode)) for mode in ("crop", "stretch")]
    preprocess(images[0], specs[0])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in images:
        for spec in specs:
            assert (preprocess(data, spec) >= 0).all()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_extreme_shapes_need_little_memory():
    script = textwrap.dedent(MEMORY_SCRIPT)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60, env=dict(os.environ)
    )

    assert int(done.stdout) < 20_000  # KiB; resizing all of 30000x1 to a side of 224 would take 4 GB


MAGICS = [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\xff\0\0\0WEBP", b"BM", b"GIF89a", b""]


def image_or_refusal(data):
    for spec in (QUADRANTS, GRAY_QUADRANTS):
        try:
            pixels = preprocess(data, spec, Limits(max_pixels=1_000_000))
        except InvalidImageError as error:
            assert str(error).endswith(".")  # noqa: PT017 - both outcomes are allowed
        else:
            assert pixels.shape == spec.shape
            assert pixels.dtype == np.uint8


@settings(max_examples=300, deadline=None)
@given(magic=st.sampled_from(MAGICS), rest=st.binary(max_size=300))
def test_any_bytes_are_an_image_or_refused(magic, rest):
    image_or_refusal(magic + rest)


@settings(max_examples=300, deadline=None)
@given(seed=ENCODED, kept=st.floats(0, 1))
def test_any_truncation_is_an_image_or_refused(seed, kept):
    image_or_refusal(seed[: int(len(seed) * kept)])


@settings(max_examples=1500, deadline=None)
@given(
    seed=ENCODED,
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6),
    near_start=st.booleans(),
)
def test_any_damage_is_an_image_or_refused(seed, flips, near_start):
    data = bytearray(seed)
    for position, value in flips:
        data[int(position * (min(len(data), 100) if near_start else len(data)))] ^= value
    image_or_refusal(bytes(data))


@settings(max_examples=300, deadline=None)
@given(
    seed=ENCODED,
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    paste=st.floats(0, 1),
)
def test_any_rearrangement_is_an_image_or_refused(seed, cut, paste):
    start, stop = sorted(int(len(seed) * where) for where in cut)
    at = int(len(seed) * paste)
    image_or_refusal(seed[:at] + seed[start:stop] + seed[at:])
    image_or_refusal(seed[:start] + seed[stop:])


def test_a_small_file_that_claims_a_large_picture_is_refused_at_once():
    """256 of them in a request of 18 kB took 20 seconds of two cores."""
    png = toys.grey_png(7)
    lying = png[:16] + struct.pack(">II", 8000, 8000) + png[24:]
    with pytest.raises(InvalidImageError, match="cannot hold so many pixels") as caught:
        preprocess(lying, InputSpec(height=4, width=4, channels=1, resize=Resize(mode="stretch")))
    assert caught.value.reason is ImageFault.CORRUPT


@pytest.mark.parametrize("size", [(5, 41), (41, 5)])
def test_neither_side_may_be_longer_than_the_limit(size):
    image = encoded(Image.new("L", size), "PNG")

    assert refusal(image, Limits(max_side=40)).reason is ImageFault.TOO_LARGE
    assert preprocess(image, QUADRANTS, Limits(max_side=41)).shape == QUADRANTS.shape


def test_an_image_for_which_memory_is_short_is_too_large(monkeypatch):
    def short(*_, **__):
        raise MemoryError

    monkeypatch.setattr("service.decode_pillow.decode", short)
    fault = refusal(encoded(Image.new("L", (30, 20)), "PNG"))

    assert fault.reason is ImageFault.TOO_LARGE
    assert "30x20 pixels needs more memory than there is" in str(fault)
