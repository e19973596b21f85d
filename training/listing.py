"""A list of image files with their classes and their parts of the split: what every way to find images ends in."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.errors import DataError
from service.files import IMAGES, OTHER_PICTURES

# Those that are not decoded, too: reading sets them aside by name, where part of a set would be lost unnoticed.
_PICTURES = IMAGES | OTHER_PICTURES
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


def listing_of(
    root: Path, entries: Sequence[Entry], classes: Sequence[str] | None = None, *, source: Path | None = None
) -> Listing:
    """The listing of some entries, in their order; classes sorted by name unless they are given.

    `source`: what was read, where that is not `root`; for messages.

    Raises:
        DataError: fewer than two classes, or a name that is no text.
    """
    _check_names(entries)
    _check_labels({entry.label for entry in entries})
    classes = tuple(sorted({entry.label for entry in entries}) if classes is None else classes)
    if len(classes) < 2:  # noqa: PLR2004 - a classifier needs two
        raise DataError(
            f"{source or root} holds only one class ({', '.join(classes)}); a classifier needs at least two"
        )
    number = {name: index for index, name in enumerate(classes)}
    return Listing(
        root=root,
        paths=tuple(entry.path for entry in entries),
        labels=np.fromiter((number[entry.label] for entry in entries), np.int64, len(entries)),
        classes=classes,
        splits=np.fromiter((entry.split for entry in entries), np.int8, len(entries)),
    )


def in_order(labels: Collection[str]) -> list[str]:
    """Classes of a table or of shards: numbers by their value, so that they are the labels; else by name."""
    if all(label.isdecimal() for label in labels):
        return sorted(labels, key=lambda label: (int(label), label))
    return sorted(labels)


def _check_names(entries: Sequence[Entry]) -> None:
    """File systems take any bytes for a name, but reports, digests and the manifest take text, and none takes NUL."""
    if wrong := next((entry.path for entry in entries if "\0" in entry.path), None):
        raise DataError(f"{wrong!r} is no path; a file's name has no NUL")
    try:
        "".join(entry.path for entry in entries).encode()
    except UnicodeEncodeError:
        wrong = next(entry.path for entry in entries if not entry.path.isascii() and not _is_text(entry.path))
        raise DataError(f"the name {wrong!r} is not in UTF-8; rename the file or its folder") from None


def _check_labels(labels: Collection[str]) -> None:
    """A Mac writes an umlaut as two characters, others as one: nobody would see that there are two classes."""
    seen: dict[str, str] = {}
    for label in labels:
        other = seen.setdefault(unicodedata.normalize("NFC", label), label)
        if other != label:
            raise DataError(
                f"there are two classes {label!a} and {other!a}, which look the same: {label}; rename one of them"
            )


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_image(name: str) -> bool:
    """Whether a file name ends like an image's, also one of a format that cannot be read."""
    return os.path.splitext(name)[1].lower() in _PICTURES  # noqa: PTH122 - a Path per file costs 10x
