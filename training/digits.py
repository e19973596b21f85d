"""Real data that comes with the installation: scikit-learn's handwritten digits, as a folder of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

# Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI (1998), CC BY 4.0.

_BRIGHTEST = 16


def write_digits(folder: Path) -> int:
    """Writes `<folder>/<digit>/<number>.png`: 8x8 pixels, one channel, 0..16 stretched to 0..255.

    Existing files are overwritten with the same content.

    Returns:
        The number of images.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * (255 / _BRIGHTEST)).round().astype(np.uint8)
    for label in np.unique(digits.target):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
    for number, (image, label) in enumerate(zip(pixels, digits.target, strict=True)):
        Image.fromarray(image).save(folder / str(label) / f"{number:04d}.png")
    return len(pixels)
