"""The data of a run, ready for the loop."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from service.artifact import InputSpec
from training.batches import Examples
from training.pixels import Normaliser
from training.read import Dataset, Fault
from training.shards import ShardSet
from training.split import Split, write_split

REPORT = "left-out.csv"
SPLIT = "split.csv"


@dataclass(frozen=True)
class Prepared:
    """What the loop trains on and is judged by.

    `dataset`, `split`: the images; with shards only those that are held out. `faults`: the files that were set aside.
    `shards`: where the training part is, if it is not in `dataset`.
    """

    dataset: Dataset
    split: Split
    spec: InputSpec
    normalise: Normaliser
    faults: Sequence[Fault]
    shards: ShardSet | None = None

    def examples(self, part: Literal["train", "validation", "test"]) -> Examples:
        """A part of the images in `dataset`."""
        return Examples(self.dataset.images, self.dataset.labels, getattr(self.split, part))

    def train_labels(self) -> NDArray[np.int64]:
        """int64[N], of the training images."""
        return self.shards.train_labels() if self.shards else self.dataset.labels[self.split.train]

    def calibration(self, most: int) -> NDArray[np.uint8]:
        """uint8[M, H, W, C]: some of the training images."""
        if self.shards:
            return self.shards.calibration[:most]
        rows = np.random.default_rng(0).permutation(self.split.train)[:most]
        return np.asarray(self.dataset.images[rows])

    def digest(self) -> str:
        """SHA-256 in hexadecimal: two equal ones mean the same data."""
        return self.shards.digest if self.shards else self.dataset.digest()

    def provenance(self, split_seed: int) -> Mapping[str, Any]:
        """What the manifest says about the data."""
        trained, split = self.train_labels(), self.split
        labels = np.concatenate([trained, self.dataset.labels[np.concatenate([split.validation, split.test])]])
        counts = np.bincount(labels, minlength=len(self.dataset.classes))
        return {
            "sha256": self.digest(),
            "images": {"train": len(trained), "validation": len(split.validation), "test": len(split.test)},
            "per_class": {name: int(count) for name, count in zip(self.dataset.classes, counts, strict=True)},
            "left_out": len(self.faults),
            "split_seed": split_seed,
        }

    def write_reports(self, folder: Path) -> None:
        """Writes which image is in which part, and which files were set aside and why."""
        write_split(folder / SPLIT, self.dataset.listing, self.split)
        with (folder / REPORT).open("w", encoding="utf-8", newline="") as stream:
            rows = csv.writer(stream, lineterminator="\n")
            rows.writerow(("path", "reason", "message"))
            rows.writerows((fault.path, fault.reason, fault.message) for fault in self.faults)
