"""Random changes of training images, whole batches at a time.

Every decision is a number of the batch's `uniform` matrix (`training.draws`): nothing is drawn here, so an image's fate
depends neither on its batch nor on the process that handles it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from training import colour
from training.config import AugmentConfig
from training.draws import Column, between, signed
from training.geometry import Geometry
from training.pixels import unit_range
from training.trivial import photometric_operations

_ERASED_AREA = (0.02, 1 / 3)
_ERASED_ASPECT = 3.3


class Augmenter:
    """Geometry, then colour, then erasing."""

    def __init__(self, config: AugmentConfig) -> None:
        self._config = config
        self._geometry = Geometry(config)

    def __call__(self, images: Tensor, uniform: Tensor) -> Tensor:
        """uint8[N, H, W, C] and float32[N, D] in 0..1 to changed float32[N, C, H, W] in 0..1."""
        if self._geometry.resamples:
            floating = self._geometry.resample(unit_range(images), uniform)
        else:
            floating = unit_range(self._geometry.gather(images, uniform) if self._geometry.moves else images)
        return self._erase(self._colour(floating, uniform), uniform)

    def _colour(self, images: Tensor, uniform: Tensor) -> Tensor:
        config = self._config
        changes = (
            (colour.brightness, Column.BRIGHTNESS, config.brightness),
            (colour.contrast, Column.CONTRAST, config.contrast),
            (colour.saturation, Column.SATURATION, config.saturation),
        )
        for change, column, strength in changes:
            if strength:
                images = change(images, 1 + strength * signed(uniform, column))
        return photometric_operations(images, uniform) if config.trivial_augment else images

    def _erase(self, images: Tensor, uniform: Tensor) -> Tensor:
        """Random erasing (Zhong et al., arXiv:1708.04896): a rectangle becomes the image's mean colour."""
        if not self._config.erasing:
            return images
        height, width = images.shape[2:]
        area = between(uniform, Column.ERASED_AREA, *_ERASED_AREA)
        stretch = torch.exp(signed(uniform, Column.ERASED_ASPECT) * math.log(_ERASED_ASPECT) / 2)
        rows = _span(height, area.sqrt() * stretch, uniform[:, Column.ERASED_Y])
        columns = _span(width, area.sqrt() / stretch, uniform[:, Column.ERASED_X])
        chosen = uniform[:, Column.ERASE] < self._config.erasing
        mask = (rows[:, :, None] & columns[:, None, :] & chosen[:, None, None])[:, None]
        return torch.where(mask, images.mean((2, 3), keepdim=True), images)


def _span(size: int, fraction: Tensor, place: Tensor) -> Tensor:
    """bool[N, size]: a run of `fraction` of the side, at `place` (0: at the start, 1: at the end)."""
    length = (fraction.clamp(max=1) * size).round()
    start = (place * (size - length + 1)).floor().clamp(max=size - 1)
    position = torch.arange(size, device=fraction.device)[None, :]
    return (position >= start[:, None]) & (position < (start + length)[:, None])
