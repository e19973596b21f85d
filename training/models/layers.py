"""What several families share: widths and pooling."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def scaled(channels: int, width: float, multiple: int = 8) -> int:
    """`channels` times `width`, rounded to a `multiple`, at least one of it; exactly `channels` for a width of 1."""
    if width == 1:
        return channels
    return max(multiple, round(channels * width / multiple) * multiple)


def pool_to(x: Tensor, size: int) -> Tensor:
    """Adaptive average pooling of float32[N, C, H, W] to [N, C, size, size], with the plainest operator that does it.

    Equal to `adaptive_avg_pool2d`, which the ONNX exporter turns into chains of gathers where it cannot tell that the
    windows are regular.
    """
    height, width = int(x.shape[2]), int(x.shape[3])
    if (height, width) == (size, size):
        return x
    if size == 1:
        return x.mean((2, 3), keepdim=True)
    if height % size == 0 and width % size == 0:
        return functional.avg_pool2d(x, (height // size, width // size))
    return functional.adaptive_avg_pool2d(x, size)
