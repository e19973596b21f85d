"""Photo-like JPEGs for measurements, made the same way every time from three real photos.

The sources are scikit-learn's china.jpg and flower.jpg (640x427) and matplotlib's grace_hopper.jpg (512x600). Each
result is a crop, a rescaled crop or a mosaic of them with sensor-like noise, as a JPEG of quality 85 to 95 with 4:2:0
chroma. A mosaic at full resolution has more detail for each pixel than a camera's picture: a hard case for accuracy.
"""

import io
from pathlib import Path

import matplotlib as mpl
import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

TILE = (400, 300)
# Columns and rows that each source is divided into: ten places in all.
PLACES = ((3, 1), (3, 1), (2, 2))


def small(count: int, size: tuple[int, int] = (500, 375), seed: int = 0) -> list[bytes]:
    """Crops at native or up to 1.3 times finer resolution, half of them mirrored."""
    rng = np.random.default_rng(seed)
    originals = sources()
    result = []
    for index in range(count):
        original = originals[index % len(originals)]
        finer = rng.uniform(1.0, 1.3) if index % 2 else 1.0
        width, height = (min(int(side * finer), limit) for side, limit in zip(size, original.size, strict=True))
        image = _crop(original, (width, height), rng).resize(size, Image.Resampling.LANCZOS)
        if index % 4 > 1:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        result.append(_jpeg(_noisy(image, rng, rng.uniform(0, 4)), rng))
    return result


def large(count: int, size: tuple[int, int] = (4000, 3000), seed: int = 1) -> list[bytes]:
    """Twelve megapixels: half enlarged crops, half mosaics of crops at native resolution."""
    rng = np.random.default_rng(seed)
    originals = sources()
    result = []
    for index in range(count):
        if index % 2:
            image = Image.new("RGB", size)
            for top in range(0, size[1], TILE[1]):
                for left in range(0, size[0], TILE[0]):
                    image.paste(_crop(originals[rng.integers(len(originals))], TILE, rng), (left, top))
        else:
            image = _crop(originals[index % len(originals)], (500, 375), rng).resize(size, Image.Resampling.BICUBIC)
        result.append(_jpeg(_noisy(image, rng, 3.0), rng))
    return result


def places(each: int, seed: int = 2) -> dict[str, list[bytes]]:
    """Ten classes: places in the three photos, and for each place so many crops of 160 to 200 pixels."""
    rng = np.random.default_rng(seed)
    result: dict[str, list[bytes]] = {}
    for original, (columns, rows) in zip(sources(), PLACES, strict=True):
        width, height = original.width // columns, original.height // rows
        for left in range(0, columns * width, width):
            for top in range(0, rows * height, height):
                place = original.crop((left, top, left + width, top + height))
                sides = rng.integers(160, 201, (each, 2)).tolist()
                crops = [_noisy(_crop(place, (side, other), rng), rng, 2.0) for side, other in sides]
                result[f"place{len(result)}"] = [_jpeg(crop, rng) for crop in crops]
    return result


def sources() -> list[Image.Image]:
    """The three real photos."""
    hopper = Path(mpl.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    return [*photos, Image.open(hopper).convert("RGB")]


def _crop(image: Image.Image, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    left, top = (int(rng.integers(limit - side + 1)) for side, limit in zip(size, image.size, strict=True))
    return image.crop((left, top, left + size[0], top + size[1]))


def _noisy(image: Image.Image, rng: np.random.Generator, sigma: float) -> Image.Image:
    pixels = np.asarray(image).astype(np.float32)
    pixels += rng.normal(0, sigma, (*pixels.shape[:2], 1)).astype(np.float32)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _jpeg(image: Image.Image, rng: np.random.Generator) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=int(rng.integers(85, 96)), subsampling=2)
    return stream.getvalue()
