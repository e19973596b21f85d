"""The learning rate as a pure function of the step, so that a resumed run needs no schedule state."""

from __future__ import annotations

import math

from training.config import ScheduleConfig


def proven_warmup(config: ScheduleConfig) -> float:
    """The configured fraction of the steps, or a proven one: in a cycle the rate rises for a third of it."""
    if config.warmup is not None:
        return config.warmup
    return 0.3 if config.name == "one-cycle" else 0.05


def rate(config: ScheduleConfig, step: int, total: int) -> float:
    """Multiple of the peak learning rate at `step` of `total`, counted from 0.

    `one-cycle` rises and falls along half cosines (Smith and Topin, arXiv:1708.07120); `cosine` rises linearly and
    falls along a half cosine (Loshchilov and Hutter, arXiv:1608.03983); `constant` rises linearly and stays.
    """
    share = proven_warmup(config)
    warmup = max(1, round(share * total))
    if step < warmup and share:
        done = (step + 1) / warmup
        return (1 - math.cos(math.pi * done)) / 2 if config.name == "one-cycle" else done
    if config.name == "constant":
        return 1.0
    # The end of the warm-up has had the peak. The final rate, mostly 0, comes after the last step: it teaches nothing.
    first = warmup - 1 if share else 0
    done = (step - first) / (total - first)
    return config.final + (1 - config.final) * (1 + math.cos(math.pi * done)) / 2
