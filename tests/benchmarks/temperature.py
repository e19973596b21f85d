"""What a temperature that is fitted on a few images does to the likelihood of the others.

    convoy train cifar10 --model resnet8 --epochs 1 --test 0.5 --name hardly
    python tests/benchmarks/temperature.py models/hardly/1 cifar10 runs/hardly/1/split.csv

Takes the test part of a run, fits the temperature on so many of its images, drawn anew forty times, and judges by the
rest: mean and ninetieth percentile of the change of the negative log-likelihood in nats; below 0 the temperature helps.
"""

import csv
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from service import artifact
from service.preprocess import preprocess
from training.calibrate import fit_temperature, negative_log_likelihood
from training.runtime import Session

IMAGES = (4, 10, 24, 50, 100, 400)
DRAWS = 40


def logits_of(version, folder, split):
    """Logits of the test part before any temperature, float32[N, K], and labels int64[N]."""
    manifest = artifact.load(version).manifest
    with split.open(encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["split"] == "test"]
    pixels = np.stack([preprocess((folder / row["path"]).read_bytes(), manifest.input) for row in rows])
    labels = np.array([manifest.classes.index(row["label"]) for row in rows])
    outputs = Session((version / artifact.MODEL).read_bytes()).run_all(pixels)
    return (outputs.logits * manifest.temperature).astype(np.float32), labels


@click.command()
@click.argument("version", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("split", type=click.Path(path_type=Path))
def main(version, folder, split):
    logits, labels = logits_of(version, folder, split)
    rng = np.random.default_rng(0)
    table = Table("images", "temperatures", "mean change", "90th percentile", title=f"{version}, {len(labels)} images")
    for images in (each for each in IMAGES if each <= len(labels) // 3):
        found, changes = [], []
        for _ in range(DRAWS):
            order = rng.permutation(len(labels))
            some, rest = order[:images], order[images:]
            found.append(fit_temperature(logits[some], labels[some]))
            before = negative_log_likelihood(logits[rest], labels[rest])
            changes.append(negative_log_likelihood(logits[rest], labels[rest], found[-1]) - before)
        table.add_row(
            str(images),
            f"{min(found):.2f} to {max(found):.2f}",
            f"{np.mean(changes):+.3f}",
            f"{np.quantile(changes, 0.9):+.3f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
