import numpy as np
import pytest
import torch
from PIL import Image
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


@pytest.fixture(scope="session")
def digit_files(digits, tmp_path_factory):
    """The digits as PNG files in a colour, so that channels cannot be mixed up unseen."""
    folder = tmp_path_factory.mktemp("digit-files")
    gray = (digits[0][:, 0].numpy() + 1) / 2  # [16, 8, 8] in 0..1
    pixels = (gray[..., None] * np.array([255.0, 140.0, 60.0])).round().astype(np.uint8)  # [16, 8, 8, 3]
    files = [folder / f"{number:02d}.png" for number in range(len(pixels))]
    for file, image in zip(files, pixels, strict=True):
        Image.fromarray(image).save(file)
    return files
