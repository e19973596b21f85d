"""What the load generator sends: images from disk or made up, packed into requests beforehand."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from convoy.v1 import image_classifier_pb2 as pb
from PIL import Image

from service.errors import DataError
from service.files import IMAGES, visible_below

# Requests are kept encoded in memory, so that the generator does little else than send.
MAX_BYTES = 256 << 20
_QUALITY = 90
_SYNTHETIC_PIXELS = 4_000_000


def from_disk(paths: Sequence[Path], max_bytes: int = MAX_BYTES) -> list[bytes]:
    """The files named and those below the folders named, in order, until `max_bytes` are read.

    Raises:
        DataError: a path does not exist or cannot be read, or there is no image.
    """
    images: list[bytes] = []
    size = 0
    for file in _files(paths):
        try:
            data = file.read_bytes()
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror}") from error
        size += len(data)
        if images and size > max_bytes:
            break
        images.append(data)
    return images


def synthetic(width: int, height: int, seed: int = 0) -> list[bytes]:
    """2 to 16 JPEGs with detail at all scales, as photos have it, so that they cost about as much to decode."""
    rng = np.random.default_rng(seed)
    count = min(max(_SYNTHETIC_PIXELS // (width * height), 2), 16)
    return [_jpeg(_clouds(width, height, rng)) for _ in range(count)]


def requests(images: Sequence[bytes], per_request: int, model: str, version: int | None, top_k: int) -> list[bytes]:
    """Encoded ClassifyRequests that hold every image at least once, `per_request` in each, around in a circle."""
    result = []
    for start in range(0, len(images), per_request):
        chosen = [images[(start + offset) % len(images)] for offset in range(per_request)]
        request = pb.ClassifyRequest(model=model, version=version, images=chosen, top_k=top_k)
        result.append(request.SerializeToString())
    return result


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_file():
            yield path
        elif path.is_dir():
            found = [p for p in visible_below(path) if p.suffix.lower() in IMAGES]
            if not found:
                raise DataError(f"the folder {path} holds no image ({', '.join(sorted(IMAGES))})")
            yield from found
        else:
            raise DataError(f"{path} does not exist")


def _clouds(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Noise that grows weaker with each octave, as the spectrum of photos does."""
    total = np.full((height, width, 3), 128, np.float32)
    side, amplitude = 3, 70.0
    while side < 2 * max(width, height):
        rows, columns = min(side, height), min(side, width)
        for channel in range(3):
            grid = rng.standard_normal((rows, columns), np.float32) * amplitude
            total[..., channel] += np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))
        side, amplitude = side * 2, amplitude / 1.45
    return Image.fromarray(np.clip(total, 0, 255).astype(np.uint8))


def _jpeg(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=_QUALITY)
    return stream.getvalue()
