"""A history of many callers: whoever is answered is answered about the own images, whatever the others do."""

import asyncio
import random

import grpc
import pytest
import toys
from convoy.v1 import image_classifier_pb2 as pb
from convoy.v1 import image_classifier_pb2_grpc as pb_grpc
from grpc import aio

REQUESTS, CALLERS = 2000, 16
SIZES = [(8, 8), (1, 1), (31, 17), (64, 64)]
BROKEN = [b"", b"no image", toys.grey_png(9)[:40], b"\xff\xd8\xff\xe0 cut"]


def make_request(dice):
    """A request of 1 to 20 images, and what is expected of each: the class, or None for one that cannot be used."""
    images, expected = [], []
    for _ in range(dice.choice([1, 1, 1, 2, 5, 20])):
        if dice.random() < 0.03:
            images.append(dice.choice(BROKEN))
            expected.append(None)
        else:
            level = dice.randrange(256)
            images.append(toys.grey_png(level, dice.choice(SIZES)))
            expected.append(level)
    return pb.ClassifyRequest(images=images, top_k=1), expected


def check(response, expected):
    found = [
        None if result.WhichOneof("outcome") == "error" else result.classification.classes[0].index
        for result in response.results
    ]
    assert found == expected


async def outcome_of(stub, dice):
    """Sends one request, sometimes goes away, and says in one word how it ended; a wrong answer raises."""
    request, expected = make_request(dice)
    call = stub.Classify(request, timeout=dice.choice([20.0, 20.0, 20.0, 0.02]))
    if dice.random() < 0.1:
        for _ in range(dice.randrange(6)):
            await asyncio.sleep(0)
        call.cancel()
    try:
        response = await call
    except asyncio.CancelledError:
        return "cancelled"
    except aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
            assert set(expected) == {None}
            return "all bad"
        return error.code().name
    check(response, expected)
    return "answered"


@pytest.mark.parametrize("seed", [1])
async def test_two_thousand_requests_of_sixteen_callers_never_get_each_others_answers(tmp_path, seed):
    toys.write_version(tmp_path, classes=256)
    ended = []
    async with toys.real_server(tmp_path) as server:

        async def caller(number):
            dice = random.Random(seed * 1000 + number)
            async with aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                stub = pb_grpc.ImageClassifierStub(channel)
                ended.extend([await outcome_of(stub, dice) for _ in range(REQUESTS // CALLERS)])

        await asyncio.gather(*map(caller, range(CALLERS)))
        async with aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = pb_grpc.ImageClassifierStub(channel)
            request, expected = make_request(random.Random(0))
            check(await stub.Classify(request), expected)
            await stub.ListModels(pb.ListModelsRequest())
        value = server.metrics.registry.get_sample_value
        pending = value("convoy_pending_images"), value("convoy_pending_bytes")
        queued = value("convoy_queue_images", {"model": "grey"}), value("convoy_decode_queue_images")

    assert len(ended) == REQUESTS
    assert set(ended) <= {"answered", "cancelled", "all bad", "DEADLINE_EXCEEDED", "UNAVAILABLE"}
    assert ended.count("answered") > 0.6 * REQUESTS
    assert ended.count("cancelled") > 0.02 * REQUESTS
    assert ended.count("all bad") > 0
    assert (pending, queued) == ((0, 0), (0, 0))
