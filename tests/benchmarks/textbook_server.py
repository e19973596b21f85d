"""The textbook image server that everyone writes first: the reference that the service is measured against.

    python tests/benchmarks/textbook_server.py MODEL.onnx SIZE SHORTER_SIDE

A thread-pool `grpc.server`, Pillow, one `session.run` for each request, default options everywhere. It speaks
`convoy.v1`, so that the same load generator drives both. Prints its port.
"""

import io
import sys
from concurrent import futures

import click
import grpc
import numpy as np
import onnxruntime as ort
from convoy.v1 import image_classifier_pb2 as pb
from convoy.v1 import image_classifier_pb2_grpc as pb_grpc
from PIL import Image, ImageOps

from service import sessions

WORKERS = 32
MESSAGE_BYTES = 32 << 20


class Textbook(pb_grpc.ImageClassifierServicer):
    """Decode, resize, run, sort."""

    def __init__(self, path, size, shorter_side):
        # What there is, in ONNX Runtime's own order of preference: CUDA on a machine with a GPU.
        usable = [name for name in ort.get_available_providers() if not sessions.missing(name)]
        if len(usable) > 1:
            ort.preload_dlls()
        self.session = ort.InferenceSession(path, providers=usable)
        self.size, self.shorter_side = size, shorter_side

    def Classify(self, request, context):  # noqa: N802  # the name is the API's
        batch = np.stack([self.pixels(data) for data in request.images])
        _, probabilities = self.session.run(["logits", "probabilities"], {"image": batch})
        return pb.ClassifyResponse(model=request.model, version=1, results=[self.result(row) for row in probabilities])

    def pixels(self, data):
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        scale = self.shorter_side / min(image.size)
        image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BILINEAR)
        left, top = ((side - self.size) // 2 for side in image.size)
        return np.asarray(image.crop((left, top, left + self.size, top + self.size)))

    def result(self, row):
        best = np.argsort(-row)[:5]
        classes = [pb.Class(index=index, label=str(index), score=row[index]) for index in best]
        return pb.ImageResult(classification=pb.Classification(classes=classes))


def main():
    path, size, shorter_side = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    server = grpc.server(
        futures.ThreadPoolExecutor(WORKERS), options=[("grpc.max_receive_message_length", MESSAGE_BYTES)]
    )
    pb_grpc.add_ImageClassifierServicer_to_server(Textbook(path, size, shorter_side), server)
    click.echo(server.add_insecure_port("127.0.0.1:0"))
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    main()
