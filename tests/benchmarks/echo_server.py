"""The floor of the transport: the service's gRPC stack (grpc.aio on uvloop), and a handler that does nothing.

python tests/benchmarks/echo_server.py        prints its port
"""

import click
import uvloop
from convoy.v1 import image_classifier_pb2 as pb
from convoy.v1 import image_classifier_pb2_grpc as pb_grpc
from grpc import aio

MESSAGE_BYTES = 32 << 20


class Echo(pb_grpc.ImageClassifierServicer):
    """Answers every image with nothing."""

    async def Classify(self, request, context):  # noqa: N802  # the name is the API's
        empty = pb.ImageResult(classification=pb.Classification())
        return pb.ClassifyResponse(model=request.model, version=1, results=[empty] * len(request.images))


async def main():
    server = aio.server(options=[("grpc.max_receive_message_length", MESSAGE_BYTES)])
    pb_grpc.add_ImageClassifierServicer_to_server(Echo(), server)
    click.echo(server.add_insecure_port("127.0.0.1:0"))
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.run(main())
