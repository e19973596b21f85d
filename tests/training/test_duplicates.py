from dataclasses import replace

import numpy as np

from training.duplicates import find_duplicates
from training.listing import TEST, TRAIN, UNDECIDED, VALIDATION, Entry, listing_of
from training.read import Dataset


def dataset_of(tmp_path, *rows):
    """Rows of (label, split, content)."""
    listing = listing_of(tmp_path, [Entry(f"{n}.png", label, split) for n, (label, split, _) in enumerate(rows)])
    digests = np.zeros((len(rows), 16), dtype=np.uint8)
    digests[:, 0] = [content for _, _, content in rows]
    return Dataset(listing, np.zeros((len(rows), 2, 2, 1), dtype=np.uint8), digests, np.arange(len(rows)))


def test_different_contents_are_left_alone(tmp_path):
    assert not find_duplicates(dataset_of(tmp_path, ("a", -1, 0), ("b", -1, 1), ("a", -1, 2)))


def test_the_first_of_equal_images_stays(tmp_path):
    rows = [("a", UNDECIDED, 1), ("b", UNDECIDED, 2), ("a", UNDECIDED, 1), ("a", UNDECIDED, 1)]
    faults = find_duplicates(dataset_of(tmp_path, *rows))
    assert [(fault.path, fault.reason) for fault in faults.values()] == [("2.png", "duplicate"), ("3.png", "duplicate")]
    assert "0.png" in faults[2].message


def test_one_image_under_two_labels_goes_altogether(tmp_path):
    faults = find_duplicates(dataset_of(tmp_path, ("a", -1, 1), ("b", -1, 1), ("a", -1, 3), ("b", -1, 4)))
    assert [(fault.path, fault.reason) for fault in faults.values()] == [
        ("0.png", "contradiction"),
        ("1.png", "contradiction"),
    ]


def test_a_leak_costs_the_training_part_its_copy(tmp_path):
    rows = [("a", TRAIN, 1), ("a", TEST, 1), ("b", TRAIN, 2), ("b", VALIDATION, 2), ("b", TRAIN, 5)]
    data = dataset_of(tmp_path, *rows)
    faults = find_duplicates(data)
    assert [(fault.path, fault.reason) for fault in faults.values()] == [("0.png", "leak"), ("2.png", "leak")]
    assert "the train and the test part" in faults[0].message


def test_set_aside_files_leave_the_data_set(tmp_path):
    data = dataset_of(tmp_path, ("a", -1, 1), ("b", -1, 2), ("a", -1, 1))
    assert data.without(find_duplicates(data)).usable.tolist() == [0, 1]


def test_a_file_that_a_table_lists_twice_stays_once(tmp_path):
    data = dataset_of(tmp_path, ("a", -1, 1), ("b", -1, 2), ("a", -1, 1))
    twice = replace(data, listing=replace(data.listing, paths=("0.png", "1.png", "0.png")))
    faults = find_duplicates(twice)
    assert [(row, fault.message) for row, fault in faults.items()] == [(2, "listed more than once")]
    assert twice.without(faults).usable.tolist() == [0, 1]


def test_files_that_cannot_be_used_are_no_copies_of_each_other(tmp_path):
    data = dataset_of(
        tmp_path, ("a", -1, 0), ("b", -1, 0), ("a", -1, 1), ("b", -1, 2)
    )  # no digest of what is unreadable
    assert not find_duplicates(replace(data, usable=np.array([2, 3])))
