"""Exact figures of a classifier from its predictions: pure functions on arrays, no model and no files.

`labels` are int64[N] in 0..K-1 and `scores` float[N, K]: logits or probabilities, only their order counts. Rows have
to be whole: whoever pads the last batch cuts the padding off before coming here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ClassScores:
    """Per class: precision, recall and F1 as float64[K] in 0..1, `support` (true images) as int64[K].

    A class that was never predicted has precision 0, one without images recall 0, as in scikit-learn's default.
    """

    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    f1: NDArray[np.float64]
    support: NDArray[np.int64]

    def macro(self) -> dict[str, float]:
        """Unweighted means over the classes that have images: a rare class counts as much as a frequent one."""
        present = self.support > 0
        if not present.any():
            return {"precision": 0.0, "recall": 0.0, "f1": 0.0}
        return {
            "precision": float(self.precision[present].mean()),
            "recall": float(self.recall[present].mean()),
            "f1": float(self.f1[present].mean()),
        }


def accuracy(predicted: NDArray[np.int64], labels: NDArray[np.int64]) -> float:
    """Share of images whose predicted class, int64[N], is the true one; 0 for no images."""
    return float(np.mean(predicted == labels)) if len(labels) else 0.0


def top_k_accuracy(scores: NDArray[np.floating], labels: NDArray[np.int64], k: int) -> float:
    """Share of images whose true class is among the `k` highest scores.

    Ties count against the model: with equal scores for all classes nothing is known, and nothing is scored.
    """
    if not len(labels):
        return 0.0
    if k >= scores.shape[1]:
        return 1.0
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    at_least_as_high = (scores >= own).sum(axis=1)  # counts the true class itself
    return float(np.mean(at_least_as_high <= k))


def confusion_matrix(
    predicted: NDArray[np.int64], labels: NDArray[np.int64], classes: int, most: int | None = None
) -> NDArray[np.int64]:
    """Counts as int64[K, K]: rows are the true class, columns the predicted one.

    Of more classes than `most`, as many neighbours count as one as make no more than that: K classes have K * K pairs.
    """
    together = 1 if most is None else -(-classes // most)
    size = -(-classes // together)
    pairs = np.bincount(labels // together * size + predicted // together, minlength=size * size)
    return pairs.reshape(size, size).astype(np.int64)


def confused_pairs(predicted: NDArray[np.int64], labels: NDArray[np.int64], most: int) -> list[tuple[int, int, int]]:
    """True class, predicted class and count of the most frequent mistakes, the most frequent first."""
    wrong = predicted != labels
    pairs, counts = np.unique(np.stack([labels[wrong], predicted[wrong]], axis=1), axis=0, return_counts=True)
    first = np.argsort(-counts, kind="stable")[:most]
    rows = np.column_stack([pairs[first], counts[first]]).tolist()
    return [(true, other, count) for true, other, count in rows]


def class_scores(predicted: NDArray[np.int64], labels: NDArray[np.int64], classes: int) -> ClassScores:
    """Precision, recall and F1 of each of so many classes."""
    hits = np.bincount(labels[predicted == labels], minlength=classes).astype(np.float64)
    support = np.bincount(labels, minlength=classes)
    answers = np.bincount(predicted, minlength=classes)
    return ClassScores(
        precision=_ratio(hits, answers),
        recall=_ratio(hits, support),
        f1=_ratio(2 * hits, support + answers),
        support=support,
    )


def _ratio(above: NDArray[np.float64], below: NDArray[np.int64]) -> NDArray[np.float64]:
    out = np.zeros_like(above)
    np.divide(above, below, out=out, where=below > 0)
    return out
