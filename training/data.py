"""Finding the images: which files there are, and which class each belongs to. Nothing is decoded here.

Three layouts are understood: a folder per class; such folders below `train`, `val` and `test`; and a table, CSV or
Parquet, with columns path, label and perhaps split (`training.tables`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Entry:
    """One image: path relative to the root, name of its class, and its part of the split."""

    path: str
    label: str
    split: int = UNDECIDED


def list_images(source: Path) -> Listing:
    """Lists the images of a folder or a table.

    Hidden files and files without an image's suffix are ignored.

    Raises:
        DataError: the source is missing, holds no images or fewer than two classes, or its parts disagree on classes.
    """
    if source.is_file():
        from training.tables import list_table

        return list_table(source)
    if not source.is_dir():
        raise DataError(f"{source} does not exist; give a folder that holds one folder of images per class, or a CSV")
    parts = {name: SPLIT_ALIASES[name.lower()] for name in _folders(source) if name.lower() in SPLIT_ALIASES}
    if TRAIN in parts.values() and len(parts) > 1:
        return _list_parts(source, parts)
    found = {name: sorted(_walk(source / name, name)) for name in _folders(source)}
    _check_folders(source, found)
    return listing_of(source, [Entry(path, name) for name, paths in found.items() for path in paths])


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


def _list_parts(root: Path, parts: Mapping[str, int]) -> Listing:
    """Folders `train`, `val`, `test`, each with a folder per class."""
    entries, trained = [], set(_folders(root / next(n for n, p in parts.items() if p == TRAIN)))
    for part, split in parts.items():
        found = {name: sorted(_walk(root / part / name, f"{part}/{name}")) for name in _folders(root / part)}
        _check_folders(root / part, found)
        unknown = sorted(set(found) - trained)
        if unknown:
            raise DataError(f"{root / part} has classes that the training part lacks: {_some(unknown)}")
        entries += [Entry(path, name, split) for name, paths in found.items() for path in paths]
    return listing_of(root, entries)


def _folders(folder: Path) -> list[str]:
    return sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))


def _walk(folder: Path, prefix: str) -> Iterator[str]:
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(folder / entry.name, f"{prefix}/{entry.name}")
        elif is_image(entry.name):
            yield f"{prefix}/{entry.name}"


def _check_folders(root: Path, found: Mapping[str, Sequence[str]]) -> None:
    layout = f"put the images of each class into a folder of its own: {root}/<class>/<image>"
    if not any(found.values()):
        loose = sum(is_image(entry.name) for entry in os.scandir(root))
        if loose:
            raise DataError(f"{root} holds {loose} images but no folders of images; {layout}")
        raise DataError(f"{root} holds no images ({', '.join(sorted(SUFFIXES))}); {layout}")
    empty = [name for name, paths in found.items() if not paths]
    if empty:
        raise DataError(f"{root}: no images in {_some(empty)}; add images or remove the folder")


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
