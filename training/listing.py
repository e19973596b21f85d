"""A list of image files with their classes and their parts of the split: what every way to find images ends in."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.errors import DataError

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp"})
TRAIN, VALIDATION, TEST, UNDECIDED = 0, 1, 2, -1
SPLIT_NAMES = ("train", "validation", "test")
# What other tools call the parts.
SPLIT_ALIASES: Mapping[str, int] = {
    "train": TRAIN,
    "training": TRAIN,
    "val": VALIDATION,
    "valid": VALIDATION,
    "validation": VALIDATION,
    "test": TEST,
    "testing": TEST,
}


@dataclass(frozen=True)
class Listing:
    """Image files and their labels, in a fixed order, before any has been opened.

    `paths`: relative to `root`, with forward slashes. `labels`: int64[N], indices into `classes`. `classes`: sorted, so
    that the order is the same on every machine; it is stored with the model. `splits`: int8[N], TRAIN, VALIDATION, TEST
    or UNDECIDED.
    """

    root: Path
    paths: tuple[str, ...]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    splits: NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.paths)

    def file(self, index: int) -> Path:
        """Path of one image."""
        return self.root / self.paths[index]

    def chosen(self, rows: NDArray[np.int64]) -> Listing:
        """Some of the files, int64[M] indices, with the same classes."""
        paths = tuple(self.paths[row] for row in rows.tolist())
        return replace(self, paths=paths, labels=self.labels[rows], splits=self.splits[rows])


@dataclass(frozen=True)
class Entry:
    """One image: path relative to the root, name of its class, and its part of the split."""

    path: str
    label: str
    split: int = UNDECIDED


def listing_of(root: Path, entries: Sequence[Entry], classes: Sequence[str] | None = None) -> Listing:
    """The listing of some entries, in their order; classes sorted by name unless they are given.

    Raises:
        DataError: fewer than two classes.
    """
    classes = tuple(sorted({entry.label for entry in entries}) if classes is None else classes)
    if len(classes) < 2:  # noqa: PLR2004 - a classifier needs two
        raise DataError(f"{root} holds only one class ({', '.join(classes)}); a classifier needs at least two")
    number = {name: index for index, name in enumerate(classes)}
    return Listing(
        root=root,
        paths=tuple(entry.path for entry in entries),
        labels=np.fromiter((number[entry.label] for entry in entries), np.int64, len(entries)),
        classes=classes,
        splits=np.fromiter((entry.split for entry in entries), np.int8, len(entries)),
    )


def is_image(name: str) -> bool:
    """Whether a file name ends like an image's."""
    return os.path.splitext(name)[1].lower() in SUFFIXES  # noqa: PTH122 - a Path per file costs 10x
