"""Pictures of the model card as data URIs: thumbnails, filters, feature maps, a large confusion matrix."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

_THUMBNAIL_PX = 160
_SMALL_PX = 64  # below, PNG keeps every pixel; above, JPEG is a tenth of the size
_MAX_FILTERS = 64
_MAX_MAPS = 16
_COLUMNS = 8
_MAP_PX = 56
_GAP_PX = 1
MOST_CELLS = 320  # of the confusion matrix to a side: of more, a page 640 pixels wide would drop some, or be too fine
# Anchors of the viridis colour map (Smith and van der Walt, 2015): even steps in brightness, safe for the colour-blind.
_VIRIDIS = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], np.float64)
_RIGHT_COLOUR, _WRONG_COLOUR = (38, 110, 214), (214, 62, 44)


@dataclass(frozen=True)
class LayerMaps:
    """What one layer answers to one image: its name in the model, its shape, and a grid of its maps as a data URI."""

    layer: str
    channels: int
    height: int
    width: int
    picture: str


def thumbnail(pixels: NDArray[np.uint8]) -> str:
    """A data URI of uint8[H, W, C]: as it is if it is small, else scaled to fit 160 x 160."""
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    if max(image.size) <= _SMALL_PX:
        return _data_uri(image, "PNG")
    image.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX), Image.Resampling.LANCZOS)
    return _data_uri(image, "JPEG")


def first_filters(model: nn.Module) -> str | None:
    """The kernels of the first convolution, up to 64, as a grid; None if the model has none.

    Three input channels are shown as colours, around grey for zero; others as their mean.
    """
    first = next(iter(_convolutions(model)), None)
    if first is None:
        return None
    weights = first.weight.detach().float().cpu().numpy()[:_MAX_FILTERS]
    if weights.shape[1] != 3:  # noqa: PLR2004  red, green, blue
        weights = weights.mean(axis=1, keepdims=True)
    largest = np.abs(weights).max(axis=(1, 2, 3), keepdims=True)
    shades = (127.5 + 127.5 * weights / np.maximum(largest, 1e-12)).astype(np.uint8)  # [O, 1 or 3, kh, kw]
    return _data_uri(_grid(np.broadcast_to(shades.transpose(0, 2, 3, 1), (*_nhw(shades), 3)), _COLUMNS))


def feature_maps(model: nn.Module, x: Tensor) -> list[LayerMaps]:
    """What the first, a middle and the last convolution answer to one image.

    Args:
        model: in evaluation mode, on the CPU.
        x: float32[1, C, H, W], normalised.
    """
    names = _convolutions(model)
    answers: dict[str, Tensor] = {}

    def remember(module: nn.Conv2d, _: object, output: Tensor) -> None:
        if output.shape[-1] > 1:
            answers[names[module]] = output[0]

    hooks = [module.register_forward_hook(remember) for module in names]
    try:
        with torch.inference_mode():
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    ordered = list(answers)
    chosen = [ordered[i] for i in sorted({0, len(ordered) // 2, len(ordered) - 1})] if ordered else []
    return [_layer_maps(name, answers[name].numpy()) for name in chosen]


def confusion_picture(confusion: NDArray[np.int64]) -> str:
    """A pixel per cell of the matrix, transparent where there is nothing, so that it fits light and dark pages.

    Rows are true classes. The diagonal is blue, mistakes are red; opacity grows with the root of the share of the row,
    so that single mistakes among thousands of images can be seen.
    """
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    classes = len(confusion)
    picture = np.zeros((classes, classes, 4), np.uint8)
    picture[..., :3] = _WRONG_COLOUR
    picture[np.arange(classes), np.arange(classes), :3] = _RIGHT_COLOUR
    picture[..., 3] = np.where(confusion > 0, 40 + 215 * np.sqrt(share), 0)
    return _data_uri(Image.fromarray(picture))


def _convolutions(model: nn.Module) -> dict[nn.Conv2d, str]:
    """The convolutions that look at more than one pixel, with their names, in the order of the model's definition."""
    named = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    return {module: name for name, module in named if max(module.kernel_size) > 1}


def _layer_maps(name: str, maps: NDArray[np.float32]) -> LayerMaps:
    """The liveliest maps of float32[C, H, W], each stretched to its own range."""
    channels, height, width = maps.shape
    liveliest = np.sort(np.argsort(-maps.std(axis=(1, 2)))[:_MAX_MAPS])
    shown = maps[liveliest]
    low, high = shown.min(axis=(1, 2), keepdims=True), shown.max(axis=(1, 2), keepdims=True)
    coloured = _viridis((shown - low) / np.maximum(high - low, 1e-12))
    tiles = np.stack([_resized(tile) for tile in coloured])
    return LayerMaps(name or "model", channels, height, width, _data_uri(_grid(tiles, _COLUMNS)))


def _viridis(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Colours uint8[..., 3] of values in 0..1."""
    places = np.linspace(0, 1, len(_VIRIDIS))
    return np.stack([np.interp(values, places, _VIRIDIS[:, c]) for c in range(3)], axis=-1).astype(np.uint8)


def _resized(tile: NDArray[np.uint8]) -> NDArray[np.uint8]:
    image = Image.fromarray(tile)
    scale = _MAP_PX / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return np.asarray(image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX))


def _grid(tiles: NDArray[np.uint8], columns: int) -> Image.Image:
    """uint8[N, h, w, 3] side by side with transparent gaps."""
    count, height, width, _ = tiles.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    canvas = np.zeros((rows * (height + _GAP_PX) - _GAP_PX, columns * (width + _GAP_PX) - _GAP_PX, 4), np.uint8)
    for index, tile in enumerate(tiles):
        top, left = index // columns * (height + _GAP_PX), index % columns * (width + _GAP_PX)
        canvas[top : top + height, left : left + width, :3] = tile
        canvas[top : top + height, left : left + width, 3] = 255
    return Image.fromarray(canvas)


def _nhw(filters: NDArray[np.uint8]) -> tuple[int, int, int]:
    return filters.shape[0], filters.shape[2], filters.shape[3]


def _data_uri(image: Image.Image, image_format: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, image_format, optimize=True, quality=85)
    return f"data:image/{image_format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
