"""Transfer against training from scratch: five classes of CIFAR-10, then 50 images of each of the other five.

    python tests/benchmarks/transfer_cifar.py CIFAR_FOLDER [--pretrain-epochs 12] [--epochs 30] [--seeds 3]

CIFAR_FOLDER holds a folder of images per class. `resnet8` of half width learns the first five classes, with settings of
`cifar10-resnet`; its checkpoint then starts `lp-ft` on the few images, and the same recipe runs from random weights.
Tested on 500 images of each class.
Expected: lp-ft ahead by at least 10 points in the mean over the seeds (exit code 1 below that).
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
from rich.console import Console

from training.assemble import build_stepper, build_trainer
from training.config import Experiment, find_experiment, read_yaml
from training.data import list_images
from training.display import Display
from training.distributed import Group
from training.evaluate import evaluate
from training.loop import BEST
from training.models import describe
from training.prepare import prepare
from training.transfer import plan

CLASSES = 5
TRAINED, TESTED = 50, 500
EXPECTED_POINTS = 10
OURS = read_yaml(find_experiment("cifar10-resnet"))
RECIPE = {
    "model": {"name": "resnet8", "options": {"width": 0.5}},
    "augment": OURS["augment"],
    "loop": {"label_smoothing": 0.1},
}
# For tens of thousands of images. The few ones are learnt with the defaults, from scratch and in the transfer.
FOR_MANY = {section: OURS[section] for section in ("optimiser", "schedule")}


class Silent:
    def step(self, images: int, loss: float) -> None:
        pass

    def epoch(self, history: object) -> None:
        pass


def write_tables(source: Path, folder: Path, seed: int) -> tuple[Path, Path]:
    """Tables of the first five classes, and of a few images of the others with as many classes."""
    listing = list_images(source)
    random = np.random.default_rng(seed)
    tables = folder / "first.csv", folder / f"others-{seed}.csv"
    rows: tuple[list, list] = ([], [])
    for label, name in enumerate(listing.classes):
        members = random.permutation(np.flatnonzero(listing.labels == label))
        if label < CLASSES:
            rows[0].extend((listing.file(i).resolve(), name, "") for i in members)
        else:
            rows[1].extend((listing.file(i).resolve(), name, "train") for i in members[:TRAINED])
            rows[1].extend((listing.file(i).resolve(), name, "test") for i in members[TRAINED : TRAINED + TESTED])
    for file, content in zip(tables, rows, strict=True):
        with file.open("w", newline="") as stream:
            csv.writer(stream).writerows([("path", "label", "split"), *content])
    return tables


def train(
    table: Path, folder: Path, recipe: dict, *, epochs: int, seed: int, batch: int, held: float, weights: Path | None
) -> float:
    """Accuracy on the test part after training; the best weights are left in `folder`."""
    folder.mkdir()
    loop = {**RECIPE["loop"], "epochs": epochs, "batch_size": batch, "seed": seed}
    data_tree = {"validation": held, "test": held}
    tree = {**RECIPE, **recipe, "loop": loop, "data": data_tree, "transfer": {"weights": weights}}
    experiment, group = Experiment.model_validate(tree), Group()
    entry = describe(experiment.model.name)
    data = prepare(experiment, entry, table, folder, Display(Console(quiet=True)), group)
    stepper, _ = build_stepper(experiment, entry, data, group)
    trainer = build_trainer(experiment, data, stepper, plan(experiment, entry), folder, group)
    trainer.fit(Silent())
    return evaluate(trainer.evaluated, data.examples("test"), data.normalise).accuracy


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("cifar", type=Path)
    parser.add_argument("--pretrain-epochs", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    chosen = parser.parse_args()
    gains = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        first, _ = write_tables(chosen.cifar, folder, 0)
        started = time.monotonic()
        known = train(
            first, folder / "first", FOR_MANY, epochs=chosen.pretrain_epochs, seed=0, batch=256, held=0.1, weights=None
        )
        click.echo(f"first {CLASSES} classes: {known:.2%}, {time.monotonic() - started:.0f} s")
        for seed in range(chosen.seeds):
            _, table = write_tables(chosen.cifar, folder, seed)
            common = {"epochs": chosen.epochs, "seed": seed, "batch": 32, "held": 0.0}
            scratched = train(table, folder / f"scratch-{seed}", {}, weights=None, **common)
            transferred = train(table, folder / f"lp-ft-{seed}", {}, weights=folder / "first" / BEST, **common)
            gains.append(100 * (transferred - scratched))
            click.echo(f"seed {seed}: from scratch {scratched:.2%}, lp-ft {transferred:.2%}, {gains[-1]:+.1f} points")
    click.echo(f"mean gain {statistics.mean(gains):.1f} points, expected at least {EXPECTED_POINTS}")
    return 0 if statistics.mean(gains) >= EXPECTED_POINTS else 1


if __name__ == "__main__":
    sys.exit(main())
