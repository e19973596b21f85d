import pytest
from PIL import Image
from repositories import filled
from sklearn.datasets import load_sample_images


@pytest.fixture
def root(tmp_path):
    return filled(tmp_path)


@pytest.fixture(scope="module")
def photos():
    """Two real photos, 640x427."""
    return [Image.fromarray(pixels) for pixels in load_sample_images().images]
