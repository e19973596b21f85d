"""From what a model puts out to what is answered."""

import numpy as np
import pytest

from service.classifier import Query, answers
from service.engine import Outputs
from service.errors import ImageFault


def outputs(*rows, logits=None):
    probabilities = np.asarray(rows, np.float32)
    return Outputs(probabilities * 2 if logits is None else np.asarray(logits, np.float32), probabilities)


def test_ties_go_to_the_smaller_index():
    (answer,) = answers(outputs([0.2, 0.3, 0.2, 0.3]), Query())

    assert [index for index, _ in answer.classes] == [1, 3, 0, 2]


@pytest.mark.parametrize(("top_k", "count"), [(1, 1), (3, 3), (4, 4), (5, 4), (2**32 - 1, 4)])
def test_top_k_beyond_the_classes_gives_all_of_them(top_k, count):
    (answer,) = answers(outputs([0.1, 0.2, 0.3, 0.4]), Query(top_k=top_k))

    assert [index for index, _ in answer.classes] == [3, 2, 1, 0][:count]


@pytest.mark.parametrize("classes", [2, 64, 65, 1000])
@pytest.mark.parametrize("top_k", [1, 5, 16, 17, 1000])
def test_places_are_those_of_a_stable_sort(classes, top_k):
    rng = np.random.default_rng(classes + top_k)
    rows = rng.integers(0, 40, (3, classes)).astype(np.float32) / 40  # of 40 values: with many ties
    kept = rows.copy()
    found = list(answers(outputs(*rows), Query(top_k=top_k)))

    for row, answer in zip(kept, found, strict=True):
        order = np.argsort(-row, kind="stable")[:top_k]
        assert answer.classes == [(int(index), float(row[index])) for index in order]


def test_scores_below_the_minimum_are_left_out_even_all_of_them():
    first, second = answers(outputs([0.5, 0.25, 0.25], [0.4, 0.3, 0.3]), Query(min_score=0.5))

    assert (first.classes, second.classes) == ([(0, 0.5)], [])


def test_logits_are_given_only_if_asked_for():
    found = outputs([0.25, 0.75])
    (with_logits,), (without,) = answers(found, Query(logits=True)), answers(found, Query())

    assert with_logits.logits.tolist() == [0.5, 1.5]
    assert without.logits is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_not_finite_counts_even_where_the_probabilities_are(value):
    bad, good = answers(outputs([0.5, 0.5], [0.1, 0.9], logits=[[value, 1], [1, 2]]), Query())

    assert bad.reason is ImageFault.NON_FINITE_OUTPUT
    assert good.classes[0][0] == 1


@pytest.mark.parametrize("classes", [10, 1000])
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_found_among_few_and_many(classes, odd):
    logits = np.zeros((2, classes), np.float32)
    logits[1, classes // 2] = odd
    first, second = answers(Outputs(logits, np.full((2, classes), 1 / classes, np.float32)), Query())

    assert first.best == 0
    assert second.reason is ImageFault.NON_FINITE_OUTPUT
