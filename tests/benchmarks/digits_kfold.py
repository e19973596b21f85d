"""Five-fold stratified accuracy of the default recipe on scikit-learn's handwritten digits, end to end from PNG files.

    python tests/benchmarks/digits_kfold.py

Each fold is tested on images that neither trained nor chose the epoch: the recipe's validation part is cut from the
other four folds. Takes about 40 seconds on 2 cores. Expected: mean accuracy at least 99.0% (exit code 1 below that).
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold

from training.config import Experiment
from training.data import list_images
from training.evaluate import evaluate
from training.models import describe
from training.pixels import Normaliser, channel_statistics
from training.read import Dataset, count_channels, read_images
from training.run import build_trainer, input_spec
from training.split import Split, stratified_split

FOLDS = 5
EXPECTED = 0.99


class Silent:
    """Watches and says nothing."""

    def step(self, images: int, loss: float) -> None:
        pass

    def epoch(self, figures: object) -> None:
        pass


def write_digits(folder: Path) -> None:
    """1,797 images of 8x8 with values 0..16, as PNG files of 0..255 in a folder per class."""
    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        target = folder / str(label)
        target.mkdir(exist_ok=True)
        Image.fromarray((pixels * (255 / 16)).round().astype(np.uint8)).save(target / f"{number:04d}.png")


def run_fold(dataset: Dataset, experiment: Experiment, rest: np.ndarray, test: np.ndarray, folder: Path) -> float:
    """Accuracy on `test` after training on `rest`, part of which chooses the epoch."""
    inner = stratified_split(
        dataset.labels[rest], dataset.classes, validation=experiment.data.validation, test=0.0, seed=0
    )
    split = Split(train=rest[inner.train], validation=rest[inner.validation], test=test)
    normalise = Normaliser(*channel_statistics(dataset.images, split.train))
    trainer = build_trainer(experiment, dataset, split, normalise)
    trainer.fit(folder, Silent())
    return evaluate(trainer.averaged, dataset.images[test], dataset.labels[test], normalise).accuracy


def main() -> int:
    experiment = Experiment()
    with tempfile.TemporaryDirectory() as scratch:
        images, folder = Path(scratch) / "images", Path(scratch) / "run"
        images.mkdir()
        folder.mkdir()
        write_digits(images)
        listing = list_images(images)
        spec = input_spec(experiment.input, describe(experiment.model.name).input, count_channels(listing))
        dataset, _ = read_images(listing, spec)
        folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(dataset.images, dataset.labels)
        accuracies = []
        for number, (rest, test) in enumerate(folds, 1):
            started = time.monotonic()
            accuracies.append(run_fold(dataset, experiment, rest, test, folder))
            click.echo(f"fold {number}: {accuracies[-1]:.2%} on {len(test)} images, {time.monotonic() - started:.1f} s")
    mean = float(np.mean(accuracies))
    click.echo(f"{FOLDS}-fold accuracy {mean:.2%}, expected at least {EXPECTED:.0%}; torch {torch.__version__}")
    return 0 if mean >= EXPECTED else 1


if __name__ == "__main__":
    sys.exit(main())
