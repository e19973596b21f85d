"""In which number format the network computes; weights and optimiser stay float32."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from service import resources

Precision = Literal["float32", "bfloat16", "float16"]

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_CANDIDATES: tuple[Precision, ...] = ("float32", "bfloat16")
_WORTH_IT = 1.2  # below this gain float32's accuracy is the better bargain
_TRIALS = 3


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """What the forward pass runs under."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, _DTYPES[precision])


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 itself (AVX512-BF16, AMX, or a GPU from Ampere on)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    _, flags = resources.cpu_model()
    return bool(resources.BF16_FLAGS & flags)


def fastest(
    run: Callable[[Precision], None], device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> Precision:
    """bfloat16 where the hardware has it and a training step is faster by a fifth at least, else float32.

    The two take turns, so that a busy machine slows down both, and the best time of each counts.

    Args:
        run: one forward and backward pass in the given precision, without changing any weight.
        device: where it runs.
        clock: seconds.
    """
    if not has_bfloat16(device):
        return "float32"
    best: dict[Precision, float] = dict.fromkeys(_CANDIDATES, math.inf)
    for trial in range(_TRIALS + 1):
        for precision in _CANDIDATES:
            started = clock()
            run(precision)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if trial:  # the first pass allocates and chooses kernels
                best[precision] = min(best[precision], clock() - started)
    return "bfloat16" if best["float32"] >= _WORTH_IT * best["bfloat16"] else "float32"
