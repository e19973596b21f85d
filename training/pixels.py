"""From cached pixels to what a model takes: uint8[N, H, W, C] to normalised float32[N, C, H, W]."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_CHUNK = 256


def unit_range(images: Tensor) -> Tensor:
    """uint8[N, H, W, C] to float32[N, C, H, W] in 0..1, without a copy for the change of axes (channels_last)."""
    return images.permute(0, 3, 1, 2).to(torch.float32).div_(255)


class Normaliser:
    """Subtracts the mean and divides by the standard deviation, per channel, in units where pixels are 0..1."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device | None = None) -> None:
        """Keeps its numbers on `device`; None is the CPU."""
        self.mean = tuple(mean)
        self.std = tuple(std)
        shape = (1, len(mean), 1, 1)
        self._scale = torch.tensor([1 / s for s in std], device=device).view(shape)
        self._shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device).view(shape)

    def on(self, device: torch.device) -> Normaliser:
        """The same on another device."""
        return Normaliser(self.mean, self.std, device)

    def __call__(self, images: Tensor) -> Tensor:
        """float32[N, C, H, W] in 0..1 to the same, normalised."""
        if self._scale.shape[1:] != images.shape[1:]:
            self._scale, self._shift = (_of_size(numbers, images) for numbers in (self._scale, self._shift))
        return torch.addcmul(self._shift, images, self._scale)


class ChannelSums:
    """Mean and standard deviation per channel of images that come piece by piece. Exact: sums are of integers."""

    def __init__(self, channels: int) -> None:
        self._total = np.zeros(channels)
        self._squares = np.zeros(channels)
        self._count = 0

    def add(self, images: NDArray[np.uint8]) -> None:
        """Adds uint8[..., C]."""
        values = images.reshape(-1, images.shape[-1]).astype(np.uint32)
        self._total += values.sum(0, dtype=np.uint64)
        self._squares += np.square(values).sum(0, dtype=np.uint64)
        self._count += len(values)

    def moments(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation, where pixels are 0..1; the latter at least 1/255, so that it can be divided by."""
        mean = self._total / max(1, self._count)
        std = np.sqrt(np.maximum(self._squares / max(1, self._count) - mean**2, 1.0))
        return _rounded(mean / 255), _rounded(std / 255)


def channel_statistics(
    images: NDArray[np.uint8], indices: NDArray[np.int64]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel over `images[indices]`, uint8[N, H, W, C], where pixels are 0..1."""
    sums = ChannelSums(images.shape[-1])
    for at in range(0, len(indices), _CHUNK):
        sums.add(images[indices[at : at + _CHUNK]])
    return sums.moments()


def _of_size(numbers: Tensor, images: Tensor) -> Tensor:
    """The channels' numbers for every pixel of an image: with three at a time the CPU cannot use its vector units."""
    whole = numbers[:, :, :1, :1].expand(1, *images.shape[1:])
    return whole.contiguous(memory_format=torch.channels_last)


def _rounded(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(round(float(value), 6) for value in values)
