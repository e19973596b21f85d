import dataclasses

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from service.artifact import InputSpec
from service.errors import ConfigurationError
from training import variants
from training.graph import Servable, to_onnx
from training.runtime import Session
from training.speed import Comparison
from training.variants import Baseline

SPEC = InputSpec(height=16, width=16, channels=3)


class Wide(nn.Module):
    """Four convolutions of 64 channels.

    `spread`: the channels between the first two layers grow by so many powers of ten, and the second layer's weights
    take it back. The function stays the same, but 8 bits cannot hold the small channels beside the large ones.
    """

    def __init__(self, spread=0.0):
        super().__init__()
        gain = torch.logspace(0, spread, 64)
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.stem.weight.data *= gain.view(-1, 1, 1, 1)
        self.stem.bias.data *= gain
        self.body = nn.Sequential(*[nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()) for _ in range(3)])
        self.body[0][0].weight.data /= gain.view(1, -1, 1, 1)
        self.head = nn.Linear(64, 4)

    def features(self, x):
        return self.body(self.stem(x).relu()).mean((2, 3))

    def forward(self, x):
        return self.head(self.features(x))


def normalised(pixels):
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25


def coloured(images):
    """Noisy images of four colours, and which colour each of them has."""
    rng = np.random.default_rng(0)
    labels = np.arange(images) % 4
    colours = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [190, 190, 60]])
    pixels = colours[labels][:, None, None] + rng.integers(-50, 50, (images, *SPEC.shape))
    return pixels.astype(np.uint8), labels


def fitted(net, pixels, labels):
    """The last layer in closed form: least squares from features to classes."""
    with torch.no_grad():
        features = net.features(normalised(pixels))
        wanted = 8 * torch.eye(4)[torch.from_numpy(labels)]
        extended = torch.cat([features, torch.ones(len(features), 1)], dim=1)
        solution = torch.linalg.lstsq(extended, wanted, driver="gelsd").solution
        net.head.weight.copy_(solution[:-1].T)
        net.head.bias.copy_(solution[-1])
    return net


def baseline_of(net, images=40):
    pixels, labels = coloured(images)
    model = to_onnx(Servable(net, (0.5,) * 3, (0.25,) * 3, 1.0), SPEC)
    onnx.helper.set_model_props(model, {"convoy.name": "wide"})
    session = Session(model.SerializeToString())
    return Baseline(model, session, session.run_all(pixels), pixels, labels, pixels[:2], pixels[:16])


def twice_as_fast(*_):
    return Comparison(2.0, 1.8, 100.0)


@pytest.fixture(scope="module")
def wide():
    torch.manual_seed(0)
    return baseline_of(fitted(Wide(), *coloured(40)))


@pytest.fixture(scope="module")
def ruined():
    torch.manual_seed(0)
    return baseline_of(fitted(Wide(spread=6.0), *coloured(40)))


def test_the_float_models_of_these_tests_know_the_colours(wide, ruined):
    assert wide.accuracy == ruined.accuracy == 1


def test_int8_is_kept_when_it_is_faster_and_accurate(wide):
    outcome = variants.build(["int8"], wide, budget_points=5, compare=twice_as_fast)

    ((kept, serialised),) = outcome.kept
    assert outcome.rejected == []
    assert kept.file == "model.int8.onnx"
    assert kept.accuracy >= 0.95
    assert kept.images_per_second == 100
    assert kept.note.startswith("2.00 times as fast as fp32 (batch 8 on CPUExecutionProvider); same top class as")
    assert onnx.load_from_string(serialised).metadata_props[0].value == "wide"


def test_the_canary_tolerance_of_a_variant_covers_what_it_is_off(wide):
    ((kept, serialised),) = variants.build(["int8"], wide, budget_points=5, compare=twice_as_fast).kept

    off = np.abs(Session(serialised).run(wide.canary).probabilities - wide.session.run(wide.canary).probabilities).max()

    assert kept.canary_tolerance == pytest.approx(0.02 + 1.5 * off, abs=1e-4)


def test_int8_that_ruins_accuracy_is_rejected_with_figures_after_the_search(ruined):
    outcome = variants.build(["int8"], ruined, budget_points=0.5, compare=twice_as_fast)

    assert outcome.kept == []
    reason = outcome.rejected[0].reason
    assert "on 40 held-out images); allowed are 0.5; with its first and last layers in float still" in reason


def test_few_images_that_do_not_show_a_loss_show_that_the_answers_are_others(ruined):
    """As many have become right as wrong: by chance."""
    nobodys = dataclasses.replace(ruined, labels=np.full(40, 99))
    outcome = variants.build(["int8"], nobodys, budget_points=0.5, compare=twice_as_fast)

    assert outcome.kept == []
    assert "another top class than fp32 on " in outcome.rejected[0].reason
    assert "so few cannot show a loss below 2.5 points" in outcome.rejected[0].reason


def test_the_same_loss_is_kept_within_a_larger_budget(ruined):
    outcome = variants.build(["int8"], ruined, budget_points=100, compare=twice_as_fast)

    assert [variant.name for variant, _ in outcome.kept] == ["int8"]


def test_int8_that_is_no_faster_is_rejected_with_the_ratio(wide):
    (rejected,) = variants.build(
        ["int8"], wide, budget_points=100, compare=lambda *_: Comparison(1.04, 1.01, 90.0)
    ).rejected

    assert rejected.reason.startswith("1.04 times as fast as fp32 (batch 8 on CPUExecutionProvider)")
    assert "not worth a file" in rejected.reason


def test_int8_that_may_be_faster_by_chance_is_rejected(wide):
    (rejected,) = variants.build(["int8"], wide, 100, compare=lambda *_: Comparison(1.3, 0.9, 90.0)).rejected

    assert "but only 0.90 times in a quarter of the rounds" in rejected.reason


def test_what_is_compared_is_the_variant_with_the_float_model(wide):
    seen = []

    def compare(reference, candidate, pixels):
        seen.append((reference, candidate, pixels))
        return Comparison(3.0, 2.5, 300.0)

    ((kept, serialised),) = variants.build(["fp16"], wide, budget_points=5, compare=compare).kept

    ((reference, candidate, pixels),) = seen
    assert reference is wide.session
    assert pixels is wide.holdout
    assert kept.images_per_second == 300
    np.testing.assert_array_equal(candidate.run(pixels).logits, Session(serialised).run(pixels).logits)


def test_tensorrt_int8_is_kept_without_a_speed_where_there_is_no_tensorrt(wide):
    ((kept, _),) = variants.build(["trt-int8"], wide, budget_points=5, compare=twice_as_fast).kept

    assert kept.images_per_second is None
    assert "speed not measured" in kept.note


def test_outputs_that_are_not_finite_are_never_kept():
    net = Wide()
    net.head.bias.data[0] = torch.nan

    (rejected,) = variants.build(["fp16"], baseline_of(net), 100, compare=twice_as_fast).rejected

    assert rejected.reason == "some of its outputs are not finite"


def test_a_format_that_cannot_be_made_is_rejected_not_raised(wide):
    without_images = Baseline(**{**vars(wide), "calibration": wide.calibration[:0]})

    (rejected,) = variants.build(["int8"], without_images, budget_points=1).rejected

    assert "needs training images" in rejected.reason


def test_names_are_checked_and_ordered():
    assert variants.check_names(["fp16", "int8", "int8"], 0.5) == ("int8", "fp16")
    with pytest.raises(ConfigurationError, match="unknown variant 'int4'; choose among int8, fp16, trt-int8"):
        variants.check_names(["int4"], 0.5)
    with pytest.raises(ConfigurationError, match="budget"):
        variants.check_names([], -1)
