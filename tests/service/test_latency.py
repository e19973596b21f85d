"""What is learned of batch times, and the batch sizes chosen by it."""

from random import Random

import pytest

from service.latency import LatencyTable

BUCKETS = (1, 2, 4, 8, 16, 32)


def linear(per_image=0.01):
    return LatencyTable(BUCKETS, {bucket: bucket * per_image for bucket in BUCKETS})


def flat(seconds=0.01):
    return LatencyTable(BUCKETS, dict.fromkeys(BUCKETS, seconds))


@pytest.mark.parametrize(("images", "bucket"), [(1, 1), (2, 2), (3, 4), (5, 8), (17, 32), (32, 32), (33, 32)])
def test_a_batch_is_padded_to_the_next_bucket(images, bucket):
    assert LatencyTable(BUCKETS).bucket(images) == bucket


def with_fixed_cost(seconds=0.01):
    return LatencyTable(BUCKETS, {bucket: seconds + bucket * 0.01 for bucket in BUCKETS})


def test_where_company_gains_nothing_images_run_alone():
    """In a batch of eight the first image would wait for seven others, and the last be no sooner."""
    assert [linear().best_batch(waiting) for waiting in (1, 3, 5, 7)] == [1] * 4


def test_company_that_gains_little_is_no_reason_to_wait_for_it():
    table = LatencyTable(BUCKETS, {bucket: 0.001 + bucket * 0.01 for bucket in BUCKETS})

    assert table.best_batch(7) == 1


def test_in_a_long_line_a_few_run_together():
    """The first of four waits for three others, when the last of sixteen waits for fifteen anyway."""
    assert [linear().best_batch(waiting) for waiting in (8, 15, 16, 31, 32, 100)] == [2, 2, 4, 4, 8, 16]


def test_nobody_runs_together_where_that_takes_longer_than_one_by_one():
    slow = LatencyTable(BUCKETS, {1: 0.01, 2: 0.02, 4: 0.05, 8: 0.1, 16: 0.2, 32: 0.4})

    assert [slow.best_batch(waiting) for waiting in (8, 32, 100)] == [2, 2, 2]


def test_where_padding_costs_a_smaller_full_bucket_is_taken():
    assert [with_fixed_cost().best_batch(waiting) for waiting in (1, 3, 5, 9)] == [1, 2, 4, 8]


def test_where_padding_is_nearly_full_it_is_taken_when_the_fixed_cost_is_saved():
    assert with_fixed_cost(0.05).best_batch(15) == 15


def test_the_last_percents_are_not_worth_a_batch_of_twice_the_size():
    table = LatencyTable(BUCKETS, {1: 0.01, 2: 0.012, 4: 0.016, 8: 0.025, 16: 0.048, 32: 0.095})

    assert table.best_batch(32) == 8


def test_chance_in_what_was_seen_makes_no_batches():
    """Neighbours make some batches far longer. What they cost on average says nothing about sizes."""
    table, random = linear(), Random(7)
    sizes = []
    for _ in range(3000):
        waiting = random.choice((1, 1, 1, 2, 3, 5, 7))
        sizes.append(table.best_batch(waiting))
        table.observe(sizes[-1], sizes[-1] * 0.01 * random.choice((1, 1, 1.1, 1.3, 1.8, 4)))

    assert set(sizes) == {1}


def test_a_device_that_turns_out_to_like_company_gets_it():
    table = LatencyTable(BUCKETS, {bucket: bucket * 0.01 for bucket in BUCKETS})
    for _ in range(30):
        table.observe(8, 0.02)

    assert table.best_batch(8) == 8


def test_a_device_that_turns_out_not_to_like_company_gets_none():
    table = flat()
    for _ in range(1000):
        table.observe(table.best_batch(8), table.best_batch(8) * 0.01)

    assert table.best_batch(7) == 1


def test_where_padding_is_free_everything_is_taken():
    assert [flat().best_batch(waiting) for waiting in (1, 3, 5, 31)] == [1, 3, 5, 31]


def test_never_more_than_the_largest_bucket():
    assert (with_fixed_cost(0.05).best_batch(1000), flat().best_batch(1000), linear().largest) == (32, 32, 32)


def test_a_table_that_knows_nothing_takes_everything():
    assert [LatencyTable(BUCKETS).best_batch(waiting) for waiting in (1, 5, 40)] == [1, 5, 32]


def test_nothing_known_is_expected_to_take_no_time():
    assert (LatencyTable(BUCKETS).mean_s(4), LatencyTable(BUCKETS).cautious_s(4)) == (0.0, 0.0)


def test_an_unseen_bucket_is_judged_by_the_nearest_seen_one():
    table = LatencyTable(BUCKETS)
    table.observe(4, 0.04)

    assert table.mean_s(16) == pytest.approx(0.16)
    assert table.mean_s(1) == pytest.approx(0.04)  # a smaller batch is not promised to be faster


def test_observations_are_filed_under_the_bucket_they_ran_in():
    table = LatencyTable(BUCKETS)
    table.observe(5, 0.08)

    assert table.mean_s(8) == table.mean_s(6) == pytest.approx(0.08)


def test_a_change_of_pace_is_learned():
    table = flat(0.01)
    for _ in range(60):
        table.observe(8, 0.03)

    assert table.mean_s(8) == pytest.approx(0.03, rel=0.02)
    assert table.mean_s(4) == pytest.approx(0.01)


def test_caution_grows_with_the_spread_and_shrinks_when_it_ends():
    table = flat(0.01)
    for n in range(40):
        table.observe(8, 0.005 if n % 2 else 0.015)
    unsteady = table.cautious_s(8)
    for _ in range(60):
        table.observe(8, 0.01)

    assert unsteady > 0.015
    assert table.cautious_s(8) == pytest.approx(0.01, rel=0.05)


def test_one_stall_does_not_make_a_bucket_look_useless():
    """A pause of the machine is no property of the batch size: the next batches of that size have to be possible."""
    table = flat(0.01)
    table.observe(8, 10.0)

    assert table.cautious_s(8) < 0.1


def test_what_is_doubted_shrinks_until_it_is_tried_again():
    table = LatencyTable(BUCKETS)
    table.observe(8, 10.0)
    doubts = 0
    while table.cautious_s(8) > 0.1:
        table.doubt(8)
        doubts += 1

    assert doubts < 40


def test_doubting_an_unseen_bucket_leaves_the_one_it_was_judged_by():
    table = LatencyTable(BUCKETS)
    table.observe(4, 0.04)
    table.doubt(32)

    assert table.mean_s(32) < 8 * 0.04
    assert table.mean_s(4) == pytest.approx(0.04)


def test_doubting_the_unknown_leaves_it_unknown():
    table = LatencyTable(BUCKETS)
    table.doubt(8)
    table.observe(8, 0.05)

    assert table.mean_s(8) == pytest.approx(0.05)
