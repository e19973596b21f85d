import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from training import metrics


@settings(deadline=None)  # the first example pays for imports
@given(st.integers(2, 6), st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_class_scores_and_confusion_equal_scikit_learn(classes, images, seed):
    rng = np.random.default_rng(seed)
    labels, predicted = rng.integers(0, classes, (2, images))

    confusion = metrics.confusion_matrix(predicted, labels, classes)
    scores = metrics.class_scores(predicted, labels, classes)

    names = list(range(classes))
    np.testing.assert_array_equal(confusion, reference.confusion_matrix(labels, predicted, labels=names))
    expected = reference.precision_recall_fscore_support(labels, predicted, labels=names, zero_division=0)
    for found, wanted in zip((scores.precision, scores.recall, scores.f1, scores.support), expected, strict=True):
        np.testing.assert_allclose(found, wanted)


@given(st.integers(2, 9), st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_confused_pairs_are_the_largest_counts_beside_the_diagonal(classes, images, seed):
    rng = np.random.default_rng(seed)
    labels, predicted = rng.integers(0, classes, (2, images))
    mistakes = metrics.confusion_matrix(predicted, labels, classes)
    np.fill_diagonal(mistakes, 0)

    found = metrics.confused_pairs(predicted, labels, 4)

    assert [count for *_, count in found] == [count for count in sorted(mistakes.ravel())[::-1][:4] if count]
    assert all(mistakes[true, other] == count for true, other, count in found)


def test_of_many_classes_neighbours_share_a_cell():
    labels, predicted = np.array([0, 4, 6, 6, 9]), np.array([1, 9, 6, 0, 9])

    confusion = metrics.confusion_matrix(predicted, labels, 10, most=3)  # four classes each, two in the last

    np.testing.assert_array_equal(confusion, [[1, 0, 0], [1, 1, 1], [0, 0, 1]])


def test_figures_of_twenty_thousand_classes_take_little_memory():
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 20_000, (2, 50_000))
    tracemalloc.start()
    metrics.class_scores(predicted, labels, 20_000)
    metrics.confused_pairs(predicted, labels, 12)
    metrics.confusion_matrix(predicted, labels, 20_000, most=1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 64e6


@settings(deadline=None)  # the first example pays for imports
@given(st.integers(3, 8), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_top_k_equals_scikit_learn_without_ties(classes, images, seed):
    rng = np.random.default_rng(seed)
    scores = rng.permuted(np.tile(np.arange(classes, dtype=np.float32), (images, 1)), axis=1)
    labels = rng.integers(0, classes, images)

    for k in range(1, classes):
        wanted = reference.top_k_accuracy_score(labels, scores, k=k, labels=list(range(classes)))
        assert metrics.top_k_accuracy(scores, labels, k) == pytest.approx(wanted)


def test_a_constant_model_earns_nothing_from_ties():
    assert metrics.top_k_accuracy(np.zeros((4, 10)), np.zeros(4, dtype=np.int64), 5) == 0


def test_top_k_with_as_many_classes_as_k_is_always_right():
    assert metrics.top_k_accuracy(np.zeros((4, 3)), np.zeros(4, dtype=np.int64), 5) == 1


def test_macro_averages_leave_classes_without_images_out():
    predicted, labels = np.array([0, 0, 0, 1, 1, 1, 1, 1]), np.array([0, 0, 0, 0, 1, 1, 1, 1])

    assert metrics.class_scores(predicted, labels, 3).macro()["recall"] == pytest.approx((0.75 + 1) / 2)


def test_no_images_give_zero_and_no_warning():
    none = np.zeros(0, dtype=np.int64)

    assert metrics.accuracy(none, none) == 0
    assert metrics.top_k_accuracy(np.zeros((0, 3)), none, 1) == 0
    assert metrics.class_scores(none, none, 3).macro()["f1"] == 0
    assert metrics.confused_pairs(none, none, 3) == []
