"""TrivialAugment, wide: one operation per image with one random strength, nothing to tune.

Müller and Hutter, arXiv:2103.10158. The geometric operations become part of the batch's affine maps, the others run on
the images that drew them. Translation is up to a seventh of the side, which is 32 of 224 pixels; images are sheared
about their corner and turned about their centre.
"""

from __future__ import annotations

import enum
import math

import torch
from torch import Tensor

from training import colour
from training.draws import Column, between, coin

_STRENGTH = 0.99
_TRANSLATION = 1 / 7
_DEGREES = 135.0


class Operation(enum.IntEnum):
    """What can happen to an image."""

    IDENTITY = 0
    SHEAR_X = 1
    SHEAR_Y = 2
    TRANSLATE_X = 3
    TRANSLATE_Y = 4
    ROTATE = 5
    BRIGHTNESS = 6
    SATURATION = 7
    CONTRAST = 8
    SHARPNESS = 9
    POSTERIZE = 10
    SOLARIZE = 11
    AUTOCONTRAST = 12
    EQUALIZE = 13


def operations(uniform: Tensor) -> Tensor:
    """int64[N]: the operation that each image has drawn."""
    return (uniform[:, Column.OPERATION] * len(Operation)).long()


def geometric_operations(uniform: Tensor, aspect: float) -> Tensor:
    """float32[N, 2, 3] affine maps; the identity for images that drew something else. `aspect`: height over width."""
    drawn = operations(uniform)
    strength = _signed_strength(uniform)

    def of(operation: Operation, most: float) -> Tensor:
        return torch.where(drawn == operation, strength * most, 0.0)

    angle = of(Operation.ROTATE, math.radians(_DEGREES) / _STRENGTH)
    shear_x, shear_y = of(Operation.SHEAR_X, 1.0), of(Operation.SHEAR_Y, 1.0)
    shift_x = of(Operation.TRANSLATE_X, 2 * _TRANSLATION / _STRENGTH)
    shift_y = of(Operation.TRANSLATE_Y, 2 * _TRANSLATION / _STRENGTH)
    row_x = torch.stack([angle.cos(), (shear_x - angle.sin()) * aspect, shift_x + shear_x * aspect], dim=1)
    row_y = torch.stack([(shear_y + angle.sin()) / aspect, angle.cos(), shift_y + shear_y / aspect], dim=1)
    return torch.stack([row_x, row_y], dim=1)


def photometric_operations(images: Tensor, uniform: Tensor) -> Tensor:
    """Changes those of float32[N, C, H, W] in 0..1 that drew an operation on values."""
    drawn = operations(uniform)
    changed = images.clone()
    for operation in range(Operation.BRIGHTNESS, len(Operation)):
        chosen = (drawn == operation).nonzero().flatten()
        if len(chosen):
            changed[chosen] = _apply(Operation(operation), images[chosen], uniform[chosen])
    return changed


def _apply(operation: Operation, images: Tensor, uniform: Tensor) -> Tensor:
    magnitude = uniform[:, Column.MAGNITUDE]
    if operation is Operation.AUTOCONTRAST:
        return colour.autocontrast(images)
    if operation is Operation.EQUALIZE:
        return colour.equalize(images)
    if operation is Operation.POSTERIZE:
        return colour.posterize(images, 8 - (magnitude * 6).round())
    if operation is Operation.SOLARIZE:
        return colour.solarize(images, 1 - magnitude)
    blend = {
        Operation.BRIGHTNESS: colour.brightness,
        Operation.SATURATION: colour.saturation,
        Operation.CONTRAST: colour.contrast,
        Operation.SHARPNESS: colour.sharpness,
    }[operation]
    return blend(images, 1 + _signed_strength(uniform))


def _signed_strength(uniform: Tensor) -> Tensor:
    strength = between(uniform, Column.MAGNITUDE, 0.0, _STRENGTH)
    return torch.where(coin(uniform, Column.DIRECTION), -strength, strength)
