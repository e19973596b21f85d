import pytest
from foreign_models import CLASSES

from training.conventions import Request


@pytest.fixture
def labels(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("\n".join(CLASSES) + "\n")
    return path


@pytest.fixture
def request_for(tmp_path, labels):
    def build(**changes):
        fields = {"model": tmp_path / "net.onnx", "labels": labels, "name": "imported", "resize": "stretch"}
        return Request(**{**fields, **changes})

    return build


@pytest.fixture
def repository(tmp_path):
    return tmp_path / "repository"
