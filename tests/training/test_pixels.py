import numpy as np
import torch

from training.pixels import Normaliser, channel_statistics, unit_range


def test_statistics_are_those_of_the_chosen_rows():
    images = np.random.default_rng(0).integers(0, 256, (700, 5, 4, 3), dtype=np.uint8)
    rows = np.arange(0, 700, 2)
    mean, std = channel_statistics(images, rows)
    np.testing.assert_allclose(mean, (images[rows] / 255).mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(std, (images[rows] / 255).std((0, 1, 2)), atol=1e-6)


def test_a_constant_channel_can_be_normalised():
    _, std = channel_statistics(np.full((4, 2, 2, 1), 7, dtype=np.uint8), np.arange(4))
    assert std == (round(1 / 255, 6),)


def test_normalises_per_channel():
    images = torch.rand(2, 3, 4, 4)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    result = Normaliser(mean, std)(images)
    expected = (images - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    torch.testing.assert_close(result, expected)


def test_unit_range_is_channels_last_without_touching_its_input():
    images = torch.randint(0, 256, (2, 4, 5, 3), dtype=torch.uint8)
    before = images.clone()
    result = unit_range(images)
    assert result.shape == (2, 3, 4, 5)
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(result[1, 2, 3, 4], images[1, 3, 4, 2] / 255)
    assert torch.equal(images, before)
