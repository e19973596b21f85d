"""Random changes of training images, whole batches at a time.

Every draw comes from a matrix of uniform numbers with one row per image (`draws`), made by an explicit generator from
the seed and the epoch. So an image's fate depends neither on its batch nor on the process that handles it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from training.config import AugmentConfig
from training.seeds import Purpose, generator

_COLUMNS = 6  # angle, horizontal and vertical shift, scale, horizontal and vertical flip


def draws(count: int, seed: int, epoch: int) -> Tensor:
    """float32[count, D] uniform in 0..1: row i is for training image i in this epoch."""
    return torch.rand((count, _COLUMNS), generator=generator(seed, Purpose.AUGMENT, epoch))


class Augmenter:
    """Rotation, translation, scale and flips as one affine map, sampled once (bilinear)."""

    def __init__(self, config: AugmentConfig) -> None:
        self._config = config
        moves = config.rotation_degrees or config.translation or config.scale
        self._identity = not (moves or config.horizontal_flip or config.vertical_flip)

    def __call__(self, images: Tensor, uniform: Tensor) -> Tensor:
        """Changes float32[N, C, H, W] in 0..1 by float32[N, D] draws; returns a new tensor of the same shape."""
        if self._identity:
            return images
        grid = functional.affine_grid(self.matrices(uniform, images.shape), list(images.shape), align_corners=False)
        return functional.grid_sample(images, grid, padding_mode=self._config.fill, align_corners=False)

    def matrices(self, uniform: Tensor, shape: torch.Size) -> Tensor:
        """float32[N, 2, 3]: where each output pixel is fetched from, in coordinates that run from -1 to 1."""
        config = self._config
        signed = uniform * 2 - 1
        angle = signed[:, 0] * math.radians(config.rotation_degrees)
        shift_x, shift_y = signed[:, 1] * (2 * config.translation), signed[:, 2] * (2 * config.translation)
        # Larger by s means fetched from a field smaller by s; the exponent makes both directions equally likely.
        field = torch.exp(-signed[:, 3] * math.log1p(config.scale))
        flip_x = _flip(uniform[:, 4], config.horizontal_flip)
        flip_y = _flip(uniform[:, 5], config.vertical_flip)
        cos, sin = field * angle.cos(), field * angle.sin()
        aspect = shape[-2] / shape[-1]  # so that a turned square stays a square in images that are none
        row_x = torch.stack([cos * flip_x, -sin * flip_y * aspect, shift_x], dim=1)
        row_y = torch.stack([sin * flip_x / aspect, cos * flip_y, shift_y], dim=1)
        return torch.stack([row_x, row_y], dim=1)


def _flip(uniform: Tensor, enabled: bool) -> Tensor:
    return 1 - 2 * uniform.round() if enabled else torch.ones_like(uniform)
