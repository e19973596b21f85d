"""Speed of exported models, as ratios that hold on a busy machine.

Two models are measured in turns, batch by batch, and compared by the median of their ratios: what slows the machine
down for a while then slows both.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.gates import sample
from training.rows import Images
from training.runtime import Session

BATCH = 8
CONDITIONS = f"batch {BATCH}"

_MIN_ROUNDS = 9
_MAX_ROUNDS = 200
_BUDGET_S = 2.0


def images_per_second(session: Session, pixels: Images) -> float:
    """Images per second of uint8[V, H, W, C] in batches of `BATCH`: the median of about two seconds."""
    return BATCH / float(np.median(_rounds_s([session], pixels)))


@dataclass(frozen=True)
class Comparison:
    """A candidate against a baseline.

    `ratio`: how many times as fast it is, the median over the rounds. `cautious_ratio`: the lower quartile, which a
    candidate that is no faster does not bring above 1 by luck. `images_per_second`: of the candidate.
    """

    ratio: float
    cautious_ratio: float
    images_per_second: float


def compare(baseline: Session, candidate: Session, pixels: Images) -> Comparison:
    """Runs both in turns on uint8[V, H, W, C] in batches of `BATCH`, for a few seconds."""
    took_s = _rounds_s([baseline, candidate], pixels)
    cautious, median = np.quantile(took_s[:, 0] / took_s[:, 1], [0.25, 0.5])
    return Comparison(float(median), float(cautious), BATCH / float(np.median(took_s[:, 1])))


def _rounds_s(sessions: Sequence[Session], pixels: Images) -> NDArray[np.float64]:
    """Seconds per batch, [rounds, sessions]; uint8[V, H, W, C] is repeated if it is shorter than a batch."""
    batch = sample(pixels, BATCH)
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
