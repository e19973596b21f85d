"""Decoded images in a mapped file, for sets larger than memory, for several processes, and for the next run.

A cache is a folder named for what is in it: the files (path, size, time of change), the input's shape and resize rule,
and what decoded them. It appears when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
import psutil

from service.artifact import InputSpec
from service.beside import folder_beside
from service.errors import DataError
from service.resources import cgroup_memory_left
from training.folders import one_by_one
from training.listing import Listing
from training.read import Dataset, Fault, decoder_version, read_images

_PIXELS, _DIGESTS, _USABLE, _FAULTS = "pixels.npy", "digests.npy", "usable.npy", "faults.json"
_SHARE_OF_MEMORY = 4


def fits_memory(listing: Listing, spec: InputSpec) -> bool:
    """Whether all images take at most a quarter of the memory that is free, here or in the container."""
    free = min(psutil.virtual_memory().available, cgroup_memory_left())
    return len(listing) * spec.nbytes <= free // _SHARE_OF_MEMORY


def choose(setting: Literal["auto", "memory", "disk"], listing: Listing, spec: InputSpec, *, shared: bool) -> bool:
    """Whether to map a file: on demand, for what does not fit, and for what several processes share."""
    return shared or setting == "disk" or (setting == "auto" and not fits_memory(listing, spec))


def read_mapped(
    listing: Listing,
    spec: InputSpec,
    parent: Path,
    *,
    min_side_pixels: int,
    workers: int,
    advance: Callable[[int], None],
) -> tuple[Dataset, list[Fault]]:
    """`read_images` into a mapped file below `parent`, or a cache of the same files that is already there.

    Raises:
        DataError: as `read_images`, or the disk is full.
    """
    folder = parent / _key(listing, spec, min_side_pixels)
    try:
        with one_by_one(folder):
            if (folder / _PIXELS).exists():
                advance(len(listing))
            else:
                _write(folder, listing, spec, min_side_pixels, workers, advance)
    except OSError as error:
        raise DataError(f"the image cache {folder} cannot be written: {error.strerror}") from error
    return _open(listing, folder)


def _write(
    folder: Path,
    listing: Listing,
    spec: InputSpec,
    min_side_pixels: int,
    workers: int,
    advance: Callable[[int], None],
) -> None:
    with folder_beside(folder) as beside:
        _check_space(beside, len(listing) * spec.nbytes)
        shape = (len(listing), *spec.shape)
        pixels = np.lib.format.open_memmap(beside / _PIXELS, mode="w+", dtype=np.uint8, shape=shape)
        _reserve(beside / _PIXELS)
        dataset, faults = read_images(
            listing, spec, min_side_pixels=min_side_pixels, workers=workers, images=pixels, advance=advance
        )
        pixels.flush()
        np.save(beside / _DIGESTS, dataset.digests)
        np.save(beside / _USABLE, dataset.usable)
        (beside / _FAULTS).write_text(json.dumps([asdict(fault) for fault in faults]), encoding="utf-8")


def _reserve(file: Path) -> None:
    """Takes the file's space now: where a mapped file finds the disk full, the process is killed by SIGBUS."""
    with file.open("r+b") as stream:
        os.posix_fallocate(stream.fileno(), 0, stream.seek(0, os.SEEK_END))


def _open(listing: Listing, folder: Path) -> tuple[Dataset, list[Fault]]:
    dataset = Dataset(
        listing=listing,
        images=np.load(folder / _PIXELS, mmap_mode="r"),
        digests=np.load(folder / _DIGESTS),
        usable=np.load(folder / _USABLE),
    )
    faults = json.loads((folder / _FAULTS).read_text(encoding="utf-8"))
    return dataset, [Fault(**fault) for fault in faults]


def _key(listing: Listing, spec: InputSpec, min_side_pixels: int) -> str:
    facts = (decoder_version(), spec.model_dump_json(), min_side_pixels, listing.root.resolve())
    total = hashlib.sha256("\0".join(map(str, facts)).encode(errors="surrogateescape"))
    for row, path in enumerate(listing.paths):
        try:
            status = listing.file(row).stat()
            total.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        except OSError:
            total.update(f"{path}\0missing\0".encode())
    return total.hexdigest()[:16]


def _check_space(folder: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise DataError(
            f"the decoded images take {needed_bytes / 1e9:.1f} GB and {folder.parent} has {free_bytes / 1e9:.1f} GB "
            "left; choose another --runs or a smaller --image-size"
        )
