import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from training import pictures


def opened(uri):
    kind, data = uri.split(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == f"data:image/{image.format.lower()}"
    return image


def test_small_images_keep_every_pixel():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 1), dtype=np.uint8)

    np.testing.assert_array_equal(np.asarray(opened(pictures.thumbnail(pixels))), pixels[:, :, 0])


def test_large_images_shrink_and_keep_their_proportion():
    image = opened(pictures.thumbnail(np.zeros((300, 600, 3), np.uint8)))

    assert image.size == (160, 80)
    assert image.format == "JPEG"


def test_filters_are_colours_around_grey():
    net = nn.Conv2d(3, 2, 3)
    with torch.no_grad():
        net.weight.zero_()
        net.weight[0, 0] = 1.0  # the first filter wants red

    image = np.asarray(opened(pictures.first_filters(net)))

    assert image.shape == (3, 7, 4)  # two tiles of 3 pixels and a gap
    assert image[1, 1].tolist() == [255, 127, 127, 255]
    assert image[1, 5].tolist() == [127, 127, 127, 255]
    assert image[1, 3, 3] == 0  # the gap is transparent


def test_pointwise_convolutions_have_no_filters_to_show():
    assert pictures.first_filters(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Linear(8, 2))) is None


def test_feature_maps_show_the_first_a_middle_and_the_last_convolution():
    net = nn.Sequential(*[nn.Conv2d(1 if i == 0 else 20, 20, 3, padding=1) for i in range(5)])

    maps = pictures.feature_maps(net, torch.rand(1, 1, 12, 10))

    assert [m.layer for m in maps] == ["0", "2", "4"]
    assert [(m.channels, m.height, m.width) for m in maps] == [(20, 12, 10)] * 3
    columns, rows = 8, 2  # the 16 liveliest of 20
    assert opened(maps[0].picture).size == (columns * 48 - 1, rows * 57 - 1)


def test_feature_maps_leave_no_hooks_on_the_model():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3))

    pictures.feature_maps(net, torch.rand(1, 1, 9, 9))

    assert not any(module._forward_hooks for module in net.modules())  # noqa: SLF001  torch has no other way to ask


def test_a_model_without_convolutions_has_no_maps():
    assert pictures.feature_maps(nn.Flatten(), torch.rand(1, 1, 4, 4)) == []


@pytest.mark.parametrize("classes", [2, 1000])
def test_the_confusion_picture_has_a_pixel_per_pair(classes):
    confusion = np.zeros((classes, classes), np.int64)
    confusion[0, 0], confusion[0, 1], confusion[1, 1] = 9999, 1, 5

    uri = pictures.confusion_picture(confusion)
    picture = np.asarray(opened(uri))

    assert picture.shape == (classes, classes, 4)
    assert picture[0, 0, 3] > 250
    assert picture[0, 1, 3] >= 40  # one mistake among ten thousand images can be seen
    assert picture[1, 0, 3] == 0
    assert picture[0, 0, 2] > picture[0, 0, 0]  # blue is right
    assert picture[0, 1, 0] > picture[0, 1, 2]  # red is wrong
    assert len(uri) < 100_000
