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
    """Adaptive average pooling of float32[N, C, H, W] to [N, C, size, size], in operators that every runtime has.

    The means are those of `adaptive_avg_pool2d`, which has no counterpart in ONNX and is exported as chains of gathers.
    Regular windows are a plain pooling; others, which may overlap, a product with constant matrices.
    """
    height, width = int(x.shape[2]), int(x.shape[3])
    if (height, width) == (size, size):
        return x  # [N, C, size, size]
    if height % size == 0 and width % size == 0:
        return functional.avg_pool2d(x, (height // size, width // size))  # [N, C, size, size]
    down = x.new_tensor(_means(height, size))  # [size, H]
    across = x.new_tensor(_means(width, size))  # [size, W]
    return down @ x @ across.T  # [N, C, size, size]


def _means(length: int, size: int) -> list[list[float]]:
    """Row i holds 1 / n in the n places of window i, which reaches from floor(i L / S) to ceil((i + 1) L / S)."""
    windows = [(i * length // size, -((i + 1) * length // -size)) for i in range(size)]
    return [[1 / (end - start) if start <= j < end else 0.0 for j in range(length)] for start, end in windows]
