import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import DataError
from training.data import list_images
from training.listing import TEST, TRAIN, UNDECIDED, VALIDATION, Entry, listing_of
from training.split import make_split, stratified_split, write_split


@given(
    counts=st.lists(st.integers(10, 60), min_size=2, max_size=5),
    validation=st.sampled_from([0.0, 0.1, 0.25]),
    test=st.sampled_from([0.0, 0.1, 0.3]),
    seed=st.integers(0, 5),
)
def test_every_row_is_in_one_part_and_proportions_hold(counts, validation, test, seed):
    labels = np.repeat(np.arange(len(counts)), counts)
    names = tuple(map(str, range(len(counts))))
    split = stratified_split(labels, names, np.arange(len(labels)), validation=validation, test=test, seed=seed)
    together = np.concatenate([split.train, split.validation, split.test])
    assert sorted(together.tolist()) == list(range(len(labels)))
    for part, share in ((split.validation, validation), (split.test, test)):
        for label, count in enumerate(counts):
            held = int((labels[part] == label).sum())
            assert abs(held - share * count) <= 1 if share else held == 0


def test_more_images_of_one_class_do_not_move_another():
    small, large = np.repeat([0, 1], [20, 20]), np.repeat([0, 1], [20, 50])
    splits = [
        stratified_split(labels, ("a", "b"), np.arange(len(labels)), validation=0.1, test=0.1, seed=3)
        for labels in (small, large)
    ]
    first, second = (split.test[split.test < 20].tolist() for split in splits)
    assert first == second


def test_too_few_images_of_a_class_are_named():
    with pytest.raises(DataError, match="class rare has only 2 usable training images, and 3 are needed"):
        stratified_split(np.array([0] * 9 + [1] * 2), ("many", "rare"), np.arange(11), validation=0.1, test=0.1, seed=0)


def entries(*splits):
    return [Entry(f"{n}.png", "ab"[n % 2], split) for n, split in enumerate(splits)]


def test_parts_that_the_data_name_are_kept(tmp_path):
    given_parts = [TRAIN] * 20 + [TEST] * 6
    listing = listing_of(tmp_path, entries(*given_parts))
    split = make_split(listing, np.arange(26), validation=0.2, test=0.5, seed=0)
    assert split.test.tolist() == list(range(20, 26))
    assert len(split.validation) == 4
    assert max(split.validation) < 20


def test_unusable_rows_are_in_no_part(tmp_path):
    listing = listing_of(tmp_path, entries(*[UNDECIDED] * 30))
    usable = np.arange(2, 30)
    split = make_split(listing, usable, validation=0.1, test=0.1, seed=0)
    assert sorted([*split.train, *split.validation, *split.test]) == usable.tolist()


def test_what_was_written_is_read_back_as_the_same_split(tmp_path):
    listing = listing_of(tmp_path, entries(*[UNDECIDED] * 30))
    split = make_split(listing, np.arange(30), validation=0.2, test=0.2, seed=1)
    write_split(tmp_path / "split.csv", listing, split)
    again = list_images(tmp_path / "split.csv")
    for part, rows in ((TRAIN, split.train), (VALIDATION, split.validation), (TEST, split.test)):
        found = {again.paths[i] for i in np.flatnonzero(again.splits == part)}
        assert found == {listing.paths[i] for i in rows}


def test_another_seed_draws_other_images_and_none_the_first_ones():
    labels = np.repeat([0, 1], 100)

    def drawn(seed):
        split = stratified_split(labels, ("a", "b"), np.arange(200), validation=0.2, test=0.2, seed=seed)
        return split.validation.tolist(), split.test.tolist()

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    for seed in (0, 1):
        for part in drawn(seed):
            assert part[:20] != list(range(part[0], part[0] + 20))  # not a run of neighbours, which are often alike


@pytest.mark.parametrize("part", [VALIDATION, TEST])
def test_unusable_rows_are_in_no_part_that_the_data_name(tmp_path, part):
    parts = [TRAIN] * 20 + [part] * 6
    listing = listing_of(tmp_path, [Entry(f"{n}.png", "ab"[n % 2], split) for n, split in enumerate(parts)])
    usable = np.setdiff1d(np.arange(26), [3, 21, 24])
    split = make_split(listing, usable, validation=0.2, test=0.2, seed=0)
    assert sorted([*split.train, *split.validation, *split.test]) == usable.tolist()
