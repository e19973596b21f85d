from pathlib import Path

import digits
import numpy as np
import pytest
import runs
import torch
from PIL import Image
from sklearn.datasets import load_digits
from tar_shards import numbered, write_shard
from torch import nn

from service.artifact import InputSpec, Weights
from training.config import Experiment
from training.listing import Listing
from training.pixels import Normaliser, channel_statistics
from training.prepared import Prepared
from training.read import Dataset
from training.run import run
from training.split import Split
from training.trained import Trained

DIGITS = InputSpec(height=8, width=8, channels=1)
MEAN, STD = 0.3, 0.4


def small_net(channels=1, classes=10):
    """A padded convolution, batch normalisation, dropout and pooling: all that an export can get wrong."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(512, classes),
    )


def fitted(net, pixels, labels, epochs=6):
    x = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD
    y = torch.from_numpy(labels)
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for rows in torch.randperm(len(y), generator=generator).split(64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(net.train()(x[rows]), y[rows]).backward()
            optimiser.step()
    return net


@pytest.fixture(scope="session")
def digits_trained(tmp_path_factory):
    """A small network trained for a second on scikit-learn's real digits, as training hands it to export."""
    images, labels = load_digits(return_X_y=True)
    pixels = (images.reshape(-1, 8, 8, 1) * 255 / 16).astype(np.uint8)
    labels = labels.astype(np.int64)
    folder = tmp_path_factory.mktemp("digits")
    paths = []
    for index, image in enumerate(pixels[:200]):
        paths.append(folder / f"{labels[index]}-{index}.png")
        Image.fromarray(image[:, :, 0]).save(paths[-1])
    torch.manual_seed(0)
    return Trained(
        model=fitted(small_net(), pixels[200:], labels[200:]),
        name="digits",
        architecture="small-net",
        classes=tuple(f"digit {n}" for n in range(10)),
        input=DIGITS,
        mean=(MEAN,),
        std=(STD,),
        temperature=1.3,
        metrics={"accuracy": 0.97},
        data={
            "sha256": "0f" * 32,
            "images": {"train": 1597, "validation": 0, "test": 200},
            "per_class": {f"digit {n}": 175 + n for n in range(10)},
            "split_seed": 0,
        },
        recipe={"epochs": 6, "optimiser": "adam"},
        weights=Weights(source="trained from scratch", licence="CC0-1.0"),
        canary=paths[:4],
        calibration=pixels[200:400],
        holdout=pixels[:200],
        holdout_labels=labels[:200],
        history=[
            {"epoch": e, "train_loss": 1 / e, "val_loss": 1.1 / e, "val_accuracy": 1 - 0.5 / e} for e in (1, 2, 3)
        ],
        holdout_paths=paths,
    )


@pytest.fixture(scope="session")
def digit_folder(tmp_path_factory):
    """300 of scikit-learn's digits as PNG files of 8x8, a folder per class."""
    return digits.digit_folder(tmp_path_factory.mktemp("digit-folder") / "digits")


@pytest.fixture(scope="session")
def digit_data():
    """The same 300 digits, decoded to 16x16 and split 240, 30, 30, as training prepares them."""
    images, labels = load_digits(return_X_y=True)
    pixels = (images[:300].reshape(-1, 8, 8, 1) * (255 / 16)).round().astype(np.uint8)
    pixels = pixels.repeat(2, axis=1).repeat(2, axis=2)
    labels = labels[:300].astype(np.int64)
    listing = Listing(
        root=Path("digits"),
        paths=tuple(f"{label}/{number}.png" for number, label in enumerate(labels)),
        labels=labels,
        classes=tuple(map(str, range(10))),
        splits=np.full(300, -1, dtype=np.int8),
    )
    digests = np.arange(300 * 16, dtype=np.int64).astype(np.uint8).reshape(300, 16)
    split = Split(train=np.arange(240), validation=np.arange(240, 270), test=np.arange(270, 300))
    dataset = Dataset(listing, pixels, digests, np.arange(300))
    spec = InputSpec(height=16, width=16, channels=1)
    return Prepared(dataset, split, spec, Normaliser(*channel_statistics(pixels, split.train)), ())


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Small operators on shared cores are fastest, and repeatable, on one thread."""
    torch.set_num_threads(1)


@pytest.fixture
def shards(tmp_path):
    """Three training shards of 40, 30 and 20 samples with labels 0..2."""
    for number, (first, count) in enumerate(((0, 40), (40, 30), (70, 20))):
        write_shard(tmp_path / "shards" / f"train-{number:03d}.tar", numbered(count, first))
    return tmp_path / "shards"


@pytest.fixture(scope="session")
def finished(digit_folder, tmp_path_factory):
    """The run of `runs.TREE`, and what it has told."""
    folder = tmp_path_factory.mktemp("finished")
    shown = runs.display()
    result = run(Experiment.model_validate(runs.TREE), digit_folder, folder / "models", folder / "runs", shown)
    return result, shown.console.file.getvalue()
