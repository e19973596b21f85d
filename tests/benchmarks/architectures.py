"""Every architecture at its default size, from images to answers: a few training steps, export, gates, service.

    python tests/benchmarks/architectures.py
    python tests/benchmarks/architectures.py --only resnet18 --only lenet5

Ten classes of real pictures, one image of each in training, validation and test: for colour networks places in three
photos (`photos.places`), for gray ones scikit-learn's handwritten digits. Each network
1. has the parameters that its description promises, at that description's number of classes;
2. learns a batch of ten images in six steps of the trainer, AlexNet and VGG in ten: the loss falls by a tenth;
3. is exported by the pipeline of `convoy train`, whose gates compare it with PyTorch at batches of 1, 2, 7 and 32;
4. is served by a `convoy serve` process, a few models at a time, which answers each test image over gRPC with
   PyTorch's probabilities and top class. These differ enough between images that a mixed-up answer would be seen.

The exit code is 1 if anything fails. It needs 8 GB of memory, and 10 GB on the disk of the temporary folder.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np
import photos
import torch
from convoy.v1 import image_classifier_pb2 as pb
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table
from serving import convoy
from sklearn.datasets import load_digits
from torch import nn

from service import artifact
from service.artifact import Weights
from service.client import Client
from service.errors import ConvoyError
from service.exits import ServerRefusedError
from training import gates
from training.assemble import build_source, build_stepper
from training.batches import Batch
from training.config import Experiment
from training.display import Display
from training.distributed import Group
from training.export import export_version
from training.graph import Servable
from training.loop import Trainer
from training.models import Architecture, create, describe, names
from training.optimise import peak_rate
from training.phases import Phase
from training.precision import has_bfloat16
from training.prepare import prepare
from training.run import examine
from training.threads import limited_to, thread_count
from training.trained import Trained

CLASSES = 10
PARTS = ("train", "val", "test")
STEPS = 6
# Three linear layers of thousands of units need small steps and more of them; their dropout would hide what is learnt.
LARGE_HEADS = {"alexnet", "vgg"}
LARGE_HEAD_STEPS = 10
LARGE_HEAD = {"learning_rate": 1e-4, "clip_norm": 1.0}
# The last is the largest that the service forms unless it is told otherwise.
BATCHES = (1, 2, 7, 32)
MAX_LOSS_RATIO = 0.9
MAX_DIFFERENCE = 1e-4
# Least range, over the images, of the most variable class's probability.
MIN_SPREAD = 100 * MAX_DIFFERENCE
# Files of models that one server holds at a time; in memory they take about twice that.
GROUP_BYTES = 1_200_000_000
DEADLINE_S = 60.0


@dataclass
class Row:
    """What was found about one architecture; figures that were not reached are NaN."""

    name: str
    parameters: int = 0
    input: str = ""
    before: float = np.nan
    after: float = np.nan
    gate: float = np.nan
    service: float = np.nan
    spread: float = np.nan
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    def require(self, holds: bool, problem: str) -> None:
        if not holds:
            self.problems.append(problem)


@dataclass(frozen=True)
class Expected:
    """A published version, files to classify, and what PyTorch says to them: float32[N, K]."""

    version: Path
    files: Sequence[Path]
    probabilities: NDArray[np.float32]

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.version.glob("*.onnx"))


# --- images


def write_digits(folder: Path) -> Path:
    """`<folder>/<part>/<digit>/<number>.png`: real digits of 8x8."""
    digits = load_digits()
    for label in range(CLASSES):
        rows = np.flatnonzero(digits.target == label)
        for part, row in zip(PARTS, rows, strict=False):
            target = folder / part / str(label)
            target.mkdir(parents=True)
            Image.fromarray((digits.images[row] * (255 / 16)).astype(np.uint8)).save(target / f"{row}.png")
    return folder


def write_places(folder: Path) -> Path:
    """`<folder>/<part>/<place>/photo.jpg`: ten places in real photos."""
    for place, pictures in photos.places(len(PARTS)).items():
        for part, picture in zip(PARTS, pictures, strict=True):
            target = folder / part / place
            target.mkdir(parents=True)
            (target / "photo.jpg").write_bytes(picture)
    return folder


# --- training


class Repeated:
    """One batch, so many times: the epoch of a `Trainer` that learns it by heart."""

    def __init__(self, batch: Batch, steps: int) -> None:
        self._batch = batch
        self.steps = steps

    def __len__(self) -> int:
        return self.steps * self._batch.whole

    def batches(self, _epoch: int, first: int) -> Iterator[Batch]:
        return iter([self._batch] * (self.steps - first))


class Losses(list):
    """Watches the loss of each step."""

    def step(self, _images: int, loss: float) -> None:
        self.append(loss)

    def epoch(self, history: object) -> None:
        pass


def experiment_of(entry: Architecture) -> Experiment:
    """The default recipe without augmentation, so that the batch stays the same; large heads take smaller steps."""
    large = entry.family in LARGE_HEADS
    tree = {
        "name": entry.name,
        "model": {"name": entry.name, "options": {"dropout": 0.0} if large else {}},
        "input": {"channels": entry.channels},
        "augment": {"rotation_degrees": 0, "translation": 0, "scale": 0},
        "optimiser": LARGE_HEAD if large else {},
        "loop": {
            "epochs": 1,
            "batch_size": CLASSES,
            "precision": "bfloat16" if has_bfloat16(torch.device("cpu")) else "float32",
        },
    }
    return Experiment.model_validate(tree)


def outline(entry: Architecture) -> nn.Module:
    """The network as its description counts it, without memory for its weights."""
    with torch.device("meta"):
        return create(entry.name, entry.config.num_classes, entry.channels)


def train(entry: Architecture, images: Path, folder: Path, row: Row) -> Trained:
    """A few steps on one batch, then what `convoy train` does after its last epoch."""
    experiment, group = experiment_of(entry), Group()
    data = prepare(experiment, entry, images, folder, Display(Console(quiet=True)), group)
    stepper, _ = build_stepper(experiment, entry, data, group)
    stepper.precision = experiment.loop.precision
    for module in stepper.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all steps: a moving average would still be near where it began
    (batch,) = build_source(experiment, data, group).batches(0, 0)
    losses = Losses()
    with limited_to(thread_count(stepper.model, data.spec.shape, CLASSES)):
        trainer = Trainer(
            stepper,
            Repeated(batch, LARGE_HEAD_STEPS if entry.family in LARGE_HEADS else STEPS),
            data.examples("validation"),
            data.normalise,
            experiment,
            phases=(Phase("training", 1),),
            peak=peak_rate(experiment),
            folder=folder,
            identity={},
            group=group,
        )
        trainer.fit(losses)
        _, trained = examine(experiment, data, trainer, Weights(), group)
    row.before, row.after = losses[0], losses[-1]
    row.require(row.after < MAX_LOSS_RATIO * row.before, "the loss did not fall")
    return trained


# --- export


def publish(entry: Architecture, images: Path, repository: Path, row: Row) -> Expected:
    """Trains, exports and says what the service will have to answer."""
    row.parameters = sum(parameter.numel() for parameter in outline(entry).parameters())
    row.input = "x".join(map(str, entry.input.shape))
    row.require(row.parameters == entry.parameters, f"{entry.parameters:,} parameters are promised")
    with tempfile.TemporaryDirectory(dir=repository.parent) as scratch:
        trained = train(entry, images, Path(scratch), row)
    version = export_version(trained, repository, variants=(), batches=BATCHES)
    row.gate = gate_difference(version)
    servable = Servable(trained.model, trained.mean, trained.std, trained.temperature)
    wanted = gates.reference(servable, trained.mean, trained.std, trained.holdout[:], CLASSES).probabilities
    row.spread = float(np.ptp(wanted, axis=0).max())
    row.require(row.spread >= MIN_SPREAD, "it answers the same whatever the image")
    return Expected(version, trained.holdout_paths, wanted)


def gate_difference(version: Path) -> float:
    """Largest difference of a probability from PyTorch, which the export's gate wrote into the manifest."""
    note = artifact.load(version).manifest.variants[0].note
    return float(re.search(r"probabilities within (\S+) of PyTorch on 32 images", note)[1])


# --- service


def serve(repository: Path, group: dict[str, Expected], rows: dict[str, Row]) -> None:
    """Classifies every model's test images over gRPC, one server process for all models of the group."""
    server = convoy(repository, "--models", ",".join(group), "--variant", "fp32", "--providers", "cpu")
    try:
        with server as places, Client(places.grpc, timeout_s=DEADLINE_S) as client:
            for name, expected in group.items():
                started = time.monotonic()
                compare(client, name, expected, rows[name])
                rows[name].seconds += time.monotonic() - started
    except (ConvoyError, click.ClickException) as error:
        for name in group:
            rows[name].problems.append(f"not served: {error}")


def compare(client: Client, name: str, expected: Expected, row: Row) -> None:
    """Each image in a request of its own, and all of them in one."""
    files = [file.read_bytes() for file in expected.files]
    requests = [*([file] for file in files), files]
    wanted = np.concatenate([expected.probabilities] * 2)
    try:
        found = np.concatenate([classify(client, name, images) for images in requests])
    except ServerRefusedError as refusal:
        row.problems.append(f"the service refused: {refusal}")
        return
    row.service = float(np.abs(found - wanted).max())
    row.require(row.service <= MAX_DIFFERENCE, f"the service differs from PyTorch by {row.service:.2g}")
    row.require((found.argmax(1) == wanted.argmax(1)).all(), "the service has another top class")


def classify(client: Client, name: str, images: Sequence[bytes]) -> NDArray[np.float32]:
    """The service's probabilities of encoded images, float32[N, K]."""
    reply = client.classify(pb.ClassifyRequest(model=name, images=images, top_k=CLASSES))
    scores = np.full((len(images), CLASSES), np.nan, np.float32)
    for scored, result in zip(scores, reply.results, strict=True):
        for entry in result.classification.classes:
            scored[entry.index] = entry.score
    return scores


# --- what is told


def show(rows: Sequence[Row], console: Console) -> None:
    table = Table(title=f"{CLASSES} images, torch {torch.__version__}", title_justify="left")
    for column in ("architecture", "parameters", "input", "loss before", "after", "gate |dp|", "service |dp|",
                   "spread", "seconds", ""):  # fmt: skip
        table.add_column(column, justify="left" if column in {"architecture", ""} else "right")
    for row in rows:
        figures = (f"{row.before:.3f}", f"{row.after:.3f}", f"{row.gate:.1e}", f"{row.service:.1e}")
        verdict = "; ".join(row.problems) or "ok"
        table.add_row(
            row.name, f"{row.parameters:,}", row.input, *figures, f"{row.spread:.3f}", f"{row.seconds:.0f}", verdict
        )
    console.print(table)


def check(chosen: Sequence[str], folder: Path, console: Console) -> list[Row]:
    """All architectures, a few at a time."""
    images = {1: write_digits(folder / "digits"), 3: write_places(folder / "places")}
    repository, rows, group = folder / "models", {name: Row(name) for name in chosen}, {}
    repository.mkdir()
    for name, row in rows.items():
        started, entry = time.monotonic(), describe(name)
        try:
            group[name] = publish(entry, images[entry.channels], repository, row)
        except ConvoyError as error:
            row.problems.append(str(error))
        row.seconds += time.monotonic() - started
        told = f"loss {row.before:.3f} to {row.after:.3f}, gate {row.gate:.1e}, {row.seconds:.0f} s"
        console.print(f"{name}: {'; '.join([told, *row.problems])}", highlight=False)
        if sum(each.bytes for each in group.values()) > GROUP_BYTES:
            serve(repository, group, rows)
            group = {}
    if group:
        serve(repository, group, rows)
    return list(rows.values())


@click.command()
@click.option("--only", multiple=True, type=click.Choice(names()), help="This architecture alone; repeat for more.")
def main(only: Sequence[str]) -> None:
    """Train, export and serve every architecture."""
    console = Console(width=None if sys.stdout.isatty() else 180)
    with tempfile.TemporaryDirectory(prefix="convoy-architectures-") as folder:
        rows = check(only or names(), Path(folder), console)
    show(rows, console)
    sys.exit(any(row.problems for row in rows))


if __name__ == "__main__":
    main()
