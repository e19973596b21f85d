import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional


@pytest.fixture(scope="session")
def digits():
    """16 real digits: gray float32[16, 1, 8, 8] in -1..1 and their labels."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images[:16], dtype=torch.float32).reshape(-1, 1, 8, 8)
    return pixels / 8 - 1, torch.tensor(labels[:16])


@pytest.fixture(scope="session")
def digits_at(digits):
    """The digits in any size and number of channels."""

    def scale(size, channels):
        pixels, labels = digits
        return functional.interpolate(pixels, (size, size), mode="bilinear").expand(-1, channels, -1, -1), labels

    return scale
