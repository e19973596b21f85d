"""Images become the pixels that the textbook pipeline in Pillow makes of them, in memory of the caller's choice."""

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageOps
from quadrants import COLOURS, GOLDEN, GRAY_QUADRANTS, IMAGENET, QUADRANTS, quadrants
from toys import encoded

from service.artifact import InputSpec, Resize
from service.preprocess import FORMATS, preprocess

EXIF_TRANSPOSITIONS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def textbook(data, spec):
    """What Pillow's users write: orient, convert, resize all, cut."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB" if spec.channels == 3 else "L")
    method = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[spec.resize.interpolation]
    if spec.resize.mode == "stretch":
        image = image.resize((spec.width, spec.height), method)
    else:
        width, height = image.size
        side = spec.resize.shorter_side or max(spec.width, spec.height)
        new = (side, int(side * height / width)) if width <= height else (int(side * width / height), side)
        left, top = round((new[0] - spec.width) / 2.0), round((new[1] - spec.height) / 2.0)
        image = image.resize(new, method).crop((left, top, left + spec.width, top + spec.height))
    pixels = np.asarray(image)
    return pixels.reshape(spec.shape)


SPECS = {
    "ImageNet": IMAGENET,
    "bicubic": InputSpec(height=160, width=160, resize=Resize(shorter_side=192, interpolation="bicubic")),
    "stretch": InputSpec(height=96, width=128, resize=Resize(mode="stretch")),
    "gray": InputSpec(height=100, width=140, channels=1, resize=Resize(shorter_side=180)),
    "enlarged": InputSpec(height=600, width=500, resize=Resize(shorter_side=640)),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize(
    ("image_format", "options", "mean", "largest"),
    [
        ("PNG", {}, 0.02, 1),
        ("BMP", {}, 0.02, 1),
        ("WEBP", {"quality": 90}, 0.02, 1),
        ("JPEG", {"quality": 90}, 1.0, 12),
    ],
    ids=["PNG", "BMP", "WebP", "JPEG"],
)
def test_photos_come_out_as_the_textbook_has_them(photos, image_format, options, mean, largest, spec):
    for photo in photos:
        data = encoded(photo, image_format, **options)
        difference = preprocess(data, spec).astype(int) - textbook(data, spec)

        assert np.abs(difference).mean() <= mean
        assert abs(difference.mean()) <= 0.3
        assert np.abs(difference).max() <= largest


@pytest.mark.parametrize("times", [1.0, 1.9, 2.1, 3.9, 4.1, 7.9, 8.1, 12.0, 16.5])
def test_large_jpegs_decoded_at_a_scaled_size_stay_within_the_bound(photos, times):
    width, height = round(224 * times * 1.4), round(224 * times)
    tiles = Image.new("RGB", (width, height))
    for index, left in enumerate(range(0, width, 600)):
        for top in range(0, height, 400):
            tiles.paste(photos[(index + top) % 2].resize((600, 400)), (left, top))
    data = encoded(tiles, "JPEG", quality=90)
    spec = InputSpec(height=224, width=224)

    difference = preprocess(data, spec).astype(int) - textbook(data, spec)

    assert np.abs(difference).mean() <= 1.0
    assert abs(difference.mean()) <= 0.3


def test_large_jpeg_for_a_large_input_comes_out_as_the_textbook_has_it(photos):
    data = encoded(photos[0].resize((2500, 1668)), "JPEG", quality=90)
    spec = InputSpec(height=900, width=1000, resize=Resize(shorter_side=1100))

    difference = preprocess(data, spec).astype(int) - textbook(data, spec)

    assert np.abs(difference).mean() <= 0.3


@pytest.mark.parametrize("orientation", EXIF_TRANSPOSITIONS)
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("name", ["ImageNet", "stretch"])
def test_exif_orientation_is_applied_before_the_crop(photos, orientation, image_format, name):
    exif = Image.Exif()
    exif[0x0112] = orientation
    method = EXIF_TRANSPOSITIONS[orientation]
    upright = photos[0].crop((30, 20, 631, 420))
    # Stored turned, so that turning it as EXIF says gives the upright one.
    stored = upright if method is None else upright.transpose(method)
    options = {"lossless": True} if image_format == "WEBP" else {"quality": 98, "subsampling": 0}
    data = encoded(stored, image_format, exif=exif, **options)

    found = preprocess(data, SPECS[name]).astype(int)

    expected = textbook(encoded(upright, "PNG"), SPECS[name])
    # Turned after the resize, the two passes round in the other order.
    assert np.abs(found - expected).mean() < (1.5 if image_format == "JPEG" else 0.2)


@pytest.mark.parametrize("image_format", sorted(FORMATS))
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (1, 700), (700, 1), (2, 3)])
@pytest.mark.parametrize("name", SPECS)
def test_tiny_and_thin_images_work(image_format, size, name):
    data = encoded(Image.new("RGB", size, (200, 100, 50)), image_format)

    pixels = preprocess(data, SPECS[name])

    assert pixels.shape == SPECS[name].shape
    expected = (124,) if pixels.shape[2] == 1 else (200, 100, 50)
    np.testing.assert_allclose(
        pixels.reshape(-1, pixels.shape[2]),
        np.broadcast_to(expected, (len(pixels) * pixels.shape[1], len(expected))),
        atol=3,
    )


def test_enlarging_interpolates():
    data = encoded(np.array([[0, 100], [200, 100]], np.uint8), "PNG")

    pixels = preprocess(data, InputSpec(height=4, width=4, channels=1))[..., 0]

    # Pillow's and OpenCV's half-pixel centres: weights 1, 3/4, 1/4, 0.
    np.testing.assert_array_equal(pixels[0], [0, 25, 75, 100])
    np.testing.assert_array_equal(pixels[:, 0], [0, 50, 150, 200])


def test_exact_size_passes_unchanged():
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)

    found = preprocess(encoded(pixels, "PNG"), InputSpec(height=28, width=28, channels=1))

    np.testing.assert_array_equal(found[..., 0], pixels)


def test_shrinking_is_antialiased():
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255

    found = preprocess(encoded(stripes, "PNG"), InputSpec(height=8, width=8, channels=1))

    np.testing.assert_allclose(found, 127.5, atol=6)


@pytest.mark.parametrize("name", ["PNG RGB", "PNG RGBA", "JPEG 4:2:0", "JPEG CMYK", "WebP"])
def test_out_is_written_in_place(name):
    data = GOLDEN[name][0]
    batch = np.full((3, *QUADRANTS.shape), 77, np.uint8)

    returned = preprocess(data, QUADRANTS, out=batch[1])

    assert np.shares_memory(returned, batch)
    np.testing.assert_array_equal(batch[1], preprocess(data, QUADRANTS))
    assert (batch[[0, 2]] == 77).all()


def test_out_may_be_memory_of_someone_else():
    buffer = bytearray(QUADRANTS.nbytes)
    out = np.frombuffer(buffer, np.uint8).reshape(QUADRANTS.shape)

    preprocess(GOLDEN["PNG RGB"][0], QUADRANTS, out=out)

    assert bytes(buffer) == preprocess(GOLDEN["PNG RGB"][0], QUADRANTS).tobytes()


@pytest.mark.parametrize(
    "out",
    [
        np.empty((12, 16, 1), np.uint8),
        np.empty((16, 12, 3), np.uint8),
        np.empty((12, 16, 3), np.float32),
        np.empty((12, 32, 3), np.uint8)[:, ::2],
    ],
    ids=["channels", "transposed", "dtype", "strided"],
)
def test_unusable_out_is_a_programming_error(out):
    with pytest.raises(ValueError, match="out has to be"):
        preprocess(GOLDEN["PNG RGB"][0], QUADRANTS, out=out)


def test_threads_do_not_disturb_each_other(photos):
    kinds = [data for data, _, _ in GOLDEN.values()] + [encoded(photo, "JPEG") for photo in photos]
    jobs = [(data, spec) for data in kinds for spec in (IMAGENET, GRAY_QUADRANTS)] * 3
    serial = [preprocess(*job) for job in jobs]

    with ThreadPoolExecutor(4) as pool:
        parallel = list(pool.map(lambda job: preprocess(*job), jobs))

    for one, other in zip(serial, parallel, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("orientation", [3, 6])
def test_exif_of_a_png_may_begin_as_that_of_a_jpeg(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = exif.tobytes()
    assert content.startswith(b"Exif\0\0")
    plain = encoded(quadrants(COLOURS), "PNG")
    chunk = struct.pack(">I", len(content)) + b"eXIf" + content
    chunk += struct.pack(">I", zlib.crc32(chunk[4:]))
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded(quadrants(COLOURS), "PNG", exif=exif))))

    found = preprocess(plain[:33] + chunk + plain[33:], QUADRANTS)
    np.testing.assert_allclose(found, preprocess(encoded(np.asarray(turned), "PNG"), QUADRANTS), atol=2)
