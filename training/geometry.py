"""Where the pixels of an augmented image come from: one affine map per image, or whole-pixel moves without any blur."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from training.config import AugmentConfig
from training.draws import Column, between, coin, signed
from training.trivial import geometric_operations


class Geometry:
    """Rotation, translation, scale, shear, crops and flips, composed and sampled once."""

    def __init__(self, config: AugmentConfig) -> None:
        self._config = config
        self.resamples = bool(
            config.rotation_degrees
            or config.translation
            or config.scale
            or config.crop_area < 1
            or config.trivial_augment
        )
        self.moves = bool(config.crop_padding or config.horizontal_flip or config.vertical_flip)

    def gather(self, images: Tensor, uniform: Tensor) -> Tensor:
        """Flips and whole-pixel shifts of uint8[N, H, W, C]: exact, each pixel copied once."""
        count, height, width, channels = images.shape
        rows = self._fetched(uniform, height, Column.CROP_Y, self._flipped(uniform, vertical=True))
        columns = self._fetched(uniform, width, Column.CROP_X, self._flipped(uniform, vertical=False))
        padding, fill = self._config.crop_padding, self._config.fill
        if fill == "zeros":
            images = functional.pad(images, (0, 0, padding, padding, padding, padding))
            rows, columns = rows + padding, columns + padding
        else:
            rows, columns = _fold(rows, height, fill), _fold(columns, width, fill)
        first = torch.arange(count, device=images.device)[:, None] * images.shape[1]
        pixels = ((first + rows) * images.shape[2])[:, :, None] + columns[:, None, :]
        return images.reshape(-1, channels).index_select(0, pixels.flatten()).view(count, height, width, channels)

    def resample(self, images: Tensor, uniform: Tensor) -> Tensor:
        """Bilinear sampling of float32[N, C, H, W] under `matrices`."""
        grid = functional.affine_grid(self.matrices(uniform, images.shape), list(images.shape), align_corners=False)
        return functional.grid_sample(images, grid, padding_mode=self._config.fill, align_corners=False)

    def matrices(self, uniform: Tensor, shape: torch.Size) -> Tensor:
        """float32[N, 2, 3]: where each output pixel is fetched from, in coordinates that run from -1 to 1."""
        config = self._config
        height, width = shape[-2:]
        angle = signed(uniform, Column.ANGLE) * math.radians(config.rotation_degrees)
        field_x, field_y, shift_x, shift_y = self._field(uniform, height, width)
        flip_x = 1 - 2 * self._flipped(uniform, vertical=False).float()
        flip_y = 1 - 2 * self._flipped(uniform, vertical=True).float()
        cos, sin = angle.cos(), angle.sin()
        aspect = height / width  # so that a turned square stays a square in images that are none
        row_x = torch.stack([cos * field_x * flip_x, -sin * field_y * flip_y * aspect, shift_x], dim=1)
        row_y = torch.stack([sin * field_x * flip_x / aspect, cos * field_y * flip_y, shift_y], dim=1)
        matrix = torch.stack([row_x, row_y], dim=1)
        return _compose(matrix, geometric_operations(uniform, aspect)) if config.trivial_augment else matrix

    def _field(self, uniform: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Half sides and centre of the rectangle that is fetched."""
        config = self._config
        # Larger by s means fetched from a field smaller by s; the exponent makes both directions equally likely.
        field = torch.exp(-signed(uniform, Column.SCALE) * math.log1p(config.scale))
        area = between(uniform, Column.AREA, config.crop_area, 1.0).sqrt()
        stretch = torch.exp(signed(uniform, Column.ASPECT) * math.log(4 / 3) / 2) if config.crop_area < 1 else 1.0
        crop_x, crop_y = (area * stretch).clamp(max=1), (area / stretch).clamp(max=1)
        shift_x = signed(uniform, Column.SHIFT_X) * (2 * config.translation)
        shift_y = signed(uniform, Column.SHIFT_Y) * (2 * config.translation)
        shift_x = shift_x + self._pixels(uniform, Column.CROP_X) * (2 / width)
        shift_y = shift_y + self._pixels(uniform, Column.CROP_Y) * (2 / height)
        if config.crop_area < 1:  # the crop lies anywhere inside of the image
            shift_x = shift_x + signed(uniform, Column.CROP_X) * (1 - crop_x)
            shift_y = shift_y + signed(uniform, Column.CROP_Y) * (1 - crop_y)
        return field * crop_x, field * crop_y, shift_x, shift_y

    def _fetched(self, uniform: Tensor, size: int, shift: Column, flipped: Tensor) -> Tensor:
        """int64[N, size]: the row, or column, that each of the output is fetched from; some lie outside."""
        places = torch.arange(size, device=uniform.device)
        return torch.where(flipped[:, None], places.flip(0), places) + self._pixels(uniform, shift)[:, None]

    def _pixels(self, uniform: Tensor, column: Column) -> Tensor:
        """int64[N]: whole pixels in -padding..padding, all equally likely."""
        padding = self._config.crop_padding
        return (uniform[:, column] * (2 * padding + 1)).floor().long() - padding

    def _flipped(self, uniform: Tensor, *, vertical: bool) -> Tensor:
        enabled = self._config.vertical_flip if vertical else self._config.horizontal_flip
        drawn = coin(uniform, Column.FLIP_Y if vertical else Column.FLIP_X)
        return drawn if enabled else torch.zeros_like(drawn)


def _fold(index: Tensor, size: int, fill: str) -> Tensor:
    """Brings outside indices in: to the border, or mirrored about the edge as `grid_sample` does it."""
    if fill == "reflection":
        index = index.remainder(2 * size)
        return torch.where(index < size, index, 2 * size - 1 - index)
    return index.clamp(0, size - 1)


def _compose(first: Tensor, then: Tensor) -> Tensor:
    """Affine maps float32[N, 2, 3]: `then` is applied to the output coordinates, `first` to its result."""
    linear = first[:, :, :2] @ then[:, :, :2]
    shift = first[:, :, :2] @ then[:, :, 2:] + first[:, :, 2:]
    return torch.cat([linear, shift], dim=2)
