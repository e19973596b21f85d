"""The first look at shards: every sample is decoded once, faults and leaks are set aside, held-out images unpacked.

The result is kept beside the other caches, so that the next run on the same shards starts at once.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import numpy as np
from numpy.typing import NDArray

from service.artifact import InputSpec
from service.beside import folder_beside
from service.errors import DataError
from training.folders import one_by_one
from training.labels import read_labels
from training.listing import SPLIT_NAMES, TEST, TRAIN, VALIDATION, Listing, in_order, listing_of
from training.pixels import ChannelSums
from training.read import Fault, channels_of, decode_into, decoder_version
from training.shard_columns import DIGEST_BYTES, SET_ASIDE, Columns, Seen
from training.shards import Sample, ShardSet, find_shards, part_of, read_shard
from training.tables import table_entries

_CALIBRATION = 512
_CHUNK = 256
_FORMAT = 3  # of what a scan leaves; an older one is not opened
_ARRAYS, _LABELS, _FAULTS, _HELD_OUT = "scan.npz", "labels.json", "faults.json", "held-out.csv"
_NAMES = "classes.txt"


def count_shard_channels(source: Path, shards: int = 16, samples: int = 16) -> int:
    """1 if the first samples of some evenly spaced shards are all grayscale, else 3; only headers are read.

    Raises:
        DataError: a shard cannot be read.
    """
    urls = find_shards(source)
    chosen = urls[:: max(1, len(urls) // shards)]
    found = (sample for url in chosen for sample in islice(read_shard(url), samples))
    return channels_of(io.BytesIO(sample.image) for sample in found)


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
                with folder_beside(folder) as fresh:
                    _Scan(fresh, spec, min_side_pixels, shares, seed).run(urls, workers, advance)
    except OSError as error:
        raise DataError(f"what is held out of the shards cannot be written to {parent}: {error}") from error
    return _open(folder, urls, _class_names(source))


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
        self._seen = Columns()

    def run(self, urls: Sequence[str], workers: int, advance: Callable[[int], None]) -> None:
        """Reads every sample and writes what was found."""
        with ThreadPoolExecutor(workers) as pool:
            for number, url in enumerate(urls):
                self._seen.begin(url)
                os.utime(self._folder)  # where nothing is held out for a day, it would be taken for abandoned
                samples = enumerate(read_shard(url))
                while chunk := list(islice(samples, _CHUNK)):
                    for seen in pool.map(lambda one, shard=(number, url): self._look(*shard, *one), chunk):
                        self._note(seen)
                    advance(len(chunk))
        self._write()

    def _look(self, number: int, url: str, place: int, sample: Sample) -> Seen:
        name = f"/{sample.key}{sample.suffix}"
        digest = hashlib.blake2b(sample.image, digest_size=DIGEST_BYTES).digest()
        image = np.empty(self._spec.shape, np.uint8)
        unusable = self._unusable(sample, image)
        if unusable:
            return Seen(SET_ASIDE, sample.label, name, digest, fault=Fault(url + name, *unusable))
        part = part_of(url)
        part = self._drawn(url, sample.key) if part == TRAIN else part
        if part == TRAIN:
            return Seen(part, sample.label, name, digest, image)
        file = self._folder / _file_of(part, number, place, sample.suffix)
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(sample.image)
        return Seen(part, sample.label, name, digest)

    def _unusable(self, sample: Sample, image: NDArray[np.uint8]) -> tuple[str, str] | None:
        """Decodes the sample into `image`; reason and message if that cannot be."""
        if sample.repeated:
            return "ambiguous", f"the sample has more than one {sample.repeated}"
        if not sample.label or not sample.image:
            what = "label (.cls)" if sample.image else "image"
            return "incomplete", f"the sample has no {what}; what follows the first dot of a file's name is its type"
        return decode_into(image, sample.image, self._spec, self._min_side_pixels)

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

    def _note(self, seen: Seen) -> None:
        if seen.image is not None:
            self._sums.add(seen.image)
            self._sample.add(seen.image)
        self._seen.add(seen)

    def _write(self) -> None:
        self._seen.set_repeated_aside()
        parts, codes = self._seen.parts, self._seen.codes
        arrays: dict[str, NDArray[Any]] = {}
        for number, rows in enumerate(self._seen.shards()):
            arrays |= {f"parts{number}": parts[rows], f"labels{number}": codes[rows]}
        mean, std = self._sums.moments()
        sample = np.stack(self._sample.images) if self._sample.images else np.empty((0, *self._spec.shape))
        arrays |= {"mean": np.array(mean), "std": np.array(std), "calibration": sample.astype(np.uint8)}
        arrays["digest"] = np.array(self._seen.digest())
        np.savez(self._folder / _ARRAYS, allow_pickle=False, **arrays)
        (self._folder / _LABELS).write_text(json.dumps(list(self._seen.texts)), encoding="utf-8")
        faults = [asdict(fault) for _, fault in sorted(self._seen.faults.items())]
        (self._folder / _FAULTS).write_text(json.dumps(faults), encoding="utf-8")
        with (self._folder / _HELD_OUT).open("w", encoding="utf-8", newline="") as stream:
            table = csv.writer(stream, lineterminator="\n")
            table.writerow(("path", "label", "split"))
            table.writerows(sorted(self._held_out()))

    def _held_out(self) -> Iterator[tuple[str, str, str]]:
        """File, label and part of each."""
        parts, codes, texts = self._seen.parts, self._seen.codes, list(self._seen.texts)
        for row in np.flatnonzero((parts == VALIDATION) | (parts == TEST)).tolist():
            part, shard = int(parts[row]), self._seen.shard_of(row)
            suffix = PurePosixPath(self._seen.name(row)).suffix
            yield _file_of(part, shard, row - self._seen.starts[shard], suffix), texts[codes[row]], SPLIT_NAMES[part]


def _file_of(part: int, shard: int, place: int, suffix: str) -> str:
    """Where a held-out sample is unpacked, below the folder. Keys may come again, in one shard and in others."""
    name = hashlib.blake2b(f"{shard}\0{place}".encode(), digest_size=12).hexdigest()
    return f"{SPLIT_NAMES[part]}/{name}{suffix}"


def _open(folder: Path, urls: Sequence[str], names: Sequence[str]) -> Scanned:
    with np.load(folder / _ARRAYS) as stored:
        codes = [stored[f"labels{number}"] for number in range(len(urls))]
        parts = tuple(stored[f"parts{number}"] for number in range(len(urls)))
        mean, std, calibration = stored["mean"], stored["std"], stored["calibration"]
        digest = hashlib.sha256("\0".join((str(stored["digest"]), *names)).encode()).hexdigest()
    texts = json.loads((folder / _LABELS).read_text(encoding="utf-8"))
    classes, index = _classes(texts, codes, parts, names)
    number_of = np.array([index.get(text, -1) for text in texts], dtype=np.int64)
    labels = tuple(number_of[shard] for shard in codes)
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
    texts: Sequence[str], codes: Sequence[NDArray[np.int32]], parts: Sequence[NDArray[np.int8]], names: Sequence[str]
) -> tuple[tuple[str, ...], dict[str, int]]:
    """Names in label order, and the index of each label text that is used."""
    used_codes = {code for shard, part in zip(codes, parts, strict=True) for code in np.unique(shard[part >= TRAIN])}
    used = in_order({texts[code] for code in used_codes})
    if names and all(text.isdecimal() for text in used):
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
