"""A trained model's variants on the running service: accuracy on the held-out images, and images per second.

    python tests/benchmarks/served_variants.py DATA --repository models --model cifar10-resnet --split RUN/split.csv

DATA is what the model was trained on, and RUN the folder of that run. Each variant has a service of its
own, all of them run at the same time, and the load takes turns between them; so noise meets all. 32 requests of one
image are in flight. Expected: a variant loses at most the accuracy budget of its export against fp32, and is faster
(exit code 1 otherwise).
"""

import csv
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import click
import serving
from convoy.v1 import image_classifier_pb2 as pb

from service import artifact
from service.client import Client

IMAGES_PER_REQUEST = 32


def held_out(data, split):
    """Files and labels of the test part."""
    with split.open(encoding="utf-8") as stream:
        return [(data / row["path"], row["label"]) for row in csv.DictReader(stream) if row["split"] == "test"]


def accuracy(address, model, images):
    """Share of images whose first class is their label, over gRPC."""
    files = [file for file, _ in images]
    requests = (
        pb.ClassifyRequest(
            model=model, top_k=1, images=[file.read_bytes() for file in files[start : start + IMAGES_PER_REQUEST]]
        )
        for start in range(0, len(files), IMAGES_PER_REQUEST)
    )
    with Client(address) as client:
        answers = [result for response, _ in client.classify_all(requests, in_flight=4) for result in response.results]
    return statistics.mean(
        answer.classification.classes[0].label == label for answer, (_, label) in zip(answers, images, strict=True)
    )


@click.command()
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.option("--repository", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--model", required=True)
@click.option("--split", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--seconds", default=4.0, show_default=True, help="Of each measurement.")
def main(data, repository, model, split, rounds, seconds):
    """Compare the variants of the newest version."""
    version = artifact.load(
        max((p for p in (repository / model).iterdir() if p.name.isdecimal()), key=lambda p: int(p.name))
    )
    names = [variant.name for variant in version.manifest.variants]
    budget = version.manifest.recipe["export"]["accuracy_budget_points"]
    images = held_out(data, split)
    with ExitStack() as stack:
        some = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for number, (file, _) in enumerate(images[:500]):
            (some / f"{number:03d}{file.suffix}").symlink_to(file.resolve())
        servers = {
            name: stack.enter_context(serving.convoy(repository, "--models", model, "--variant", name)).grpc
            for name in names
        }
        reached = {name: accuracy(address, model, images) for name, address in servers.items()}
        rates = {name: [] for name in names}
        for _ in range(rounds):
            for name, address in servers.items():
                rates[name].append(serving.closed(address, some, seconds=seconds))
    failed = False
    for name in names:
        loss = 100 * (reached["fp32"] - reached[name])
        ratios = [one / other for one, other in zip(rates[name], rates["fp32"], strict=True)]
        click.echo(
            f"{name}: accuracy {reached[name]:.2%} on {len(images)} images ({loss:+.2f} points lost), "
            f"{statistics.median(rates[name]):.0f} images/s, {statistics.median(ratios):.2f} of fp32 "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )
        failed |= name != "fp32" and (loss > budget or statistics.median(ratios) <= 1)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
