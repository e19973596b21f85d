import asyncio
from contextlib import asynccontextmanager

import pytest
from convoy.v1 import image_classifier_pb2 as pb
from convoy.v1 import image_classifier_pb2_grpc as pb_grpc
from grpc import aio


class FakeClassifier(pb_grpc.ImageClassifierServicer):
    """Answers at once unless told otherwise, and remembers what it was asked.

    `gate`: requests wait while it is closed. `status`: requests fail with it. `bad`: images answered with an error.
    """

    def __init__(self):
        self.requests = []
        self.in_flight = self.most_in_flight = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.status = None
        self.bad = 0

    async def Classify(self, request, context):  # noqa: N802 - gRPC's spelling
        self.requests.append(request)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await self.gate.wait()
            await asyncio.sleep(0.001)
            if self.status:
                await context.abort(self.status, "as the test wants it")
        finally:
            self.in_flight -= 1
        results = [
            pb.ImageResult(error=pb.ImageError(message="bad"))
            if index < self.bad
            else pb.ImageResult(classification=pb.Classification())
            for index in range(len(request.images))
        ]
        timing = pb.Timing(queue_us=1000, decode_us=2000, inference_us=3000, total_us=6000)
        return pb.ClassifyResponse(results=results, timing=timing)


@asynccontextmanager
async def serving(servicer):
    server = aio.server()
    pb_grpc.add_ImageClassifierServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


@pytest.fixture
async def fake():
    return FakeClassifier()


@pytest.fixture
async def target(fake):
    async with serving(fake) as address:
        yield address
