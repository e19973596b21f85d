"""Random streams that depend on the seed, the epoch and the purpose, and on nothing that ran before.

So a run that goes on from a checkpoint draws what the uninterrupted run would have drawn, and one image's augmentation
does not depend on the batch or the process it lands in.
"""

from __future__ import annotations

import enum

import numpy as np
import torch


class Purpose(enum.IntEnum):
    """What a stream is for. The numbers are part of what makes runs repeatable: append, never renumber."""

    WEIGHTS = 0
    ORDER = 1
    AUGMENT = 2
    DROPOUT = 3
    MIX = 4
    SHARDS = 5
    SEARCH = 6


def derive(seed: int, purpose: Purpose, *counters: int) -> int:
    """A well-mixed 64-bit seed; different arguments give independent streams (NumPy's SeedSequence)."""
    entropy = np.random.SeedSequence([seed, int(purpose), *counters])
    return int(entropy.generate_state(1, np.uint64)[0])


def generator(seed: int, purpose: Purpose, *counters: int) -> torch.Generator:
    """A CPU generator for one purpose."""
    return torch.Generator().manual_seed(derive(seed, purpose, *counters))


def reseed(device: torch.device, seed: int) -> None:
    """Seeds what layers draw from. On the CPU alone it is quick enough for every step."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)
