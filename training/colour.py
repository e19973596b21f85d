"""Changes of pixel values, whole batches at a time: float32[N, C, H, W] in 0..1 to the same. Factors are float32[N]."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as the service's grayscale
_LEVELS = 256
_HALF_LEVEL = 0.5 / (_LEVELS - 1)
_ROUNDING = 1e-3


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Towards black (0) or away from it (above 1)."""
    return (images * _per_image(factor)).clamp_(0, 1)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Towards the mean gray of each image, or away from it."""
    return _blend(gray(images).mean((1, 2, 3), keepdim=True), images, factor)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Towards gray, or away from it; nothing happens to grayscale images."""
    return _blend(gray(images), images, factor)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Towards a 3x3 smoothing, or away from it; border pixels stay."""
    kernel = torch.ones(3, 3, device=images.device)
    kernel[1, 1] = 5
    channels = images.shape[1]
    smooth = images.clone()
    if min(images.shape[2:]) > 2:  # noqa: PLR2004 - smaller images are all border
        weight = (kernel / kernel.sum()).expand(channels, 1, 3, 3)
        smooth[:, :, 1:-1, 1:-1] = functional.conv2d(images, weight, groups=channels)
    return _blend(smooth, images, factor)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keeps the highest `bits` of each 8-bit value."""
    step = 2.0 ** (8 - _per_image(bits))
    # Resampling leaves exact levels a little below themselves, and a whole step would be lost.
    return (images * (_LEVELS - 1) / step + _ROUNDING).floor() * step / (_LEVELS - 1)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Inverts what is at least as bright as the threshold (0..1)."""
    return torch.where(images >= _per_image(threshold), 1 - images, images)


def autocontrast(images: Tensor) -> Tensor:
    """Stretches each channel to 0..1; a constant channel stays."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    span = high - low
    # What resampling leaves of a constant channel differs in the last bits.
    return torch.where(span > _HALF_LEVEL, (images - low) / span.clamp(min=_HALF_LEVEL), images)


def equalize(images: Tensor) -> Tensor:
    """Makes the 8-bit values of each channel equally frequent, as far as that can be (Pillow's rule)."""
    count, channels, height, width = images.shape
    values = (images * (_LEVELS - 1)).round().long().view(count * channels, -1)
    histogram = torch.zeros(count * channels, _LEVELS, dtype=torch.long, device=images.device)
    histogram.scatter_add_(1, values, torch.ones_like(values))
    # Pillow divides the pixels, without those of the brightest value, into 255 steps.
    brightest = histogram.gather(1, values.amax(1, keepdim=True))
    step = (height * width - brightest) // (_LEVELS - 1)
    below = histogram.cumsum(1) - histogram
    table = ((below + step // 2) // step.clamp(min=1)).clamp(0, _LEVELS - 1)
    equalized = torch.where(step > 0, table.gather(1, values), values)
    return equalized.view(count, channels, height, width).to(images.dtype) / (_LEVELS - 1)


def gray(images: Tensor) -> Tensor:
    """float32[N, 1, H, W], the luma."""
    if images.shape[1] == 1:
        return images
    weight = torch.tensor(_LUMA, device=images.device).view(1, 3, 1, 1)
    return (images * weight).sum(1, keepdim=True)


def _blend(other: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(other.expand_as(images), images, _per_image(factor)).clamp_(0, 1)


def _per_image(factor: Tensor) -> Tensor:
    return factor.view(-1, 1, 1, 1)
