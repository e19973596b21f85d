"""`convoy train PHOTOS --weights FILE`, with a file as torchvision publishes them: 1000 classes, a hash in its name."""

import hashlib

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from sklearn.datasets import load_sample_images

from service import artifact
from service.errors import TrainingError
from training.cli import train
from training.models import create

WIDTH = 0.125
QUICK = ["--image-size", "32", "--precision", "float32", "--threads", "1", "--epochs", "2", "--batch-size", "8"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes of 20: pieces of two real photos."""
    folder = tmp_path_factory.mktemp("photo-folder") / "photos"
    for name, pixels in zip(("china", "flower"), load_sample_images().images, strict=True):
        (folder / name).mkdir(parents=True)
        for number in range(20):
            left, top = 120 * (number % 5), 100 * (number // 5)
            piece = pixels[top : top + 100, left : left + 120]
            Image.fromarray(piece).save(folder / name / f"{number:02d}.jpg", quality=90)
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A narrow resnet18-xxxxxxxx.pth."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "new.pth"
    model, digest = create("resnet18", 1000, 3, width=WIDTH), "0"
    while digest[:8].isdecimal():  # digits alone would be taken for a date
        model.fc.bias.data += 1
        torch.save(model.state_dict(), path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return path.rename(path.with_name(f"resnet18-{digest[:8]}.pth")), digest


def command(photos, weights, folder):
    where = ["--repository", str(folder / "models"), "--runs", str(folder / "runs")]
    model = ["--model", "resnet18", "--set", f"model.options.width={WIDTH}"]
    return [str(photos), *where, *model, "--weights", str(weights), *QUICK]


def test_a_published_file_becomes_a_model_version_that_names_it(photos, published, tmp_path):
    weights, digest = published

    result = CliRunner().invoke(train, command(photos, weights, tmp_path), catch_exceptions=False)

    assert result.exit_code == 0
    assert f"resnet18 from {weights.name}" in result.output
    manifest = artifact.load(tmp_path / "models" / "photos" / "1").manifest
    assert manifest.classes == ("china", "flower")
    assert manifest.weights.source == f"lp-ft from {weights.name}, SHA-256 {digest}"
    assert manifest.recipe["transfer"]["strategy"] == "lp-ft"


def test_a_damaged_file_is_refused_before_anything_is_written(photos, published, tmp_path):
    content = bytearray(published[0].read_bytes())
    content[len(content) // 2] ^= 1
    damaged = tmp_path / published[0].name
    damaged.write_bytes(content)

    result = CliRunner().invoke(train, command(photos, damaged, tmp_path))

    assert isinstance(result.exception, TrainingError)
    assert f"{damaged} is damaged or was changed" in str(result.exception)
    assert not (tmp_path / "models" / "photos").exists()
