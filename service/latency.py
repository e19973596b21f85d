"""How long a batch takes, learned from every batch that ran.

The time a CNN takes for a batch of a given size on a given device varies little (Gujarati et al., "Serving DNNs like
Clockwork", OSDI 2020), so a table of bucket to seconds predicts well enough to choose batch sizes and to drop what
cannot finish in time.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence

# Weight of a new observation, and how many deviations are added where being late costs more than being early;
# the constants of TCP's round-trip estimator (RFC 6298) do well here, too.
_GAIN = 0.125
_DEVIATION_GAIN = 0.25
_CAUTION = 2.0
# An observation counts as at most so many times what was expected: a pause of the machine is no property of a batch
# size, and a real change is believed after a few batches all the same.
_OUTLIER = 4.0


class LatencyTable:
    """Seconds for each batch size.

    Not thread-safe: the batcher calls it under its lock.

    Args:
        buckets: batch sizes that the engine runs, ascending; smaller batches are padded to the next.
        measured: seconds of a bucket from warm-up, where known.
    """

    def __init__(self, buckets: Sequence[int], measured: Mapping[int, float] | None = None) -> None:
        self._buckets = tuple(buckets)
        self._mean: dict[int, float] = dict(measured or {})
        self._deviation: dict[int, float] = dict.fromkeys(self._mean, 0.0)

    @property
    def largest(self) -> int:
        """The largest batch."""
        return self._buckets[-1]

    def bucket(self, images: int) -> int:
        """The bucket that a batch of so many images is padded to."""
        return self._buckets[min(bisect.bisect_left(self._buckets, images), len(self._buckets) - 1)]

    def observe(self, images: int, seconds: float) -> None:
        """Learns from a batch that ran."""
        bucket = self.bucket(images)
        mean = self._mean.get(bucket)
        if mean is None:
            self._mean[bucket], self._deviation[bucket] = seconds, 0.0
            return
        seconds = min(seconds, _OUTLIER * mean) if mean > 0 else seconds
        self._deviation[bucket] += _DEVIATION_GAIN * (abs(seconds - mean) - self._deviation[bucket])
        self._mean[bucket] = mean + _GAIN * (seconds - mean)

    def doubt(self, images: int) -> None:
        """Trusts what is known of a batch of so many images a little less: it kept everything from running.

        A forecast that stops all work is never corrected by an observation. Doubted often enough, it lets one through.
        """
        if not self._mean:
            return
        bucket = self.bucket(images)
        if bucket not in self._mean:  # judged by another bucket: from now on by itself
            self._mean[bucket], self._deviation[bucket] = self.mean_s(images), 0.0
        self._mean[bucket] *= 1 - _GAIN
        self._deviation[bucket] *= 1 - _GAIN

    def mean_s(self, images: int) -> float:
        """Expected seconds of a batch; an unseen bucket is judged by the next seen one, for each image alike."""
        bucket = self.bucket(images)
        if bucket in self._mean:
            return self._mean[bucket]
        if not self._mean:
            return 0.0
        nearest = min(self._mean, key=lambda seen: abs(seen - bucket))
        return self._mean[nearest] * max(1.0, bucket / nearest)

    def cautious_s(self, images: int) -> float:
        """Seconds that a batch rarely exceeds: the mean and two deviations."""
        return self.mean_s(images) + _CAUTION * self._deviation.get(self.bucket(images), 0.0)

    def best_batch(self, waiting: int) -> int:
        """How many of the waiting images to run now, so that images per second are the most.

        Either all of them, padded to the next bucket, or exactly a smaller bucket's worth: on a device that is as fast
        with 8 as with 5 the padding is free, on a CPU it is not.
        """
        if waiting >= self.largest:
            return self.largest
        if waiting <= self._buckets[0]:
            return waiting
        candidates = [waiting, *(bucket for bucket in self._buckets if bucket < waiting)]
        return max(candidates, key=lambda images: (self._rate(images), images))

    def _rate(self, images: int) -> float:
        seconds = self.mean_s(images)
        return images / seconds if seconds > 0 else float(images)
