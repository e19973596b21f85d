import numpy as np
import pytest
import torch

from training.batches import Examples, MemorySource, balancing_weights, batch_starts
from training.distributed import Group
from training.seeds import Purpose, derive

SINGLE = Group()


def source_of(count, batch_size, seed=0, group=SINGLE, weights=None):
    images = np.arange(count + 10, dtype=np.uint8).reshape(-1, 1, 1, 1)
    labels = np.arange(count + 10) % 3
    return MemorySource(
        Examples(images, labels, np.arange(10, count + 10)), batch_size, seed, group=group, weights=weights
    )


def seen(batches):
    return [int(image) for batch in batches for image in batch.images.flatten()]


def test_an_epoch_shows_every_image_once_in_an_order_of_its_own():
    source = source_of(50, 8)
    first, second = seen(source.batches(0, 0)), seen(source.batches(1, 0))
    assert sorted(first) == sorted(second) == list(range(10, 60))
    assert first != second
    assert first == seen(source_of(50, 8).batches(0, 0))
    assert first != seen(source_of(50, 8, seed=1).batches(0, 0))


def test_labels_and_draws_travel_with_their_images():
    source = source_of(50, 8)
    by_image = {}
    for epoch_batch_size in (8, 20):
        for batch in source_of(50, epoch_batch_size).batches(3, 0):
            for image, label, row in zip(batch.images.flatten(), batch.labels, batch.uniform, strict=True):
                assert int(label) == int(image) % 3
                assert torch.equal(by_image.setdefault(int(image), row), row)
    assert source.steps == 7


def test_a_run_that_goes_on_sees_the_rest_of_the_epoch():
    whole, rest = list(source_of(50, 8).batches(2, 0)), list(source_of(50, 8).batches(2, 4))
    assert len(rest) == len(whole) - 4
    for a, b in zip(whole[4:], rest, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.uniform, b.uniform)


def test_processes_share_each_batch():
    whole = list(source_of(54, 8).batches(0, 0))
    parts = [list(source_of(54, 8, group=Group(rank, 3)).batches(0, 0)) for rank in range(3)]
    for number, batch in enumerate(whole):
        together = torch.cat([part[number].images for part in parts])
        assert torch.equal(together, batch.images)
        assert {part[number].whole for part in parts} == {len(batch.images)}


@pytest.mark.parametrize(("count", "last"), [(48, 8), (53, 13), (54, 6), (5, 5)])
def test_each_of_several_processes_has_two_images(count, last):
    sizes = np.diff([*batch_starts(count, 8, 3).tolist(), count]).tolist()
    assert sizes[-1] == last
    sources = [source_of(count, 8, group=Group(rank, 3)) for rank in range(3)]
    for number, batches in enumerate(zip(*(source.batches(0, 0) for source in sources), strict=True)):
        parts = [len(batch.labels) for batch in batches]
        assert sum(parts) == sizes[number]
        assert count < 6 or min(parts) >= 2
    assert {source.steps for source in sources} == {len(sizes)}


@pytest.mark.parametrize(("count", "sizes"), [(16, [8, 8]), (17, [8, 9]), (18, [8, 8, 2]), (1, [1]), (9, [9])])
def test_no_batch_but_a_lonely_one_has_a_single_image(count, sizes):
    starts = [*batch_starts(count, 8).tolist(), count]
    assert np.diff(starts).tolist() == sizes
    assert [len(batch.labels) for batch in source_of(count, 8).batches(0, 0)] == sizes


def test_balancing_draws_all_classes_equally_often():
    labels = np.array([0] * 900 + [1] * 90 + [2] * 10)
    examples = Examples(np.zeros((1000, 1, 1, 1), dtype=np.uint8), labels, np.arange(1000))
    source = MemorySource(examples, 100, 0, group=SINGLE, weights=balancing_weights(labels))
    drawn = torch.cat([batch.labels for epoch in range(5) for batch in source.batches(epoch, 0)])
    counts = torch.bincount(drawn)
    assert counts.min() > 0.9 * 5000 / 3
    assert counts.max() < 1.1 * 5000 / 3


def test_an_image_that_is_drawn_twice_is_changed_in_two_ways():
    source = source_of(50, 8, weights=np.array([0.5] + [0.5 / 49] * 49))
    batches = list(source.batches(1, 0))
    rows = torch.cat([batch.uniform for batch in batches])
    assert len({tuple(row) for row in rows.tolist()}) == 50
    assert len(set(seen(batches))) < 40
    rest = list(source.batches(1, 3))
    assert torch.equal(torch.cat([batch.uniform for batch in rest]), rows[24:])


def test_a_loop_that_leaves_early_stops_the_thread():
    batches = source_of(50, 2).batches(0, 0)
    next(batches)
    batches.close()
    assert next(batches, None) is None


def test_an_image_is_changed_otherwise_in_each_epoch_and_by_each_seed():
    def rows(seed, epoch):
        found = {}
        for batch in source_of(50, 8, seed=seed).batches(epoch, 0):
            found |= {int(i): tuple(r) for i, r in zip(batch.images.flatten(), batch.uniform.tolist(), strict=True)}
        return found

    first = rows(0, 0)
    for other in (rows(0, 1), rows(1, 0)):
        assert all(first[image] != other[image] for image in first)


def test_streams_of_purposes_epochs_and_seeds_are_apart():
    seeds = [
        derive(seed, purpose, *counters)
        for seed in (0, 1, 2)
        for purpose in Purpose
        for counters in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    assert len(set(seeds)) == len(seeds)
