"""How many threads a step's operators use.

Small operators lose more in the barriers between threads than they gain, and when the cores are shared with anything
else they lose tenfold: a barrier waits for the thread that is not running.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

_SMALL_STEP_FLOPS = 200_000_000  # forward pass of a batch; about 5 ms on one core


def thread_count(model: nn.Module, shape: tuple[int, int, int], batch_size: int) -> int:
    """One for small steps, else PyTorch's own choice. `shape`: height, width and channels of an image."""
    height, width, channels = shape
    outline = copy.deepcopy(model).to("meta").eval()
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        outline(torch.zeros(1, channels, height, width, device="meta"))
    flops = counter.get_total_flops() * batch_size
    return 1 if flops < _SMALL_STEP_FLOPS else torch.get_num_threads()


@contextmanager
def limited_to(threads: int) -> Iterator[None]:
    """Lets PyTorch's operators use so many threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
