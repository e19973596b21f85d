"""The same bytes twice: a leak between the parts of the split, a contradiction between classes, or ballast."""

from __future__ import annotations

import numpy as np

from training.listing import SPLIT_NAMES, UNDECIDED
from training.read import Dataset, Fault


def find_duplicates(dataset: Dataset) -> dict[int, Fault]:
    """Rows to set aside so that every content is there once, in the listing's order.

    Under different labels nobody knows which is right: all copies go. Between given parts the copy that tests stays,
    then the one that validates. Otherwise the first one stays.
    """
    rows = dataset.usable
    contents = np.ascontiguousarray(dataset.digests[rows]).view("V16").ravel()
    _, group, counts = np.unique(contents, return_inverse=True, return_counts=True)
    repeated = np.flatnonzero(counts[group] > 1)
    groups = _groups(rows[repeated], group[repeated])
    faults = dict(found for members in groups for found in _judge(dataset, members))
    return {row: faults[row] for row in sorted(faults)}


def _groups(rows: np.ndarray, group: np.ndarray) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    for row, number in zip(rows.tolist(), group.tolist(), strict=True):
        found.setdefault(number, []).append(row)
    return list(found.values())


def _judge(dataset: Dataset, rows: list[int]) -> list[tuple[int, Fault]]:
    listing = dataset.listing
    if len({int(listing.labels[row]) for row in rows}) > 1:
        names = ", ".join(f"{listing.paths[row]} ({listing.classes[listing.labels[row]]})" for row in rows[:4])
        message = f"the same image has different labels: {names}"
        return [(row, Fault(listing.paths[row], "contradiction", message)) for row in rows]
    kept = max(rows, key=lambda row: (int(listing.splits[row]), -row))
    return [(row, _copy(dataset, row, kept)) for row in rows if row != kept]


def _copy(dataset: Dataset, row: int, kept: int) -> Fault:
    listing = dataset.listing
    if listing.paths[row] == listing.paths[kept]:
        return Fault(listing.paths[row], "duplicate", "listed more than once")
    mine, other = int(listing.splits[row]), int(listing.splits[kept])
    if mine == other or UNDECIDED in (mine, other):
        return Fault(listing.paths[row], "duplicate", f"the same bytes as {listing.paths[kept]}")
    parts = f"the {SPLIT_NAMES[mine]} and the {SPLIT_NAMES[other]} part"
    return Fault(listing.paths[row], "leak", f"the same bytes as {listing.paths[kept]}: one image in {parts}")
