"""The random numbers of augmentation: a row of uniform ones per image and epoch, a column per decision."""

from __future__ import annotations

import enum

import torch
from torch import Tensor

from training.seeds import Purpose, generator


class Column(enum.IntEnum):
    """Which decision a number is for. A new one goes to the end, so that old seeds keep their meaning."""

    ANGLE = 0
    SHIFT_X = 1
    SHIFT_Y = 2
    SCALE = 3
    FLIP_X = 4
    FLIP_Y = 5
    CROP_X = 6
    CROP_Y = 7
    AREA = 8
    ASPECT = 9
    BRIGHTNESS = 10
    CONTRAST = 11
    SATURATION = 12
    OPERATION = 13
    MAGNITUDE = 14
    DIRECTION = 15
    ERASE = 16
    ERASED_AREA = 17
    ERASED_ASPECT = 18
    ERASED_X = 19
    ERASED_Y = 20


def draws(count: int, seed: int, epoch: int, first: int = 0) -> Tensor:
    """float32[count, D] in 0..1: row i is for training image i in this epoch.

    `first` selects another stream, for sources that draw for one shard at a time.
    """
    return torch.rand((count, len(Column)), generator=generator(seed, Purpose.AUGMENT, epoch, first))


def signed(uniform: Tensor, column: Column) -> Tensor:
    """float32[N] in -1..1."""
    return uniform[:, column] * 2 - 1


def between(uniform: Tensor, column: Column, low: float, high: float) -> Tensor:
    """float32[N] in low..high."""
    return low + uniform[:, column] * (high - low)


def coin(uniform: Tensor, column: Column) -> Tensor:
    """bool[N], each with probability one half."""
    return uniform[:, column] < 0.5  # noqa: PLR2004 - one half
