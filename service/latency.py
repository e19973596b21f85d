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
# Everyone in a batch waits for all of it. So the smallest batch is taken that gives this part of the most images per
# second, or an image alone if it gives that part.
_ENOUGH = 0.95
_ENOUGH_ALONE = 0.8
# In a long line a batch may be one in so many of what waits: its first image waits little longer, next to the last one.
_LINE_PER_BATCH = 4
# How fast a bucket is when nothing else has the device: of 17 batches 1 is faster than that. Followed in steps of these
# parts of it, whatever the distance: a mean would follow the slow ones.
_QUIET_STEP_DOWN = 1 / 8
_QUIET_STEP_UP = 1 / 128


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
        # Neighbours on the device make batches longer, and by chance some sizes more than others: means say what to
        # expect, but not which size is worth its while.
        self._quiet: dict[int, float] = dict(self._mean)

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
            self._mean[bucket], self._deviation[bucket], self._quiet[bucket] = seconds, 0.0, seconds
            return
        seconds = min(seconds, _OUTLIER * mean) if mean > 0 else seconds
        self._deviation[bucket] += _DEVIATION_GAIN * (abs(seconds - mean) - self._deviation[bucket])
        self._mean[bucket] = mean + _GAIN * (seconds - mean)
        quiet = self._quiet[bucket]
        self._quiet[bucket] = min(max(seconds, quiet * (1 - _QUIET_STEP_DOWN)), quiet * (1 + _QUIET_STEP_UP))

    def doubt(self, images: int) -> None:
        """Trusts what is known of a batch of so many images a little less: it kept everything from running.

        A forecast that stops all work is never corrected by an observation. Doubted often enough, it lets one through.
        """
        if not self._mean:
            return
        bucket = self.bucket(images)
        if bucket not in self._mean:  # judged by another bucket: from now on by itself
            self._mean[bucket], self._deviation[bucket] = self.mean_s(images), 0.0
            self._quiet[bucket] = self._mean[bucket]
        self._mean[bucket] *= 1 - _GAIN
        self._deviation[bucket] *= 1 - _GAIN

    def mean_s(self, images: int) -> float:
        """Expected seconds of a batch; an unseen bucket is judged by the next seen one, for each image alike."""
        return self._known(self._mean, images)

    def cautious_s(self, images: int) -> float:
        """Seconds that a batch rarely exceeds: the mean and two deviations."""
        return self.mean_s(images) + _CAUTION * self._deviation.get(self.bucket(images), 0.0)

    def best_batch(self, waiting: int) -> int:
        """How many of the waiting images to run now.

        Either all of them, padded to the next bucket, or exactly a smaller bucket's worth: on a device that is as fast
        with 8 as with 5 the padding is free, on a CPU it is not. The smallest size is taken with which nearly the most
        images per second are answered.

        Where company gains little, as for most networks on a CPU, images run one by one: the first answer leaves eight
        times sooner than from a batch of eight, and the last one no later. The bound for that is wide, so that chance
        in what was measured does not make batches where there is nothing to gain.

        In a long line more run together than that, for they share what a batch costs outside of the model: waking
        threads, and the event loop's turn.
        """
        if waiting == 1:
            return 1
        sizes = [bucket for bucket in self._buckets if bucket < waiting]
        if waiting <= self.largest:
            sizes.append(waiting)
        rates = {images: self._rate(images) for images in sizes}
        most = max(rates.values())
        enough = _ENOUGH_ALONE if rates[sizes[0]] >= _ENOUGH_ALONE * most else _ENOUGH
        best = next(images for images in sizes if rates[images] >= enough * most)
        share = waiting // _LINE_PER_BATCH
        return max(n for n in sizes if n == best or (n <= share and rates[n] >= _ENOUGH * rates[best]))

    def _rate(self, images: int) -> float:
        seconds = self._known(self._quiet, images)
        return images / seconds if seconds > 0 else float(images)

    def _known(self, learned: Mapping[int, float], images: int) -> float:
        bucket = self.bucket(images)
        if bucket in learned:
            return learned[bucket]
        if not learned:
            return 0.0
        nearest = min(learned, key=lambda seen: abs(seen - bucket))
        return learned[nearest] * max(1.0, bucket / nearest)
