"""The first look at shards: every sample is decoded once, faults and leaks are set aside, held-out images unpacked.

The result is kept beside the other caches, so that the next run on the same shards starts at once.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import posixpath
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import fsspec
import numpy as np
from numpy.typing import NDArray

from service.artifact import InputSpec
from service.errors import DataError
from training.folders import one_by_one
from training.labels import read_labels
from training.listing import SPLIT_NAMES, TEST, TRAIN, VALIDATION, Listing, listing_of
from training.pixels import ChannelSums
from training.read import Fault, channels_of, decode_into, decoder_version
from training.shards import Sample, ShardSet, find_shards, part_of, read_shard
from training.tables import table_entries

_CALIBRATION = 512
_CHUNK = 256
_FORMAT = 2  # of what a scan leaves; an older one is not opened
_SET_ASIDE = -2
_ARRAYS, _FAULTS, _HELD_OUT, _NAMES = "scan.npz", "faults.json", "held-out.csv", "classes.txt"


def count_shard_channels(source: Path, shards: int = 16, samples: int = 16) -> int:
    """1 if the first samples of some evenly spaced shards are all grayscale, else 3; only headers are read.

    Raises:
        DataError: a shard cannot be read.
    """
    urls = find_shards(source)
    chosen = urls[:: max(1, len(urls) // shards)]
    found = (sample for url in chosen for sample in islice(read_shard(url), samples))
    return channels_of(io.BytesIO(sample.image) for sample in found)


class _Seen(NamedTuple):
    """A sample after the first look.

    `digest`: of the encoded image. `image`: None for what is not trained on. `file`: into which a held-out one is
    unpacked, relative to the folder.
    """

    part: int
    label: str
    key: str
    digest: bytes
    image: NDArray[np.uint8] | None = None
    file: str = ""
    fault: Fault | None = None

    def without(self, fault: Fault) -> _Seen:
        """The same, set aside."""
        return self._replace(part=_SET_ASIDE, fault=fault)


class _Reservoir:
    """A random sample of the images that were added (Vitter's algorithm R)."""

    def __init__(self, size: int, seed: int) -> None:
        self.images: list[NDArray[np.uint8]] = []
        self._size = size
        self._added = 0
        self._random = np.random.default_rng(seed)

    def add(self, image: NDArray[np.uint8]) -> None:
        """Takes the image in, perhaps for another."""
        self._added += 1
        if len(self.images) < self._size:
            self.images.append(image)
        elif (place := int(self._random.integers(self._added))) < self._size:
            self.images[place] = image


@dataclass(frozen=True)
class Scanned:
    """`held_out`: validation and test images, unpacked, with the classes of all samples."""

    shards: ShardSet
    held_out: Listing
    faults: tuple[Fault, ...]


def scan(
    source: Path,
    spec: InputSpec,
    parent: Path,
    *,
    min_side_pixels: int,
    validation: float,
    test: float,
    seed: int,
    workers: int,
    advance: Callable[[int], None],
) -> Scanned:
    """Scans shards, or opens what an earlier scan of the same shards has left below `parent`.

    Where no shard is named for validation or test, samples are held out by a hash of shard, key and seed.

    Raises:
        DataError: a shard cannot be read, there are no training samples, or fewer than two classes.
    """
    urls = find_shards(source)
    given = {part_of(url) for url in urls}
    shares = {p: 0.0 if p in given else s for p, s in ((VALIDATION, validation), (TEST, test))}
    folder = parent / _key(urls, spec, min_side_pixels, shares, seed)
    try:
        with one_by_one(folder):
            if not folder.exists():
                with _beside(folder) as fresh:
                    _Scan(fresh, spec, min_side_pixels, shares, seed).run(urls, workers, advance)
                    fresh.rename(folder)
    except OSError as error:
        raise DataError(f"what is held out of the shards cannot be written to {parent}: {error}") from error
    return _open(folder, urls, _class_names(source))


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """An empty folder to take that one's place; it is gone afterwards, or has been moved."""
    fresh = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        yield fresh
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


class _Scan:
    """One pass over all shards, into a folder."""

    def __init__(
        self, folder: Path, spec: InputSpec, min_side_pixels: int, shares: Mapping[int, float], seed: int
    ) -> None:
        self._folder = folder
        self._spec = spec
        self._min_side_pixels = min_side_pixels
        self._shares = shares
        self._seed = seed
        self._sums = ChannelSums(spec.channels)
        self._sample = _Reservoir(_CALIBRATION, seed)
        self._seen: list[list[_Seen]] = []

    def run(self, urls: Sequence[str], workers: int, advance: Callable[[int], None]) -> None:
        """Reads every sample and writes what was found."""
        self._urls = urls
        with ThreadPoolExecutor(workers) as pool:
            for number, url in enumerate(urls):
                self._seen.append([])
                samples = enumerate(read_shard(url))
                while chunk := list(islice(samples, _CHUNK)):
                    for seen in pool.map(lambda one, shard=(number, url): self._look(*shard, *one), chunk):
                        self._note(seen)
                    advance(len(chunk))
        self._write()

    def _look(self, number: int, url: str, place: int, sample: Sample) -> _Seen:
        path = f"{url}/{sample.key}{sample.suffix}"
        digest = hashlib.blake2b(sample.image, digest_size=16).digest()
        if sample.repeated:
            fault = Fault(path, "ambiguous", f"the sample has more than one {sample.repeated}")
            return _Seen(_SET_ASIDE, sample.label, path, digest, fault=fault)
        if not sample.label or not sample.image:
            what = "label (.cls)" if sample.image else "image"
            message = f"the sample has no {what}; what follows the first dot of a file's name is its type"
            fault = Fault(path, "incomplete", message)
            return _Seen(_SET_ASIDE, sample.label, path, digest, fault=fault)
        image = np.empty(self._spec.shape, np.uint8)
        unusable = decode_into(image, sample.image, self._spec, self._min_side_pixels)
        if unusable:
            return _Seen(_SET_ASIDE, sample.label, path, digest, fault=Fault(path, *unusable))
        part = part_of(url)
        part = self._drawn(url, sample.key) if part == TRAIN else part
        if part == TRAIN:
            return _Seen(part, sample.label, path, digest, image)
        return _Seen(part, sample.label, path, digest, file=self._unpack(part, sample, f"{number}\0{place}"))

    def _drawn(self, url: str, key: str) -> int:
        """Held out by a hash: the same samples wherever the shards are, whatever their order and number.

        The shard's name is in it because in many sets the keys start again in each shard.
        """
        name = PurePosixPath(url).name
        number = hashlib.blake2b(f"{self._seed}\0{name}\0{key}".encode(), digest_size=8).digest()
        place = int.from_bytes(number, "big") / 2**64
        if place < self._shares[TEST]:
            return TEST
        return VALIDATION if place < self._shares[TEST] + self._shares[VALIDATION] else TRAIN

    def _unpack(self, part: int, sample: Sample, place: str) -> str:
        """Into a file of its own: keys may come again, in one shard and in others."""
        name = hashlib.blake2b(place.encode(), digest_size=12).hexdigest() + sample.suffix
        folder = self._folder / SPLIT_NAMES[part]
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(sample.image)
        return f"{SPLIT_NAMES[part]}/{name}"

    def _note(self, seen: _Seen) -> None:
        if seen.image is not None:
            self._sums.add(seen.image)
            self._sample.add(seen.image)
        self._seen[-1].append(seen._replace(image=None))

    def _write(self) -> None:
        self._set_repeated_aside()
        arrays: dict[str, NDArray[Any]] = {}
        for number, shard in enumerate(self._seen):
            arrays[f"parts{number}"] = np.array([seen.part for seen in shard], dtype=np.int8)
            arrays[f"labels{number}"] = np.array([seen.label for seen in shard], dtype=np.str_)
        mean, std = self._sums.moments()
        sample = np.stack(self._sample.images) if self._sample.images else np.empty((0, *self._spec.shape))
        arrays |= {"mean": np.array(mean), "std": np.array(std), "calibration": sample.astype(np.uint8)}
        arrays["digest"] = np.array(self._digest())
        np.savez(self._folder / _ARRAYS, allow_pickle=False, **arrays)
        every = [seen for shard in self._seen for seen in shard]
        faults = [asdict(seen.fault) for seen in every if seen.fault]
        (self._folder / _FAULTS).write_text(json.dumps(faults), encoding="utf-8")
        held_out = [
            (seen.file, seen.label, SPLIT_NAMES[seen.part]) for seen in every if seen.part in (VALIDATION, TEST)
        ]
        with (self._folder / _HELD_OUT).open("w", encoding="utf-8", newline="") as stream:
            rows = csv.writer(stream, lineterminator="\n")
            rows.writerow(("path", "label", "split"))
            rows.writerows(sorted(held_out))

    def _set_repeated_aside(self) -> None:
        """The same bytes under two labels go altogether; between the parts, the copy that tests or validates stays.

        Copies within one part stay, too: in shards they may be there to show rare images more often.
        """
        labels: dict[bytes, set[str]] = {}
        parts: dict[bytes, int] = {}
        for seen in (seen for shard in self._seen for seen in shard if seen.part != _SET_ASIDE):
            labels.setdefault(seen.digest, set()).add(seen.label)
            parts[seen.digest] = max(seen.part, parts.get(seen.digest, TRAIN))
        for shard in self._seen:
            for place, seen in enumerate(shard):
                if seen.part == _SET_ASIDE:
                    continue
                found, part = sorted(labels[seen.digest]), parts[seen.digest]
                if len(found) > 1:
                    message = f"the same image has different labels: {', '.join(found[:4])}"
                    shard[place] = seen.without(Fault(seen.key, "contradiction", message))
                elif seen.part < part:
                    message = f"the same bytes as an image of the {SPLIT_NAMES[part]} part"
                    shard[place] = seen.without(Fault(seen.key, "leak", message))

    def _digest(self) -> str:
        total = hashlib.sha256()
        for url, shard in zip(self._urls, self._seen, strict=True):
            # By names, not by place: the same shards are the same data wherever they lie.
            for seen in shard:
                name = posixpath.basename(url) + seen.key.removeprefix(url)
                total.update(f"{name}\0{seen.label}\0{seen.part}\0".encode() + seen.digest)
        return total.hexdigest()


def _open(folder: Path, urls: Sequence[str], names: Sequence[str]) -> Scanned:
    with np.load(folder / _ARRAYS) as stored:
        texts = [stored[f"labels{number}"] for number in range(len(urls))]
        parts = tuple(stored[f"parts{number}"] for number in range(len(urls)))
        mean, std, calibration = stored["mean"], stored["std"], stored["calibration"]
        digest = hashlib.sha256("\0".join((str(stored["digest"]), *names)).encode()).hexdigest()
    classes, index = _classes(texts, parts, names)
    labels = tuple(np.array([index.get(text, -1) for text in shard.tolist()], dtype=np.int64) for shard in texts)
    shards = ShardSet(tuple(urls), parts, labels, tuple(mean.tolist()), tuple(std.tolist()), calibration, digest)
    if not len(shards):
        raise DataError(
            f"the shards hold no usable training samples: {urls[0]} and {len(urls) - 1} more; each sample is an image, "
            "KEY.jpg or of another kind, and its class, KEY.cls"
        )
    entries = [replace(entry, label=classes[index[entry.label]]) for entry in table_entries(folder / _HELD_OUT)]
    faults = json.loads((folder / _FAULTS).read_text(encoding="utf-8"))
    held_out = listing_of(folder, entries, classes)
    return Scanned(shards, held_out, tuple(Fault(**fault) for fault in faults))


def _classes(
    texts: Sequence[NDArray[np.str_]], parts: Sequence[NDArray[np.int8]], names: Sequence[str]
) -> tuple[tuple[str, ...], dict[str, int]]:
    """Names in label order, and the index of each label text that is used."""
    used = sorted({text for shard, part in zip(texts, parts, strict=True) for text in shard[part >= TRAIN].tolist()})
    if all(text.isdecimal() for text in used):
        used.sort(key=int)
        if names:
            if int(used[-1]) >= len(names):
                raise DataError(f"{_NAMES} names {len(names)} classes, but a sample has label {used[-1]}")
            return tuple(names), {text: int(text) for text in used}
    return tuple(used), {text: number for number, text in enumerate(used)}


def _class_names(source: Path) -> Sequence[str]:
    """The lines of `classes.txt` beside the shards, if there is one: names of labels that are numbers."""
    file = (source if source.is_dir() else source.parent) / _NAMES
    return read_labels(file) if file.is_file() else ()


def _key(urls: Sequence[str], spec: InputSpec, min_side_pixels: int, shares: Mapping[int, float], seed: int) -> str:
    facts = (_FORMAT, decoder_version(), spec.model_dump_json(), min_side_pixels, sorted(shares.items()), seed)
    total = hashlib.sha256("\0".join(map(str, facts)).encode())
    for url in urls:
        system, path = fsspec.core.url_to_fs(url)
        try:
            info = system.info(path)
        except OSError as error:
            raise DataError(f"shard {url} cannot be read: {error}") from error
        changed = info.get("mtime") or info.get("ETag") or info.get("LastModified")
        total.update(f"{url}\0{info.get('size')}\0{changed}\0".encode())
    return total.hexdigest()[:16]
