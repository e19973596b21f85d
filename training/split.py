"""Which images train, which choose the checkpoint, and which are kept for the final figure."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.errors import DataError
from training.listing import SPLIT_NAMES, TEST, TRAIN, UNDECIDED, VALIDATION, Listing


@dataclass(frozen=True)
class Split:
    """int64 rows of the data set, each part ascending; no row is in two."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]


def make_split(listing: Listing, usable: NDArray[np.int64], *, validation: float, test: float, seed: int) -> Split:
    """The split that came with the data, completed: what it leaves undecided, or does not have, is drawn.

    Where the data name a validation or test part, nothing is added to it. Rows that are not `usable` are in no part.
    """
    given = listing.splits[usable]
    shares = [0.0 if (given == part).any() else share for part, share in ((VALIDATION, validation), (TEST, test))]
    # A part that the data lack is cut from what they call the training part.
    free = usable[(given == UNDECIDED) | (given == TRAIN)]
    drawn = stratified_split(listing.labels, listing.classes, free, validation=shares[0], test=shares[1], seed=seed)
    return Split(
        train=drawn.train,
        validation=np.sort(np.concatenate([drawn.validation, usable[given == VALIDATION]])),
        test=np.sort(np.concatenate([drawn.test, usable[given == TEST]])),
    )


def stratified_split(
    labels: NDArray[np.int64],
    classes: tuple[str, ...],
    rows: NDArray[np.int64],
    *,
    validation: float,
    test: float,
    seed: int,
) -> Split:
    """Splits `rows` class by class, so that all parts have the same proportions.

    A class gives at least one image to each part that is asked for. Adding images to one class does not move those of
    another: each has a random stream of its own.

    Raises:
        DataError: a class has too few images for the parts.
    """
    if validation + test >= 1:
        raise DataError(f"validation {validation} and test {test} leave nothing to train on; keep their sum below 1")
    parts: tuple[list[NDArray[np.int64]], ...] = ([], [], [])
    for label, name in enumerate(classes):
        members = rows[labels[rows] == label]
        held = [max(1, round(len(members) * share)) if share else 0 for share in (validation, test)]
        if not len(members) and (labels == label).any():
            raise DataError(
                f"class {name} has images to judge by and none to train on; put some into the training part"
            )
        if len(members) <= sum(held):
            less = ", or hold out less with --validation 0 or --test 0" if sum(held) else ""
            raise DataError(
                f"class {name} has only {len(members)} usable training images, and {sum(held) + 1} are needed; "
                f"add images{less}"
            )
        order = np.random.default_rng([seed, label]).permutation(members)
        for part, chosen in zip(parts, np.split(order, np.cumsum(held)), strict=True):
            part.append(chosen)
    held_for_validation, held_for_test, trained = (np.sort(np.concatenate(part)) for part in parts)
    return Split(train=trained, validation=held_for_validation, test=held_for_test)


def write_split(file: Path, listing: Listing, split: Split) -> None:
    """Writes path, label and split of every image as CSV, in the form that training reads again."""
    with file.open("w", encoding="utf-8", newline="") as stream:
        rows = csv.writer(stream, lineterminator="\n")
        rows.writerow(("path", "label", "split"))
        for name, part in zip(SPLIT_NAMES, (split.train, split.validation, split.test), strict=True):
            rows.writerows((listing.paths[i], listing.classes[listing.labels[i]], name) for i in part)
