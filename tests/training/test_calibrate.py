import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import TrainingError
from training import calibrate


def drawn(logits, temperature, seed=0):
    """Labels drawn from softmax(logits / temperature): the model is calibrated at exactly that temperature."""
    rng = np.random.default_rng(seed)
    chances = calibrate.softmax(logits, temperature).cumsum(axis=1)
    return (rng.random((len(logits), 1)) > chances).sum(axis=1).clip(max=logits.shape[1] - 1)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5, 8.0])
def test_finds_the_temperature_that_the_labels_were_drawn_with(temperature):
    logits = np.random.default_rng(1).normal(0, 4, (20_000, 10)).astype(np.float32)

    found = calibrate.fit_temperature(logits, drawn(logits, temperature))

    assert found == pytest.approx(temperature, rel=0.05)


def test_is_the_minimum_of_the_likelihood():
    logits = np.random.default_rng(2).normal(0, 4, (5000, 10)).astype(np.float32)
    labels = drawn(logits, 2.0)

    best = calibrate.fit_temperature(logits, labels)

    at_best = calibrate.negative_log_likelihood(logits, labels, best)
    for factor in (0.9, 0.98, 1.02, 1.1):
        assert calibrate.negative_log_likelihood(logits, labels, best * factor) > at_best


def test_lowers_the_calibration_error_and_keeps_the_predictions():
    logits = np.random.default_rng(3).normal(0, 6, (10_000, 10)).astype(np.float32)
    labels = drawn(logits, 3.0)

    temperature = calibrate.fit_temperature(logits, labels)

    before, after = calibrate.softmax(logits), calibrate.softmax(logits, temperature)
    assert calibrate.expected_calibration_error(before, labels) > 0.2
    assert calibrate.expected_calibration_error(after, labels) < 0.02
    np.testing.assert_array_equal(before.argmax(axis=1), after.argmax(axis=1))


@pytest.mark.parametrize("certainty", [1, 2, 4])
def test_a_perfect_but_timid_model_does_not_become_certain(certainty):
    labels = np.arange(100) % 10
    logits = np.eye(10, dtype=np.float32)[labels] * certainty

    temperature = calibrate.fit_temperature(logits, labels)

    confidence = calibrate.softmax(logits, temperature).max()
    assert 0.97 < confidence < 0.9999  # 100 images without an error allow no more than about 1 in 100


def test_a_model_without_errors_keeps_the_confidence_that_it_has():
    labels = np.arange(100) % 10
    assert calibrate.fit_temperature(np.eye(10, dtype=np.float32)[labels] * 12, labels) == 1


def test_one_error_in_many_images_speaks_neither_for_nor_against_the_model():
    random = np.random.default_rng(4)
    labels = random.integers(0, 10, 150)
    logits = (10 * np.eye(10)[labels] + random.normal(0, 1, (150, 10))).astype(np.float32)
    wrong = logits.copy()
    wrong[0] = wrong[0][::-1]
    assert calibrate.fit_temperature(logits, labels) == 1
    assert calibrate.fit_temperature(wrong, labels) > 1.15  # it was sure of it


def test_a_model_that_is_always_wrong_goes_to_the_upper_bound():
    labels = np.arange(500) % 10
    logits = np.eye(10, dtype=np.float32)[(labels + 1) % 10] * 5

    assert calibrate.fit_temperature(logits, labels) == pytest.approx(calibrate.MAX_TEMPERATURE)


@pytest.mark.parametrize("images", [2, 4, 10])
def test_a_few_images_of_a_model_that_knows_nothing_yet_ask_for_little(images):
    """They ask for anything, from 0.05 to 20: the loss is flat, and what they happen to be decides."""
    rng = np.random.default_rng(5)
    for _ in range(20):
        logits = rng.normal(0, 0.1, (images, 2)).astype(np.float32)
        assert 0.5 < calibrate.fit_temperature(logits, rng.integers(0, 2, images)) < 2


def test_a_few_images_of_one_class_do_not_make_the_model_certain():
    """All are right by little: the likelihood alone would have no end."""
    logits = np.tile(np.array([[0.1, 0.0]], np.float32), (8, 1))

    assert 0.9 < calibrate.fit_temperature(logits, np.zeros(8, np.int64)) <= 1


def test_equal_logits_leave_the_temperature_alone():
    assert calibrate.fit_temperature(np.zeros((5, 3), np.float32), np.zeros(5, np.int64)) == 1


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(2, 5), st.floats(0.01, 500), st.integers(0, 2**32 - 1))
def test_stays_within_its_bounds_on_any_logits(images, classes, spread, seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, spread, (images, classes)).astype(np.float32)

    found = calibrate.fit_temperature(logits, rng.integers(0, classes, images))

    assert calibrate.MIN_TEMPERATURE <= found <= calibrate.MAX_TEMPERATURE


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((0, 3)), np.zeros(0, np.int64), "there are none"),
        (np.zeros((2, 3)), np.zeros(3, np.int64), r"not \(2, 3\) and \(3,\)"),
        (np.zeros((2, 3)), np.array([0, 3]), "do not fit 3 classes"),
        (np.array([[0, np.nan]]), np.array([0]), "1 of 1 held-out images"),
    ],
)
def test_refuses_what_cannot_be_calibrated(logits, labels, message):
    with pytest.raises(TrainingError, match=message):
        calibrate.fit_temperature(logits.astype(np.float32), labels)


def test_reliability_counts_by_hand():
    probabilities = np.array([[0.95, 0.05], [0.95, 0.05], [0.35, 0.65], [0.5, 0.5]])
    labels = np.array([0, 1, 1, 0])

    found = calibrate.reliability(probabilities, labels, bins=10)

    np.testing.assert_array_equal(found.count, [0, 0, 0, 0, 1, 0, 1, 0, 0, 2])
    assert found.confidence[9] == pytest.approx(0.95)
    assert found.accuracy[9] == 0.5
    assert found.error == pytest.approx((0.5 + 0.35 + 2 * 0.45) / 4)


def test_no_images_have_no_calibration_error():
    assert calibrate.expected_calibration_error(np.zeros((0, 3)), np.zeros(0, np.int64)) == 0


def test_both_figures_before_and_after_the_temperature():
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, 500)
    logits = (3 * np.eye(4)[labels] + random.normal(0, 1.5, (500, 4))).astype(np.float32) * 4  # far too sure
    temperature = calibrate.fit_temperature(logits, labels)
    found = calibrate.calibration(logits, labels, temperature)
    own = np.log(calibrate.softmax(logits)[np.arange(500), labels])
    assert found.likelihood_before == pytest.approx(-own.mean())
    assert found.likelihood_after == calibrate.negative_log_likelihood(logits, labels, temperature)
    assert found.error_before == calibrate.expected_calibration_error(calibrate.softmax(logits), labels)
    assert found.error_after < found.error_before
    assert found.likelihood_after < found.likelihood_before
    assert found.metrics() == {
        "expected_calibration_error": found.error_after,
        "expected_calibration_error_uncalibrated": found.error_before,
        "negative_log_likelihood": found.likelihood_after,
        "negative_log_likelihood_uncalibrated": found.likelihood_before,
    }


@pytest.mark.parametrize("right", range(3, 9))
def test_a_handful_of_images_asks_for_no_extreme_temperature(right):
    """Of eight images at a confidence of 0.58, whatever their number that happens to be right."""
    logits = np.tile(np.array([[1.0, 0.0, 0.0]], np.float32), (8, 1))
    labels = np.array([0] * right + [1] * (8 - right))

    assert 0.3 < calibrate.fit_temperature(logits, labels) < 3
