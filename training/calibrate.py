"""Calibration: how far a classifier's confidence can be believed, and one number that mends it.

Temperature scaling and the expected calibration error follow Guo et al., "On Calibration of Modern Neural Networks",
ICML 2017 (arXiv:1706.04599).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.errors import TrainingError

MIN_TEMPERATURE = 0.05
MAX_TEMPERATURE = 20.0

_RELATIVE_TOLERANCE = 1e-7
_AT_BOUND = 1e-3
_MAX_STEPS = 100
_SPREAD = 0.5  # of ln T among trained networks: two in three have a T between 0.6 and 1.6


@dataclass(frozen=True)
class Reliability:
    """Confidence against accuracy in B bins of equal width over 0..1.

    `edges` is float64[B + 1]; the others are [B]: `count` images in the bin, their mean top-1 `confidence` and their
    `accuracy`, both 0 in an empty bin.
    """

    edges: NDArray[np.float64]
    count: NDArray[np.int64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]

    @property
    def error(self) -> float:
        """Expected calibration error: mean gap between confidence and accuracy, weighted by images; 0..1."""
        images = self.count.sum()
        return float((self.count * np.abs(self.confidence - self.accuracy)).sum() / images) if images else 0.0


@dataclass(frozen=True)
class Calibration:
    """What the temperature does on held-out images.

    `error_before`, `error_after`: expected calibration error, 0..1. `likelihood_before`, `likelihood_after`: negative
    log-likelihood in nats.
    """

    temperature: float
    error_before: float
    error_after: float
    likelihood_before: float
    likelihood_after: float

    def metrics(self) -> dict[str, float]:
        """For the manifest: the exported graph has the temperature inside, so its figures have the plain names."""
        return {
            "expected_calibration_error": self.error_after,
            "expected_calibration_error_uncalibrated": self.error_before,
            "negative_log_likelihood": self.likelihood_after,
            "negative_log_likelihood_uncalibrated": self.likelihood_before,
        }


def calibration(logits: NDArray[np.floating], labels: NDArray[np.int64], temperature: float) -> Calibration:
    """Both figures with and without the temperature, of logits [N, K] before it and labels int64[N]."""
    return Calibration(
        temperature=temperature,
        error_before=expected_calibration_error(softmax(logits), labels),
        error_after=expected_calibration_error(softmax(logits, temperature), labels),
        likelihood_before=negative_log_likelihood(logits, labels),
        likelihood_after=negative_log_likelihood(logits, labels, temperature),
    )


def softmax(logits: NDArray[np.floating], temperature: float = 1.0) -> NDArray[np.float64]:
    """Probabilities float64[N, K] of logits [N, K] divided by the temperature."""
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    scaled -= scaled.max(axis=1, keepdims=True)
    exponentials = np.exp(scaled)
    probabilities: NDArray[np.float64] = exponentials / exponentials.sum(axis=1, keepdims=True)
    return probabilities


def negative_log_likelihood(logits: NDArray[np.floating], labels: NDArray[np.int64], temperature: float = 1.0) -> float:
    """Mean of -ln p(true class) over N images, in nats."""
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    scaled -= scaled.max(axis=1, keepdims=True)
    own = np.take_along_axis(scaled, labels[:, None], axis=1)[:, 0]
    return float(np.mean(np.log(np.exp(scaled).sum(axis=1)) - own))


def fit_temperature(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """The temperature T that minimises the negative log-likelihood of softmax(logits / T) on held-out images.

    A validation set without a single error would ask for T = 0, that is for certainty. As in Platt scaling the targets
    can give way by one pseudo-image spread over all classes; but that alone asks for T = 1.6 of a digit classifier
    without errors among 180 images, whose own confidence is nearer to the truth (`docs/benchmarks.md`). On the other
    side one more image counts as right: a few that happen to be wrong would ask for T = 20. Of what lies between the
    two, which one image decides, the value next to 1 is taken. And both are pulled towards 1 by what is known of
    trained networks beforehand, ln T = 0 +- 0.5: ten images of a network that has hardly learnt anything say nothing of
    its confidence, and ask for anything. From a hundred on it hardly matters.

    Args:
        logits: float32[N, K], before any temperature.
        labels: int64[N], in 0..K-1.

    Returns:
        T between `MIN_TEMPERATURE` and `MAX_TEMPERATURE`; 1.0 if the images ask for endless certainty, or all
        logits of every image are equal.

    Raises:
        TrainingError: no images, labels that do not fit, or logits that are not finite.
    """
    _check(logits, labels)
    centred = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    if not centred.any():
        return 1.0
    share = 1 / (len(labels) + 1)  # of one more image, which is right for sure, or of no class
    pull = 1 / (_SPREAD**2 * len(labels))
    coldest = _temperature(centred, (1 - share) * _target_logit(centred, labels, doubt=0.0), pull)
    warmest = _temperature(centred, _target_logit(centred, labels, doubt=share), pull)
    found = min(max(1.0, coldest), warmest)
    # Certainty without end is asked for by a few images that happen to be right, such as those of one class alone.
    return found if found > MIN_TEMPERATURE * (1 + _AT_BOUND) else 1.0


def reliability(probabilities: NDArray[np.floating], labels: NDArray[np.int64], bins: int = 15) -> Reliability:
    """Sorts N images into `bins` by the confidence of their predicted class.

    Args:
        probabilities: [N, K], rows that sum to 1.
        labels: int64[N].
        bins: number of bins of equal width; 15 is the usual choice and makes figures comparable.
    """
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    # A bin holds its upper edge, as in the paper: (0, 1/B], (1/B, 2/B] ...
    index = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    count = np.bincount(index, minlength=bins)
    filled = np.maximum(count, 1)
    return Reliability(
        edges=np.linspace(0, 1, bins + 1),
        count=count.astype(np.int64),
        confidence=np.bincount(index, weights=confidence, minlength=bins) / filled,
        accuracy=np.bincount(index, weights=correct, minlength=bins) / filled,
    )


def expected_calibration_error(probabilities: NDArray[np.floating], labels: NDArray[np.int64], bins: int = 15) -> float:
    """Mean gap between confidence and accuracy, 0..1, over bins of equal width; see `reliability`."""
    return reliability(probabilities, labels, bins).error


def _check(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:  # noqa: PLR2004  two dimensions: [N, K]
        raise TrainingError(f"calibration needs logits [N, K] and labels [N], not {logits.shape} and {labels.shape}")
    if not len(labels):
        raise TrainingError("calibration needs held-out images, and there are none; enlarge the validation split")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise TrainingError(f"labels {labels.min()} to {labels.max()} do not fit {logits.shape[1]} classes")
    if not np.isfinite(logits).all():
        rows = int((~np.isfinite(logits)).any(axis=1).sum())
        raise TrainingError(f"{rows} of {len(logits)} held-out images have logits that are not finite; lower the rate")


def _temperature(centred: NDArray[np.float64], target: float, pull: float) -> float:
    """The T at which the mean logit is that of the targets, but for the pull towards 1, or the nearest that is allowed.

    The mean loss is convex in 1/T, and pull * (ln T)^2 / 2 is least at 1, so a minimum lies between the two. Newton
    steps kept inside a shrinking bracket find it.
    """
    low, high = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
    inverse = 1.0
    for _ in range(_MAX_STEPS):
        slope, curvature = _derivatives(centred, target, inverse)
        slope += pull * np.log(inverse) / inverse
        curvature += pull * (1 - np.log(inverse)) / inverse**2
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        newton = inverse - slope / curvature if curvature > 0 else low
        following = newton if low < newton < high else float(np.sqrt(low * high))
        done = abs(following - inverse) <= _RELATIVE_TOLERANCE * inverse
        inverse = following
        if done:
            break
    return float(np.clip(1 / inverse, MIN_TEMPERATURE, MAX_TEMPERATURE))


def _target_logit(centred: NDArray[np.float64], labels: NDArray[np.int64], doubt: float) -> float:
    """Mean logit [N, K] under the targets: the true class, but for a part that is uniform."""
    own = float(np.take_along_axis(centred, labels[:, None], axis=1).mean())
    return (1 - doubt) * own + doubt * float(centred.mean())


def _derivatives(centred: NDArray[np.float64], target: float, inverse: float) -> tuple[float, float]:
    """First and second derivative of the mean loss by 1/T: expectation minus target, and variance, of the logit."""
    weights = np.exp(centred * inverse)
    weights /= weights.sum(axis=1, keepdims=True)
    first = (weights * centred).sum(axis=1)
    second = (weights * centred**2).sum(axis=1)
    return float(first.mean()) - target, float((second - first**2).mean())
