"""Mixing pairs of images: mixup (Zhang et al., arXiv:1710.09412) and CutMix (Yun et al., arXiv:1905.04899)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.config import AugmentConfig
from training.seeds import Purpose, derive


@dataclass(frozen=True)
class Mixed:
    """A batch, perhaps of pairs.

    `inputs`: float32[N, C, H, W]. `labels`, `partners`: int64[N]; `partners` is None if nothing was mixed. `share`: of
    `labels` in the target, 0..1; that of `partners` is the rest.
    """

    inputs: Tensor
    labels: Tensor
    partners: Tensor | None = None
    share: float = 1.0


class Mixer:
    """Mixes each image with its neighbour in the batch, by one draw per step; with both enabled, either at random."""

    def __init__(self, config: AugmentConfig, seed: int) -> None:
        self._mixup = config.mixup
        self._cutmix = config.cutmix
        self._seed = seed

    def __call__(self, inputs: Tensor, labels: Tensor, step: int) -> Mixed:
        """Mixes float32[N, C, H, W] and int64[N] as step `step` wants it."""
        kinds = [kind for kind, alpha in ((self._mix, self._mixup), (self._cut, self._cutmix)) if alpha]
        if not kinds or len(labels) < 2:  # noqa: PLR2004 - a pair
            return Mixed(inputs, labels)
        random = np.random.default_rng(derive(self._seed, Purpose.MIX, step))
        return kinds[random.integers(len(kinds))](inputs, labels, random)

    def _mix(self, inputs: Tensor, labels: Tensor, random: np.random.Generator) -> Mixed:
        share = float(random.beta(self._mixup, self._mixup))
        return Mixed(torch.lerp(inputs.roll(1, 0), inputs, share), labels, labels.roll(1, 0), share)

    def _cut(self, inputs: Tensor, labels: Tensor, random: np.random.Generator) -> Mixed:
        height, width = inputs.shape[2:]
        side = np.sqrt(1 - random.beta(self._cutmix, self._cutmix))
        top, bottom = _span(int(random.integers(height)), height * side, height)
        left, right = _span(int(random.integers(width)), width * side, width)
        mixed = inputs.clone()
        mixed[:, :, top:bottom, left:right] = inputs.roll(1, 0)[:, :, top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)  # the box may have been cut at the border
        return Mixed(mixed, labels, labels.roll(1, 0), share)


def _span(centre: int, length: float, limit: int) -> tuple[int, int]:
    half = length / 2
    return max(0, round(centre - half)), min(limit, round(centre + half))
