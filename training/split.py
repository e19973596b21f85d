"""Which images train, which choose the checkpoint, and which are kept for the final figure."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.errors import DataError
from training.data import SPLIT_NAMES, Listing


@dataclass(frozen=True)
class Split:
    """int64 indices into the data set, each ascending; together they are all of it, and none is in two."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]


def stratified_split(
    labels: NDArray[np.int64], classes: tuple[str, ...], *, validation: float, test: float, seed: int
) -> Split:
    """Splits each class on its own, so that all parts have the same proportions.

    A class gives at least one image to each part that is asked for. Adding images to one class does not move those of
    another: each has a random stream of its own.

    Raises:
        DataError: a class has too few images for the parts.
    """
    if validation + test >= 1:
        raise DataError(f"validation {validation} and test {test} leave nothing to train on; keep their sum below 1")
    parts: tuple[list[NDArray[np.int64]], ...] = ([], [], [])
    for label, name in enumerate(classes):
        members = np.flatnonzero(labels == label)
        held = [max(1, round(len(members) * share)) if share else 0 for share in (validation, test)]
        if len(members) <= sum(held):
            raise DataError(
                f"class {name} has only {len(members)} usable images, and {sum(held) + 1} are needed to train, "
                "validate and test; add images, or hold out less with --validation 0 or --test 0"
            )
        order = np.random.default_rng([seed, label]).permutation(members)
        for part, indices in zip(parts, np.split(order, np.cumsum(held)), strict=True):
            part.append(indices)
    held_for_validation, held_for_test, trained = (np.sort(np.concatenate(part)) for part in parts)
    return Split(train=trained, validation=held_for_validation, test=held_for_test)


def write_split(file: Path, listing: Listing, split: Split) -> None:
    """Writes path, label and split of every image as CSV, in the form that training reads again."""
    parts = np.zeros(len(listing), dtype=np.int8)
    for number, indices in enumerate((split.train, split.validation, split.test)):
        parts[indices] = number
    with file.open("w", encoding="utf-8", newline="") as stream:
        rows = csv.writer(stream, lineterminator="\n")
        rows.writerow(("path", "label", "split"))
        for path, label, part in zip(listing.paths, listing.labels, parts, strict=True):
            rows.writerow((path, listing.classes[label], SPLIT_NAMES[part]))
