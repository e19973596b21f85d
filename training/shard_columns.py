"""What a scan of shards keeps of every sample, in columns, and which samples are there more than once."""

from __future__ import annotations

import hashlib
import posixpath
from array import array
from bisect import bisect
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from training.listing import SPLIT_NAMES, TRAIN
from training.read import Fault

DIGEST_BYTES = 16  # of an encoded image
SET_ASIDE = -2  # a part like TRAIN
_CHUNK = 256


class Seen(NamedTuple):
    """A sample after the first look.

    `name`: of the image within the shard, behind the shard's address. `digest`: of the encoded image. `image`: None for
    what is not trained on.
    """

    part: int
    label: str
    name: str
    digest: bytes
    image: NDArray[np.uint8] | None = None
    fault: Fault | None = None


class Columns:
    """What is kept of every sample: 21 bytes and its name. As Python's objects tens of millions would fill the memory.

    `parts`, `codes` (of the labels in `texts`), `digests` and the names have an entry per sample, in the order of
    reading; `starts` one per shard: its first sample. `faults`: by sample.
    """

    def __init__(self) -> None:
        self.texts: dict[str, int] = {}
        self.starts: list[int] = []
        self.faults: dict[int, Fault] = {}
        self._urls: list[str] = []
        self._parts = array("b")
        self._codes = array("i")
        self._digests = bytearray()
        self._names: list[str] = []
        self._last_names: list[str] = []

    def begin(self, url: str) -> None:
        """What is added from now on is of this shard."""
        self._urls.append(url)
        self.starts.append(len(self._parts))

    def add(self, seen: Seen) -> None:
        """Takes in all but the image."""
        if seen.fault:
            self.faults[len(self._parts)] = seen.fault
        self._parts.append(seen.part)
        self._codes.append(self.texts.setdefault(seen.label, len(self.texts)))
        self._digests += seen.digest
        self._last_names.append(seen.name.replace("\0", ""))  # which is between them
        if len(self._last_names) == _CHUNK:
            self._names.append("\0".join(self._last_names))
            self._last_names = []

    @property
    def parts(self) -> NDArray[np.int8]:
        """int8[N], to be changed in place; once it has been asked for, nothing can be added."""
        return np.frombuffer(self._parts, np.int8)

    @property
    def codes(self) -> NDArray[np.int32]:
        """int32[N]."""
        return np.frombuffer(self._codes, np.int32)

    @property
    def digests(self) -> NDArray[np.void]:
        """void[N] of `DIGEST_BYTES` each."""
        return np.frombuffer(self._digests, f"V{DIGEST_BYTES}")

    def shards(self) -> Iterator[slice]:
        """The samples of each shard."""
        return map(slice, self.starts, [*self.starts[1:], len(self._parts)])

    def shard_of(self, row: int) -> int:
        """The number of a sample's shard."""
        return bisect(self.starts, row) - 1

    def name(self, row: int) -> str:
        """That of one sample."""
        chunk = row // _CHUNK
        names = self._names[chunk].split("\0") if chunk < len(self._names) else self._last_names
        return names[row % _CHUNK]

    def set_repeated_aside(self) -> None:
        """The same bytes under two labels go altogether; between the parts, the copy that tests or validates stays.

        Copies within one part stay, too: in shards they may be there to show rare images more often.
        """
        parts, codes = self.parts, self.codes
        rows, group = _repeated(self.digests, np.flatnonzero(parts != SET_ASIDE))
        kinds, texts = len(self.texts), list(self.texts)
        count = int(group.max(initial=-1)) + 1
        last = np.full(count, TRAIN, np.int8)
        np.maximum.at(last, group, parts[rows])
        pairs = np.unique(group * kinds + codes[rows])  # of content and label
        bounds = np.searchsorted(pairs, np.arange(count + 1) * kinds)
        contradictory = np.diff(bounds) > 1
        wrong = contradictory[group] | (parts[rows] < last[group])
        for row, number in zip(rows[wrong].tolist(), group[wrong].tolist(), strict=True):
            if contradictory[number]:
                found = sorted(texts[code] for code in pairs[bounds[number] : bounds[number + 1]] % kinds)
                reason, message = "contradiction", f"the same image has different labels: {', '.join(found[:4])}"
            else:
                reason, message = "leak", f"the same bytes as an image of the {SPLIT_NAMES[last[number]]} part"
            path = self._urls[self.shard_of(row)] + self.name(row)
            self.faults[row] = Fault(path, reason, message)
        parts[rows[wrong]] = SET_ASIDE

    def digest(self) -> str:
        """SHA-256 over names, labels, parts and contents, in hex."""
        total, texts, names = hashlib.sha256(), list(self.texts), self._names_of_all()
        for url, rows in zip(self._urls, self.shards(), strict=True):
            # By names, not by place: the same shards are the same data wherever they lie.
            shard = posixpath.basename(url)
            columns = (column[rows].tolist() for column in (self.parts, self.codes, self.digests))
            for part, code, digest, name in zip(*columns, names, strict=False):  # the names go on with the next shard
                total.update(f"{shard}{name}\0{texts[code]}\0{part}\0".encode() + digest)
        return total.hexdigest()

    def _names_of_all(self) -> Iterator[str]:
        return chain(chain.from_iterable(chunk.split("\0") for chunk in self._names), self._last_names)


def _repeated(digests: NDArray[np.void], rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Those of the rows whose digest is there more than once, and a number for each that only its copies share."""
    rows = rows[np.argsort(digests[rows], kind="stable")]
    ordered = digests[rows]
    first = np.ones(len(rows), np.bool_)
    first[1:] = ordered[1:] != ordered[:-1]
    alone = first.copy()
    alone[:-1] &= first[1:]
    return rows[~alone], np.cumsum(first[~alone]) - 1
