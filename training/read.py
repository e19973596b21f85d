"""Reading the images once: decoded by the service's own preprocessing into one uint8 array, faults set aside.

Reading checks and caches in a single pass: every file is decoded exactly once, in threads (decoders release the
GIL), and what cannot be used is reported with its path instead of ending an epoch later.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import inspect
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.artifact import InputSpec
from service.errors import DataError, InvalidImageError
from service.image_header import read_header
from service.preprocess import preprocess
from training.listing import SPLIT_NAMES, UNDECIDED, Listing

_CHUNK = 32
# Modules of the service that make pixels.
DECODERS = ("preprocess", "decode_jpeg", "decode_pillow", "exif", "geometry", "image_header", "jpeg_markers", "png")
_LIBRARIES = ("simplejpeg", "pillow", "cykooz-resizer")
_GRAYSCALE_MODES = frozenset({"1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "F"})


@functools.cache
def decoder_version() -> str:
    """What pixels depend on beside file and input: the service's code, and the versions of its libraries.

    Part of every cache's key: training on pixels that the service does not make any more would go unnoticed.
    """
    code = hashlib.sha256()
    for name in DECODERS:
        code.update(inspect.getsource(importlib.import_module(f"service.{name}")).encode())
    return " ".join([code.hexdigest(), *(f"{library}={metadata.version(library)}" for library in _LIBRARIES)])


@dataclass(frozen=True)
class Fault:
    """A file that was set aside. `reason`: corrupt, empty, tiny, unsupported_format ..., for programs."""

    path: str
    reason: str
    message: str


@dataclass(frozen=True)
class Dataset:
    """Decoded images. Batches are `images[rows]`, so that the loop waits for memory bandwidth and nothing else.

    `images`: uint8[N, H, W, C], a row per file of the listing, in memory or mapped. `digests`: uint8[N, 16], BLAKE2b of
    each encoded file. `usable`: int64, ascending, the rows without a fault; the others hold nothing of use.
    """

    listing: Listing
    images: NDArray[np.uint8]
    digests: NDArray[np.uint8]
    usable: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.usable)

    @property
    def labels(self) -> NDArray[np.int64]:
        """int64[N], indices into `classes`."""
        return self.listing.labels

    @property
    def classes(self) -> tuple[str, ...]:
        """Names in label order."""
        return self.listing.classes

    def without(self, rows: Collection[int]) -> Dataset:
        """The same, with these rows set aside too; a table may list a file in several."""
        return replace(self, usable=np.setdiff1d(self.usable, np.fromiter(rows, np.int64)))

    def digest(self) -> str:
        """SHA-256 over paths, labels, given parts of the split and contents: two equal ones mean the same data set."""
        total = hashlib.sha256()
        for row in self.usable:
            total.update(f"{self.listing.paths[row]}\0{self.classes[self.labels[row]]}\0".encode())
            total.update(self.digests[row].tobytes())
            if (part := int(self.listing.splits[row])) != UNDECIDED:  # a part that is drawn follows from the rest
                total.update(SPLIT_NAMES[part].encode())
        return total.hexdigest()


def read_images(
    listing: Listing,
    spec: InputSpec,
    *,
    min_side_pixels: int = 1,
    workers: int = 2,
    images: NDArray[np.uint8] | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[Dataset, list[Fault]]:
    """Decodes every file of a listing.

    Args:
        listing: what to read.
        spec: shape and resize rule of the model's input.
        min_side_pixels: images whose shorter side is smaller are set aside as tiny.
        workers: threads.
        images: uint8[N, H, W, C] to decode into, such as a mapped file; None allocates memory.
        advance: told the number of files done since it was last called.

    Returns:
        The images, and what was set aside, both in the listing's order.
    """
    pixels = np.empty((len(listing), *spec.shape), dtype=np.uint8) if images is None else images
    digests = np.zeros((len(listing), 16), dtype=np.uint8)
    faults: dict[int, Fault] = {}

    def read(chunk: range) -> int:
        for i in chunk:
            fault = _read_into(listing.file(i), spec, min_side_pixels, pixels[i], digests[i])
            if fault:
                faults[i] = Fault(listing.paths[i], *fault)
        return len(chunk)

    chunks = [range(at, min(at + _CHUNK, len(listing))) for at in range(0, len(listing), _CHUNK)]
    with ThreadPoolExecutor(workers) as pool:
        for done in pool.map(read, chunks):
            advance(done)
    usable = np.setdiff1d(np.arange(len(listing)), np.fromiter(faults, dtype=np.int64))
    found = [faults[i] for i in sorted(faults)]
    return Dataset(listing, pixels, digests, usable), found


def check_classes(dataset: Dataset, faults: Sequence[Fault]) -> None:
    """Raises DataError if a class has no usable image left; the message has one of the faults as an example."""
    counts = np.bincount(dataset.labels[dataset.usable], minlength=len(dataset.classes))
    lost = [name for name, count in zip(dataset.classes, counts, strict=True) if count == 0]
    if lost:
        indices = [dataset.classes.index(name) for name in lost]
        theirs = {dataset.listing.paths[row] for row in np.flatnonzero(np.isin(dataset.listing.labels, indices))}
        first = next((fault for fault in faults if fault.path in theirs), None)
        example = f" (as {first.path}: {first.message})" if first else ""
        raise DataError(
            f"{dataset.listing.root.resolve()}: no usable image of class {', '.join(lost[:5])} is left{example}; "
            "replace the files, or leave the class out"
        )


def read_one(file: Path, spec: InputSpec) -> NDArray[np.uint8] | None:
    """One image as uint8[H, W, C]; None if it cannot be used."""
    out = np.empty(spec.shape, dtype=np.uint8)
    return None if _read_into(file, spec, 1, out, np.empty(16, dtype=np.uint8)) else out


def count_channels(listing: Listing, sample: int = 256) -> int:
    """1 if all of a sample of evenly spaced readable files are grayscale, else 3; only headers are read."""
    step = max(1, len(listing) // sample)
    return channels_of(listing.file(i) for i in range(0, len(listing), step))


def channels_of(pictures: Iterable[Path | IO[bytes]]) -> int:
    """1 if all that are readable are grayscale, else 3; only headers are read."""
    modes = set(_modes(pictures))
    return 1 if modes and modes <= _GRAYSCALE_MODES else 3


def _modes(pictures: Iterable[Path | IO[bytes]]) -> Iterator[str]:
    for picture in pictures:
        with contextlib.suppress(Exception):  # on odd bytes Pillow raises nearly everything; reading reports the file
            yield _mode(picture)


def _mode(picture: Path | IO[bytes]) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about sizes and metadata; nothing is decoded here
        with Image.open(picture) as image:
            return image.mode


def _read_into(
    file: Path, spec: InputSpec, min_side_pixels: int, out: NDArray[np.uint8], digest: NDArray[np.uint8]
) -> tuple[str, str] | None:
    try:
        data = file.read_bytes()
    except OSError as error:
        return "unreadable", str(error.strerror or error)
    fault = decode_into(out, data, spec, min_side_pixels)
    if fault is None:
        digest[:] = np.frombuffer(hashlib.blake2b(data, digest_size=16).digest(), dtype=np.uint8)
    return fault


def decode_into(out: NDArray[np.uint8], data: bytes, spec: InputSpec, min_side_pixels: int) -> tuple[str, str] | None:
    """Decodes an image into uint8[H, W, C]; reason and message if it is not to be used."""
    try:
        header = read_header(data)
        preprocess(data, spec, out=out, header=header)
    except InvalidImageError as error:
        return error.reason.value, str(error)
    if min(header.width, header.height) < min_side_pixels:
        return "tiny", f"{header.width}x{header.height} pixels; the least is {min_side_pixels} on each side"
    return None
