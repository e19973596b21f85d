"""What a client can send that no gRPC library would, and that it harms nobody else."""

import asyncio

import pytest
import raw_http2
import toys
from convoy.v1 import image_classifier_pb2 as pb


@pytest.fixture
async def stand(tmp_path):
    async with toys.toy_stand(tmp_path, {"grey": toys.ToyEngine(classes=256)}) as made:
        yield made


async def answers(stand):
    """Whether a well-behaved caller gets its answer."""
    reply = await stand.stub.Classify(pb.ClassifyRequest(images=[toys.grey_png(77)], top_k=1), timeout=10)
    return reply.results[0].classification.classes[0].index == 77


def sent(port, *frames, until=(raw_http2.RST_STREAM, raw_http2.GOAWAY)):
    """Sends frames on a connection of its own; the first frame of such a kind that comes back."""
    with raw_http2.connected(port) as connection:
        connection.send(*frames)
        return connection.wait_for(*until)


@pytest.mark.parametrize("path", [b"/\xff\xfe", b"/convoy.v1.ImageClassifier/\xc3", b"", b"/", b"no slash", b"/a/b/c"])
async def test_a_path_that_is_no_method_ends_its_call_only(stand, path):
    running = stand.engines["grey"]
    running.pause()
    waiting = asyncio.create_task(answers(stand))
    await running.began()

    kind, *_ = await asyncio.to_thread(sent, stand.listener.port, raw_http2.call(1, path))
    running.resume()

    assert kind == raw_http2.RST_STREAM
    assert await waiting
    assert await answers(stand)
