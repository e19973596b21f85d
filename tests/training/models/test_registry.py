import dataclasses

import pytest
import torch

from service.errors import ConfigurationError
from training.models import create, describe, names, published


def test_every_architecture_that_is_promised_is_there():
    vgg = [f"vgg{depth}{norm}" for depth in (11, 13, 16, 19) for norm in ("", "_bn")]
    resnet = [f"resnet{depth}" for depth in (18, 34, 50, 101, 152)]
    wider = ["resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"]
    assert set(names()) == {
        "convnet",
        "lenet5",
        "resnet8",
        "alexnet",
        *vgg,
        *resnet,
        *wider,
        "googlenet",
        "inception_v3",
    }


@pytest.mark.parametrize(
    ("wrong", "close"), [("resnet5O", "resnet50"), ("LeNet5", "lenet5"), ("inception", "inception_v3")]
)
def test_a_misspelt_name_is_answered_with_the_closest_and_the_list(wrong, close):
    with pytest.raises(ConfigurationError, match=f"did you mean {close}.*convnet, lenet5, .*inception_v3"):
        create(wrong)


def test_a_name_like_no_other_is_answered_with_the_list_alone():
    with pytest.raises(
        ConfigurationError, match=r"there is no architecture 'zzz'\. There are: convnet, lenet5"
    ) as caught:
        describe("zzz")
    assert "did you mean" not in str(caught.value)


def test_a_misspelt_option_is_answered_with_the_closest_and_the_list():
    with pytest.raises(ConfigurationError, match=r"no option 'droput'.*mean dropout\?.*small_images, width"):
        create("resnet18", droput=0.1)


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("width", "0.5", "width is a number, not '0.5'"),
        ("width", True, "width is a number, not True"),
        ("width", 0, "width is 0.0, but has to be from 0.1 to 32"),
        ("dropout", 1.0, "dropout is 1.0, but has to be from 0 to 0.95"),
        ("dropout", float("nan"), "dropout is nan"),
        ("classic", 1, "classic is true or false, not 1"),
        ("classic", "yes", "classic is true or false, not 'yes'"),
    ],
)
def test_a_value_of_the_wrong_type_or_out_of_range_is_refused(option, value, complaint):
    with pytest.raises(ConfigurationError, match=complaint):
        create("lenet5", 10, 1, **{option: value})


def test_a_whole_number_is_accepted_for_a_fraction():
    model = create("lenet5", 10, 1, width=2)
    assert model.config.width == 2.0
    assert isinstance(model.config.width, float)


@pytest.mark.parametrize(("classes", "channels"), [(1, 3), (0, 3), (10, 0)])
def test_a_model_needs_two_classes_and_a_channel(classes, channels):
    with pytest.raises(ConfigurationError, match="at least 2 classes and 1 channel"):
        create("lenet5", classes, channels)


@pytest.mark.parametrize("name", names())
def test_the_options_of_a_config_rebuild_it(name):
    changed = {
        option.name: (not option.default) if isinstance(option.default, bool) else 0.25
        for option in describe(name).options
    }
    config = dataclasses.replace(describe(name).config, num_classes=7, in_channels=2, **changed)
    assert config.options() == changed
    with torch.device("meta"):
        assert create(config.name, config.num_classes, config.in_channels, **config.options()).config == config


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        describe("lenet5").config.num_classes = 3


def test_published_files_are_found_by_name():
    architecture, weights = published("resnet50-11ad3fa6.pth")
    assert (architecture.name, weights.top1, weights.shorter_side) == ("resnet50", 80.858, 232)
    assert published("resnet50-00000000.pth") is None
