from pathlib import Path

import numpy as np
import pytest

from service.errors import ConfigurationError
from training.conventions import PRESETS, Normalisation, Request, input_spec, normalisation


def request(**changes):
    return Request(model=Path("m.onnx"), labels=Path("labels.txt"), name="m", **changes)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        (
            {"preset": "imagenet-torchvision"},
            "shorter side to 256 (bilinear, antialiased), centre crop 224x224",
        ),
        (
            {"preset": "tf-inception"},
            "shorter side to 256 (bilinear, antialiased), centre crop 224x224",
        ),
        ({"preset": "zero-one"}, "stretched to 224x224 (bilinear, antialiased)"),
        ({"resize": "crop", "shorter_side": 232}, "shorter side to 232 (bilinear, antialiased), centre crop 224x224"),
        ({"resize": "stretch", "interpolation": "bicubic"}, "stretched to 224x224 (bicubic, antialiased)"),
    ],
)
def test_presets_carry_their_resize_rule_and_can_be_overridden(changes, rule):
    assert input_spec(request(**changes), 224, 224, 3).describe() == rule


def test_the_published_crop_of_299_pixels_comes_from_342():
    assert input_spec(request(), 299, 299, 3).resize.shorter_side == 342


def test_normalisation_without_a_graph_is_the_textbook_one():
    rule = Normalisation((0.5, 0.25, 0.0), (0.5, 1.0, 2.0), "bgr")

    (found,) = rule.apply(np.full((1, 1, 1, 3), 255, np.uint8), "nchw", np.dtype(np.float32))

    np.testing.assert_allclose(found.ravel(), [0.5, 0.75, 1.0])  # blue, green, red


@pytest.mark.parametrize(
    ("changes", "channels", "mean", "std"),
    [
        ({}, 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ({"mean": (0.5,)}, 3, (0.5, 0.5, 0.5), (0.229, 0.224, 0.225)),
        ({"preset": "tf-inception"}, 1, (0.5,), (0.5,)),
        ({"mean": (0.1,), "std": (0.3,)}, 1, (0.1,), (0.3,)),
    ],
)
def test_given_values_replace_the_presets(changes, channels, mean, std):
    rule = normalisation(request(**changes), channels)

    assert (rule.mean, rule.std) == (mean, std)


def test_grayscale_needs_values_of_its_own_where_the_preset_has_three():
    with pytest.raises(ConfigurationError, match="do not fit images of 1 channels; give --mean and --std"):
        normalisation(request(), 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"mean": (123.675, 116.28, 103.53)},
        {"std": (58.395, 57.12, 57.375)},
        {"mean": (-0.1,)},
        {"std": (0.0,)},
        {"mean": (float("nan"),)},
    ],
)
def test_values_for_other_pixels_than_those_in_0_to_1_are_refused(changes):
    with pytest.raises(
        ConfigurationError, match=r"pixels are in 0\.\.1 here; divide values for pixels in 0\.\.255 by 255"
    ):
        normalisation(request(**changes), 3)


@pytest.mark.parametrize(("pixels", "side"), [(32, 32), (64, 64), (112, 128), (224, 256)])
def test_of_small_inputs_nothing_is_cut_off(pixels, side):
    assert input_spec(request(), pixels, pixels, 3).resize.shorter_side == side


@pytest.mark.parametrize("preset", PRESETS)
def test_no_preset_is_refused(preset):
    assert normalisation(request(preset=preset), 3) == PRESETS[preset].rule


@pytest.mark.parametrize(
    ("preset", "wanted"),
    [
        ("imagenet-torchvision", [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]),
        ("imagenet-caffe-bgr", [51 - 103.939, 0 - 116.779, 255 - 123.68]),
        ("tf-inception", [1, -1, -0.6]),
        ("zero-one", [1, 0, 0.2]),
        ("none", [255, 0, 51]),
    ],
)
def test_what_each_preset_makes_of_a_pixel(preset, wanted):
    pixel = np.array([[[[255, 0, 51]]]], np.uint8)

    found = PRESETS[preset].rule.apply(pixel, "nhwc", np.dtype(np.float32))

    np.testing.assert_allclose(found.ravel(), wanted, atol=1e-4)
