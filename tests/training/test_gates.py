import numpy as np
import onnx
import pytest
import torch
from torch import nn

from service.artifact import InputSpec
from service.errors import TrainingError
from service.runners import Outputs
from training import gates
from training.graph import Servable, to_onnx
from training.runtime import Session

SPEC = InputSpec(height=6, width=6, channels=1)
MEAN, STD = (0.4,), (0.3,)


class Net(nn.Module):
    def __init__(self, batch_statistics=False):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(64, 3)
        self.batch_statistics = batch_statistics

    def forward(self, x):
        x = self.conv(x)
        if self.batch_statistics:  # what batch normalisation does in training mode
            x = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)
        else:
            x = self.norm(x)
        return self.head(x.relu().flatten(1))


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (64, *SPEC.shape), dtype=np.uint8)


def built(**options):
    torch.manual_seed(0)
    return Servable(Net(**options), MEAN, STD, 1.0)


def test_a_true_export_passes_with_the_figures(pixels):
    net = built()
    session = Session(to_onnx(net, SPEC).SerializeToString())

    parity = gates.check_parity(session, gates.reference(net, MEAN, STD, pixels, 3), pixels)

    assert parity.probability_difference < 1e-5
    assert parity.images == 64


@pytest.fixture(scope="module")
def with_batch_statistics():
    return Session(to_onnx(built(batch_statistics=True), SPEC).SerializeToString())


@pytest.mark.parametrize("size", gates.BATCHES)
def test_batch_normalisation_exported_in_training_mode_is_refused(pixels, with_batch_statistics, size):
    wanted = gates.reference(built(), MEAN, STD, pixels, 3)

    with pytest.raises(TrainingError, match=rf"differs from PyTorch on a batch of {size}: .*evaluation mode"):
        gates.check_parity(with_batch_statistics, wanted, pixels, (size,))


def test_a_wrong_mean_is_refused(pixels):
    net = built()
    session = Session(to_onnx(net, SPEC).SerializeToString())
    wanted = gates.reference(net, (0.1,), STD, pixels, 3)

    with pytest.raises(TrainingError, match="differs from PyTorch"):
        gates.check_parity(session, wanted, pixels)


def test_a_frozen_batch_is_refused_at_the_first_other_size(pixels):
    net = built()
    model = to_onnx(net, SPEC)
    frozen = model.graph.input[0].type.tensor_type.shape.dim[0]
    frozen.ClearField("dim_param")
    frozen.dim_value = 2
    wanted = gates.reference(net, MEAN, STD, pixels, 3)

    with pytest.raises(TrainingError, match="fails on a batch of 1"):
        gates.check_parity(Session(model.SerializeToString()), wanted, pixels)


class Canned:
    """A session that gives prepared answers."""

    def __init__(self, logits):
        self.logits = logits

    def run(self, pixels):
        logits = self.logits[-len(pixels) :]
        return Outputs(logits, softmax(logits))


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)


def judged(found, wanted):
    found, wanted = np.array(found, np.float32), np.array(wanted, np.float32)
    return gates.check_parity(Canned(found), Outputs(wanted, softmax(wanted)), np.zeros((1, 1, 1, 1), np.uint8), (1,))


def test_an_error_that_saturated_probabilities_hide_is_found_in_the_logits():
    with pytest.raises(TrainingError, match="logits by up to 100"):
        judged([[200, 0, 0]], [[100, 0, 0]])


def test_a_flipped_class_is_found_even_within_the_tolerance():
    with pytest.raises(TrainingError, match="top class on 1 of 1"):
        judged([[0, 3e-4, -9]], [[3e-4, 0, -9]])


def test_a_tie_may_go_either_way():
    assert judged([[0, 1e-6, -9]], [[1e-6, 0, -9]]).probability_difference < 1e-5


def test_nan_is_refused():
    with pytest.raises(TrainingError, match="differs"):
        judged([[np.nan, 0, 0]], [[1, 0, 0]])


def test_a_missing_class_is_refused():
    with pytest.raises(TrainingError, match=r"outputs are \(1, 2\)"):
        judged([[1, 0]], [[1, 0, 0]])


def test_a_sample_is_spread_and_repeats_what_is_short():
    few = np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1)

    assert gates.sample(few, 2).ravel().tolist() == [0, 2]
    assert gates.sample(few, 6).ravel().tolist() == [0, 0, 1, 1, 2, 2]


def test_bytes_that_are_no_model_are_refused():
    with pytest.raises(TrainingError, match="cannot load the exported model"):
        Session(onnx.ModelProto().SerializeToString())


def test_the_largest_batch_is_tried_beside_the_small_ones():
    assert gates.batches_up_to(64) == gates.BATCHES
    assert gates.batches_up_to(16) == (1, 2, 7, 16)
    assert gates.batches_up_to(2) == (1, 2, 7)


def test_large_images_are_not_compared_by_the_gigabyte() -> None:
    assert gates.batches_of(28, 28) == gates.batches_of(299, 299) == gates.BATCHES
    assert gates.batches_of(1024, 1024) == (1, 2, 7, 9)
    assert gates.batches_of(4096, 4096) == (1, 2, 7)


def test_a_probability_that_is_off_by_half_a_percent_is_refused():
    """The logits are within their limit beside a large one that no probability shows."""
    with pytest.raises(TrainingError, match=r"probabilities by up to 0\.00\d+ \(allowed 0\.001\)"):
        judged([[1.02, 0, -30]], [[1, 0, -30]])


def test_a_logit_that_is_off_by_one_percent_is_refused():
    with pytest.raises(TrainingError, match=r"logits by up to 0\.5 \(allowed 0\.05\)"):
        judged([[50, 0, -20.5]], [[50, 0, -20]])


def test_differences_of_rounding_pass():
    judged([[50.01, 0, -20.01]], [[50, 0, -20]])
    judged([[1.0005, 0, -1]], [[1, 0, -1]])
