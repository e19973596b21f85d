"""The decode stage: turns the encoded images of a job into pixels, on threads of their own.

It is a `Batcher` whose work is one image at a time, so decoding obeys the same deadlines, fairness and cancellation as
inference: an image whose caller has gone is not decoded.

Thumbnails are the exception. Going to a thread and back costs more than the 50 µs that a 28x28 PNG takes, most of which
holds the interpreter's lock anyway; they are decoded where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from service.artifact import InputSpec
from service.batcher import Batcher, Job, Observer, OneByOne
from service.errors import InvalidImageError
from service.image_header import Header, read_header
from service.preprocess import Limits, Pixels, preprocess
from service.schedule import Part


class Encoded(NamedTuple):
    """Images as they came, and the model input they are for. `pixels`: uint8[n, H, W, C], filled by the decoder."""

    images: Sequence[bytes]
    spec: InputSpec
    limits: Limits
    pixels: Pixels


# Both bounds: a small file can unfold to any number of pixels, and a few pixels can hide in a large file.
_THUMBNAIL_BYTES = 4096
_THUMBNAIL_PIXELS = 64 * 64
# To enlarge some of them to the size of a large input takes milliseconds.
_PIXELS_HERE = 16 * _THUMBNAIL_PIXELS

# What decoding one part gives: the fault of each image that cannot be used, by its position in the job.
Faults = dict[int, InvalidImageError]
Decoder = Batcher[Encoded, Faults]


def light(work: Encoded) -> Sequence[Header] | None:
    """Headers of images that take less time to decode than to hand to a thread: few thumbnails, for a small input."""
    if len(work.images) * work.spec.height * work.spec.width > _PIXELS_HERE:
        return None
    headers = []
    for data in work.images:
        header = thumbnail(data)
        if header is None:
            return None
        headers.append(header)
    return headers


def thumbnail(data: bytes) -> Header | None:
    """The header of an image that is small in every respect; damaged and unknown images are none."""
    if len(data) > _THUMBNAIL_BYTES:
        return None
    try:
        header = read_header(data)
    except InvalidImageError:
        return None
    return header if header.width * header.height <= _THUMBNAIL_PIXELS else None


def decode_here(work: Encoded, headers: Sequence[Header]) -> Faults:
    """Decodes on the calling thread what is `light`."""
    return _decoded(work, 0, headers)


def decode_pool(threads: int, observer: Observer) -> Decoder:
    """A decode stage with so many threads."""
    return Batcher([_decode] * threads, sizes=OneByOne(), name="decode", observer=observer)


def _decode(parts: Sequence[Part[Job[Encoded, Faults]]]) -> list[Faults]:
    return [_decoded(part.job.payload, part.start, [None] * (part.stop - part.start)) for part in parts]


def _decoded(work: Encoded, start: int, headers: Sequence[Header | None]) -> Faults:
    """Decodes as many images from one on; of some the header is known."""
    faults: Faults = {}
    for position, header in enumerate(headers, start):
        try:
            preprocess(work.images[position], work.spec, work.limits, out=work.pixels[position], header=header)
        except InvalidImageError as fault:
            faults[position] = fault.with_traceback(None)  # it leads back here, and a circle would keep the images
    return faults
