"""scikit-learn's real digits as files."""

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def digit_folder(folder, count=300):
    """The first digits as PNG files of 8x8, a folder per class."""
    images, labels = load_digits(return_X_y=True)
    for number in range(count):
        target = folder / str(labels[number])
        target.mkdir(parents=True, exist_ok=True)
        pixels = (images[number].reshape(8, 8) * (255 / 16)).round().astype(np.uint8)
        Image.fromarray(pixels).save(target / f"{number:04d}.png")
    return folder
