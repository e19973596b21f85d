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
    scores = metrics.class_scores(confusion)

    names = list(range(classes))
    np.testing.assert_array_equal(confusion, reference.confusion_matrix(labels, predicted, labels=names))
    expected = reference.precision_recall_fscore_support(labels, predicted, labels=names, zero_division=0)
    for found, wanted in zip((scores.precision, scores.recall, scores.f1, scores.support), expected, strict=True):
        np.testing.assert_allclose(found, wanted)


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
    confusion = np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]])

    assert metrics.class_scores(confusion).macro()["recall"] == pytest.approx((0.75 + 1) / 2)


def test_no_images_give_zero_and_no_warning():
    none = np.zeros(0, dtype=np.int64)

    assert metrics.accuracy(none, none) == 0
    assert metrics.top_k_accuracy(np.zeros((0, 3)), none, 1) == 0
    assert metrics.class_scores(metrics.confusion_matrix(none, none, 3)).macro()["f1"] == 0
