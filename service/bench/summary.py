"""From the samples of a level to the figures that are shown.

Percentiles are exact order statistics (the smallest latency that at least p% of the answers did not exceed), from all
samples: nothing is binned. Latencies are those of answered requests, from the intended time of sending; requests that
failed are counted by status, with their own median.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.bench.load import OK, Measurement, Sample

PERCENTILES = (50.0, 90.0, 99.0, 99.9)
# Bounds for trusting the generator: beyond them it is likely the bottleneck itself.
_MAX_LAG_S = 0.020
_MAX_CPU_SHARE = 0.9
_MIN_SENT_SHARE = 0.97
# Logarithmic bins of the histogram: 10 for each factor of ten.
_BINS_PER_DECADE = 10


@dataclass(frozen=True)
class Failures:
    """Requests that ended with one status: how many, and their median latency."""

    count: int
    p50_ms: float


@dataclass(frozen=True)
class Summary:
    """Figures of one level. Rates are per second; latencies in milliseconds, None if nothing was answered.

    `offered` is what was sent, `throughput` what was answered, `goodput` what was answered within the deadline, counted
    from the intended time; all in requests. `images` are classified images per second.
    `latencies_ms` are all latencies, ascending.
    """

    level: str
    loop: str
    value: float
    seconds: float
    sent: int
    offered: float
    throughput: float
    goodput: float
    images: float
    percentiles_ms: dict[str, float]
    max_ms: float | None
    mean_ms: float | None
    failures: dict[str, Failures]
    bad_images: int
    server_ms: dict[str, float]
    send_delay_p99_ms: float
    lag_p99_ms: float
    cpu_share: float
    warnings: tuple[str, ...]
    latencies_ms: NDArray[np.float64]

    def as_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`, the latencies as a histogram."""
        plain = {key: value for key, value in vars(self).items() if key != "latencies_ms"}
        plain["failures"] = {status: vars(failures) for status, failures in self.failures.items()}
        plain["histogram"] = [{"up_to_ms": bound, "count": count} for bound, count in histogram(self.latencies_ms)]
        return plain


def summarise(measurement: Measurement) -> Summary:
    """Figures of one level; what the warm-up sent is left out."""
    start_s, stop_s = measurement.window_s
    seconds = stop_s - start_s
    counted = [s for s in measurement.samples if start_s <= s.intended_s < stop_s]
    # Rates by what ended inside of the window: in a steady state what reaches over its end makes up for what
    # reached into it.
    answered = [s for s in measurement.samples if s.status == OK and start_s <= s.ended_s < stop_s]
    good = [s for s in answered if s.ended_s - s.intended_s <= measurement.deadline_s]
    latencies = np.sort([(s.ended_s - s.intended_s) * 1e3 for s in counted if s.status == OK])
    delay_p99_ms = percentile(np.sort([(s.sent_s - s.intended_s) * 1e3 for s in counted]), 99)
    lag_p99_ms = percentile(np.sort(measurement.lag_s) * 1e3, 99)

    def rate(count: float) -> float:
        return count / seconds if seconds > 0 else 0.0

    offered = len(counted) / measurement.sending_s if measurement.sending_s > 0 else 0.0
    return Summary(
        level=str(measurement.level),
        loop=measurement.level.loop,
        value=measurement.level.value,
        seconds=seconds,
        sent=len(counted),
        offered=offered,
        throughput=rate(len(answered)),
        goodput=rate(len(good)),
        images=rate(sum(s.images - s.bad_images for s in answered)),
        percentiles_ms={f"p{p:g}": percentile(latencies, p) for p in PERCENTILES} if len(latencies) else {},
        max_ms=float(latencies[-1]) if len(latencies) else None,
        mean_ms=float(latencies.mean()) if len(latencies) else None,
        failures=_failures(counted),
        bad_images=sum(s.bad_images for s in counted),
        server_ms=_server(counted),
        send_delay_p99_ms=delay_p99_ms,
        lag_p99_ms=lag_p99_ms,
        cpu_share=measurement.cpu_share,
        warnings=_warnings(measurement, offered, delay_p99_ms, lag_p99_ms),
        latencies_ms=latencies,
    )


def percentile(ascending: NDArray[np.float64], percent: float) -> float:
    """The smallest value that at least `percent` of all do not exceed; 0 if there is none."""
    if not len(ascending):
        return 0.0
    # 99.9% of 1000 is 999, and not a little more for want of binary digits.
    rank = math.ceil(percent / 100 * len(ascending) - 1e-6)
    return float(ascending[max(rank, 1) - 1])


def histogram(latencies_ms: NDArray[np.float64]) -> list[tuple[float, int]]:
    """Upper bounds (ms) of logarithmic bins, and how many latencies fell into each, from the first that has any."""
    if not len(latencies_ms):
        return []
    steps = np.ceil(np.log10(np.maximum(latencies_ms, 1e-3)) * _BINS_PER_DECADE).astype(int)
    counts = Counter(steps.tolist())
    return [(float(10 ** (step / _BINS_PER_DECADE)), counts[step]) for step in range(min(counts), max(counts) + 1)]


def _failures(samples: Sequence[Sample]) -> dict[str, Failures]:
    by_status: dict[str, list[float]] = {}
    for sample in samples:
        if sample.status != OK:
            by_status.setdefault(sample.status, []).append((sample.ended_s - sample.intended_s) * 1e3)
    return {status: Failures(len(found), percentile(np.sort(found), 50)) for status, found in by_status.items()}


def _server(samples: Sequence[Sample]) -> dict[str, float]:
    """Median of each stage inside the server, as it reports them."""
    answered = [s for s in samples if s.status == OK]
    stages = {
        "queue": [s.queue_us for s in answered],
        "decode": [s.decode_us for s in answered],
        "inference": [s.inference_us for s in answered],
    }
    return {stage: float(np.median(times)) / 1e3 for stage, times in stages.items() if times}


def _warnings(measurement: Measurement, offered: float, delay_p99_ms: float, lag_p99_ms: float) -> tuple[str, ...]:
    found = []
    level = measurement.level
    if measurement.cpu_share > _MAX_CPU_SHARE:
        found.append(f"the load generator used {measurement.cpu_share:.0%} of a core: it may be the bottleneck")
    if lag_p99_ms > _MAX_LAG_S * 1e3:
        found.append(f"the load generator's event loop lagged by {lag_p99_ms:.0f} ms (p99): latencies include that")
    if level.loop == "open" and delay_p99_ms > _MAX_LAG_S * 1e3:
        found.append(f"requests were sent {delay_p99_ms:.0f} ms late (p99): the load generator cannot keep this rate")
    if level.loop == "open" and 0 < offered < _MIN_SENT_SHARE * level.value - _poisson_noise(measurement):
        found.append(f"only {offered:.0f} of {level.value:g} requests/s were sent")
    return tuple(found)


def _poisson_noise(measurement: Measurement) -> float:
    """Three standard deviations of a Poisson rate over the time of sending, in requests per second."""
    return float(3 * np.sqrt(measurement.level.value / max(measurement.sending_s, 1e-9)))
