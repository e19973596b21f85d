"""Finding the images: which files there are, and which class each belongs to. Nothing is opened here."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.errors import DataError

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp"})
TRAIN, VALIDATION, TEST, UNDECIDED = 0, 1, 2, -1
SPLIT_NAMES = ("train", "validation", "test")


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


def list_images(root: Path) -> Listing:
    """Lists a folder that holds one folder per class.

    Hidden files and files without an image's suffix are ignored.

    Raises:
        DataError: the folder is missing, holds no images, or fewer than two classes.
    """
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise DataError(f"{root} {what}; give a folder that holds one folder of images per class")
    classes = tuple(sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith(".")))
    found = [sorted(_walk(root / name, name)) for name in classes]
    _check(root, classes, found)
    return Listing(
        root=root,
        paths=tuple(path for paths in found for path in paths),
        labels=np.repeat(np.arange(len(classes)), [len(paths) for paths in found]),
        classes=classes,
        splits=np.full(sum(map(len, found)), UNDECIDED, dtype=np.int8),
    )


def _walk(folder: Path, prefix: str) -> Iterator[str]:
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(folder / entry.name, f"{prefix}/{entry.name}")
        elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:  # noqa: PTH122 - a Path per file costs 10x
            yield f"{prefix}/{entry.name}"


def _check(root: Path, classes: Sequence[str], found: Sequence[Sequence[str]]) -> None:
    layout = f"put the images of each class into a folder of its own: {root}/<class>/<image>"
    if not any(found):
        loose = sum(1 for e in os.scandir(root) if os.path.splitext(e.name)[1].lower() in SUFFIXES)  # noqa: PTH122 - as above
        if loose:
            raise DataError(f"{root} holds {loose} images but no folders of images; {layout}")
        raise DataError(f"{root} holds no images ({', '.join(sorted(SUFFIXES))}); {layout}")
    empty = [name for name, paths in zip(classes, found, strict=True) if not paths]
    if empty:
        raise DataError(f"{root}: no images in {_some(empty)}; add images or remove the folder")
    if len(classes) < 2:  # noqa: PLR2004 - a classifier needs two
        raise DataError(f"{root} holds only one class ({classes[0]}); a classifier needs at least two folders")


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
