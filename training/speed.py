"""Speed of exported models, as ratios that hold on a busy machine.

Two models are measured in turns, batch by batch, and compared by the median of their ratios: what slows the machine
down for a while then slows both.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from training.runtime import Session

BATCH = 8
CONDITIONS = f"batch {BATCH}"

_MIN_ROUNDS = 5
_MAX_ROUNDS = 200
_BUDGET_S = 1.5


def images_per_second(session: Session, pixels: NDArray[np.uint8]) -> float:
    """Images per second of uint8[V, H, W, C] in batches of `BATCH`: the median of about a second."""
    return BATCH / float(np.median(_rounds_s([session], pixels)))


def compare(baseline: Session, candidate: Session, pixels: NDArray[np.uint8]) -> tuple[float, float]:
    """How many times as fast the candidate is as the baseline, and its images per second; both are medians."""
    took_s = _rounds_s([baseline, candidate], pixels)
    return float(np.median(took_s[:, 0] / took_s[:, 1])), BATCH / float(np.median(took_s[:, 1]))


def _rounds_s(sessions: Sequence[Session], pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Seconds per batch, [rounds, sessions]; uint8[V, H, W, C] is repeated if it is shorter than a batch."""
    batch = np.resize(pixels, (BATCH, *pixels.shape[1:]))
    for session in sessions:
        session.run(batch)  # the first run allocates
    rounds: list[list[float]] = []
    deadline_s = time.perf_counter() + _BUDGET_S
    while len(rounds) < _MIN_ROUNDS or (time.perf_counter() < deadline_s and len(rounds) < _MAX_ROUNDS):
        took_s = [0.0] * len(sessions)
        # The order alternates, so that no session always runs in caches that another one has warmed.
        for index in sorted(range(len(sessions)), reverse=len(rounds) % 2 == 1):
            start_s = time.perf_counter()
            sessions[index].run(batch)
            took_s[index] = time.perf_counter() - start_s
        rounds.append(took_s)
    return np.asarray(rounds)
