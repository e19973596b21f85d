"""A picture of what augmentation does: a row per image, the original first, then as training would see it."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional

from service.errors import ConfigurationError, DataError
from training.augment import Augmenter
from training.config import Experiment
from training.data import list_images
from training.draws import draws
from training.mix import Mixer
from training.models import describe
from training.pixels import unit_range
from training.prepare import input_spec, train_spec
from training.read import count_channels, read_one
from training.seeds import Purpose, derive
from training.shards import is_sharded

_GAP = 2
_SMALLEST = 64  # pixels; smaller images are enlarged by a whole factor


def write_preview(experiment: Experiment, source: Path, output: Path, *, rows: int, columns: int) -> int:
    """Writes the grid as a picture; returns the number of rows.

    Mixup and CutMix, which need two images, mix the images of the grid.

    Raises:
        DataError: the images cannot be used.
        ConfigurationError: the picture cannot be written.
    """
    images = _sample(experiment, source, rows)
    augment, mix = Augmenter(experiment.augment), Mixer(experiment.augment, experiment.loop.seed)
    labels = torch.zeros(len(images), dtype=torch.int64)
    grid = [unit_range(images)]
    for epoch in range(columns - 1):
        uniform = draws(len(images), experiment.loop.seed, epoch)
        grid.append(mix(augment(images, uniform), labels, epoch).inputs)
    try:
        Image.fromarray(_tile(torch.stack(grid, dim=1))).save(output)
    except OSError as error:
        raise ConfigurationError(f"{output} cannot be written: {error.strerror or error}; choose another") from error
    except ValueError as error:  # of its ending
        raise ConfigurationError(f"{output} cannot be written: {error}; choose a .png file") from error
    return len(images)


def _sample(experiment: Experiment, source: Path, count: int) -> torch.Tensor:
    """uint8[N, H, W, C]: usable images, chosen by the seed."""
    if is_sharded(source):
        raise DataError(f"{source} holds tar shards, which cannot be previewed; unpack one of them into class folders")
    listing = list_images(source)
    spec = input_spec(
        experiment.input,
        describe(experiment.model.name),
        experiment.input.channels or count_channels(listing),
        experiment.model.options,
    )
    spec = train_spec(experiment.input, spec) or spec
    random = np.random.default_rng(derive(experiment.loop.seed, Purpose.ORDER))
    shuffled = (read_one(listing.file(int(row)), spec) for row in random.permutation(len(listing)))
    chosen = list(islice((image for image in shuffled if image is not None), count))
    if not chosen:
        raise DataError(f"none of the images of {source} can be used")
    return torch.from_numpy(np.stack(chosen))


def _tile(grid: torch.Tensor) -> NDArray[np.uint8]:
    """float32[rows, columns, C, H, W] in 0..1 to one uint8[height, width, 3]."""
    rows, columns, channels, height, width = grid.shape
    factor = max(1, -(-_SMALLEST // min(height, width)))
    flat = functional.interpolate(grid.flatten(0, 1), scale_factor=factor)
    flat = functional.pad(flat.expand(-1, 3, -1, -1) if channels == 1 else flat, (0, _GAP, 0, _GAP), value=1.0)
    tiles = flat.view(rows, columns, 3, *flat.shape[2:]).permute(0, 3, 1, 4, 2)
    picture = (tiles.reshape(rows * flat.shape[2], columns * flat.shape[3], 3) * 255).round().to(torch.uint8)
    return np.ascontiguousarray(picture.numpy())
