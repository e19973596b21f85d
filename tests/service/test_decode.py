"""The decode stage: each image into its own slot, faults by position, and turns between models."""

import asyncio
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
import toys

from service.artifact import InputSpec, Resize
from service.batcher import Silent
from service.decode import Encoded, decode_here, decode_pool, light
from service.errors import ExpiredError, ImageFault
from service.preprocess import Limits, preprocess

SPEC = InputSpec(height=4, width=4, channels=1, resize=Resize(mode="stretch"))


def work(*images, spec=SPEC):
    return Encoded(images, spec, Limits(), np.full((len(images), *spec.shape), 77, np.uint8))


def faults_of(job):
    return {position: fault.reason for _, part in job.results for position, fault in part.items()}


@pytest.fixture
async def decoder():
    pool = decode_pool(2, Silent())
    pool.start()
    yield pool
    await pool.close()


def soon():
    return time.monotonic() + 20


@pytest.mark.parametrize("kind", [b"iCCP", b"zTXt", b"iTXt"])
def test_nothing_beside_the_pixels_of_a_thumbnail_is_unfolded(kind):
    """It is decoded on the event loop, and what three hundred such chunks unfold to would hold that for a second."""
    png = toys.grey_png(7)
    content = {b"iCCP": b"x\0\0", b"zTXt": b"x\0\0", b"iTXt": b"x\0\x01\0\0\0"}[kind] + zlib.compress(bytes(1 << 20))
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    thumbnail = work(png[:33] + chunk + png[33:])
    tracemalloc.start()
    assert decode_here(thumbnail, light(thumbnail)) == {}
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert thumbnail.pixels.max() == 7
    assert peak < 1 << 19


def test_what_is_large_or_many_or_unknown_is_no_light_work():
    png = toys.grey_png(7)
    assert light(work(png, png)) is not None
    assert light(work(png, b"GIF")) is None
    assert light(work(png, png + bytes(4096))) is None
    assert light(work(png, toys.grey_png(7, size=(65, 64)))) is None
    assert light(work(png, spec=InputSpec(height=300, width=300, channels=1, resize=Resize(mode="stretch")))) is None


async def test_each_image_fills_its_own_slot(decoder):
    task = work(*(toys.grey_png(level) for level in range(0, 250, 10)))
    job = await decoder.submit(task, 25, soon())

    assert task.pixels[:, 0, 0, 0].tolist() == list(range(0, 250, 10))
    assert faults_of(job) == {}


async def test_faults_are_given_by_position_and_leave_the_other_slots_alone(decoder):
    task = work(toys.grey_png(1), b"", b"text", toys.grey_png(4))
    job = await decoder.submit(task, 4, soon())

    assert faults_of(job) == {1: ImageFault.EMPTY, 2: ImageFault.UNSUPPORTED_FORMAT}
    assert task.pixels[:, 0, 0, 0].tolist() == [1, 77, 77, 4]


async def test_the_pixels_are_those_of_preprocess(decoder):
    spec = InputSpec(height=48, width=64)
    photo = toys.photo_jpeg(200, 150)
    task = work(photo, spec=spec)
    await decoder.submit(task, 1, soon())

    assert np.array_equal(task.pixels[0], preprocess(photo, spec))


async def test_what_has_expired_is_not_decoded(decoder):
    task = work(toys.grey_png(1))
    with pytest.raises(ExpiredError):
        await decoder.submit(task, 1, time.monotonic() - 1)

    assert task.pixels.max() == 77


async def test_a_small_request_does_not_wait_for_all_of_a_large_one():
    """Images take turns between models, so one image of one model passes a hundred photos of the other."""
    pool = decode_pool(1, Silent())
    large, small = work(*[toys.photo_jpeg()] * 40), work(toys.grey_png(5))
    pool.start()
    first = pool.submit(large, 40, soon(), flow="photos")
    second = pool.submit(small, 1, soon(), flow="digits")
    done, _ = await asyncio.wait([first, second], return_when=asyncio.FIRST_COMPLETED)

    assert done == {second}
    await first
    await pool.close()
