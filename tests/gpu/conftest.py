"""Everything here runs on an NVIDIA GPU, and skips without one: no test here stands in for any that needs none."""

import digits
import pytest

from service import cuda, sessions
from service.providers import CUDA


@pytest.fixture(autouse=True)
def on_gpu():
    """Skips without a GPU; with one, CUDA that does not come up is a failure."""
    if not cuda.visible():
        pytest.skip("the NVIDIA driver shows no GPU to this process")
    assert sessions.missing(CUDA) == ""


@pytest.fixture(scope="session")
def digit_folder(tmp_path_factory):
    """300 of scikit-learn's digits as PNG files of 8x8, a folder per class."""
    return digits.digit_folder(tmp_path_factory.mktemp("digit-folder") / "digits")
