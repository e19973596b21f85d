"""The data of a run, ready for the loop."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

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

Part: TypeAlias = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class FullSize:
    """Images at the size of the model's input, where the training images have another.

    `dataset`: what is judged by, and what int8 is calibrated with. `rows`: int64, ascending, where its images stand in
    the whole data set. `calibration`: int64, rows of the whole data set.
    """

    dataset: Dataset
    rows: NDArray[np.int64]
    calibration: NDArray[np.int64]

    def examples(self, rows: NDArray[np.int64]) -> Examples:
        """The images of some rows of the whole data set."""
        return Examples(self.dataset.images, self.dataset.labels, np.searchsorted(self.rows, rows))


@dataclass(frozen=True)
class Prepared:
    """What the loop trains on and is judged by.

    `dataset`, `split`: the images; with shards only those that are held out. `spec`: the model's input. `faults`: the
    files that were set aside. `shards`: where the training part is, if it is not in `dataset`. `train_spec`: of the
    training images, if it is not `spec`; then `dataset` is decoded to it, and `full_size` has what is judged by.
    """

    dataset: Dataset
    split: Split
    spec: InputSpec
    normalise: Normaliser
    faults: Sequence[Fault]
    shards: ShardSet | None = None
    train_spec: InputSpec | None = None
    full_size: FullSize | None = None

    @property
    def batch_spec(self) -> InputSpec:
        """Shape and resize rule of the training images."""
        return self.train_spec or self.spec

    def examples(self, part: Part) -> Examples:
        """A part of the images: to train on at the training size, to judge by at the input's."""
        rows = self._rows(part)
        if self.full_size and part != "train":
            return self.full_size.examples(rows)
        return Examples(self.dataset.images, self.dataset.labels, rows)

    def files(self, part: Part) -> list[Path]:
        """The files of a part, in the order of its examples."""
        return [self.dataset.listing.file(row) for row in self._rows(part).tolist()]

    def _rows(self, part: Part) -> NDArray[np.int64]:
        rows: NDArray[np.int64] = getattr(self.split, part)
        return rows

    def train_labels(self) -> NDArray[np.int64]:
        """int64[N], of the training images."""
        return self.shards.train_labels() if self.shards else self.dataset.labels[self.split.train]

    def calibration(self, most: int) -> NDArray[np.uint8]:
        """uint8[M, H, W, C]: some of the training images, at the input's size."""
        if self.shards:
            return self.shards.calibration[:most]
        if self.full_size:
            chosen = self.full_size.examples(self.full_size.calibration[:most])
            return np.asarray(chosen.images[chosen.indices])
        return self.training_sample(most)

    def training_sample(self, most: int) -> NDArray[np.uint8]:
        """uint8[M, H, W, C]: some of the training images, as they are trained on but for the augmentation."""
        if self.shards:
            return self.shards.calibration[:most]
        return np.asarray(self.dataset.images[calibration_rows(self.split, most)])

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


def calibration_rows(split: Split, most: int) -> NDArray[np.int64]:
    """int64[M]: some of the training rows, always the same ones."""
    return np.random.default_rng(0).permutation(split.train)[:most]
