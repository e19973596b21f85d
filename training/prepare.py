"""The data of a run, ready for the loop: read, cleaned, split, with the statistics of its pixels."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from service.artifact import InputSpec, Resize
from service.errors import ConfigurationError
from training import cache
from training.batches import Examples
from training.config import Experiment, InputConfig
from training.data import list_images
from training.display import Display
from training.distributed import Group
from training.duplicates import find_duplicates
from training.models import Architecture
from training.pixels import Normaliser, channel_statistics
from training.read import Dataset, Fault, count_channels, read_images
from training.split import Split, make_split, write_split
from training.transfer import inherited_statistics

REPORT = "left-out.csv"
SPLIT = "split.csv"


@dataclass(frozen=True)
class Prepared:
    """Data ready to train on. `faults`: the files that were set aside."""

    dataset: Dataset
    split: Split
    spec: InputSpec
    normalise: Normaliser
    faults: Sequence[Fault]

    def examples(self, part: str) -> Examples:
        """`train`, `validation` or `test`."""
        return Examples(self.dataset.images, self.dataset.labels, getattr(self.split, part))

    def provenance(self, split_seed: int) -> Mapping[str, Any]:
        """What the manifest says about the data."""
        counts = np.bincount(self.dataset.labels[self.dataset.usable], minlength=len(self.dataset.classes))
        split = self.split
        return {
            "sha256": self.dataset.digest(),
            "images": {"train": len(split.train), "validation": len(split.validation), "test": len(split.test)},
            "per_class": {name: int(count) for name, count in zip(self.dataset.classes, counts, strict=True)},
            "left_out": len(self.faults),
            "split_seed": split_seed,
        }

    def write_reports(self, folder: Path) -> None:
        """Writes which image is in which part, and which files were set aside and why."""
        write_split(folder / SPLIT, self.dataset.listing, self.split)
        with (folder / REPORT).open("w", encoding="utf-8", newline="") as stream:
            rows = csv.writer(stream, lineterminator="\n")
            rows.writerow(("path", "reason", "message"))
            rows.writerows((fault.path, fault.reason, fault.message) for fault in self.faults)


def prepare(
    experiment: Experiment, entry: Architecture, source: Path, cache_folder: Path, display: Display, group: Group
) -> Prepared:
    """Reads and splits the images; with several processes, one reads and all map the same file.

    Raises:
        DataError: the images cannot be used.
        ConfigurationError: the input's size and resize rule contradict each other.
    """
    config = experiment.data
    listing = list_images(source)
    spec = input_spec(experiment.input, entry, experiment.input.channels or count_channels(listing))
    mapped = cache.choose(config.cache, listing, spec, shared=group.world > 1)
    least, workers = config.min_side_pixels, len(os.sched_getaffinity(0))

    def read() -> tuple[Dataset, list[Fault]]:
        with display.reading(len(listing)) as advance:
            if mapped:
                return cache.read_mapped(
                    listing, spec, cache_folder, min_side_pixels=least, workers=workers, advance=advance
                )
            return read_images(listing, spec, min_side_pixels=least, workers=workers, advance=advance)

    if not group.main:
        group.wait()  # until the main process has written the cache that `read` then finds
    dataset, faults = read()
    if group.main:
        group.wait()
    copies = find_duplicates(dataset)
    dataset, faults = (dataset.without(copies) if copies else dataset), faults + copies
    split = make_split(
        dataset.listing,
        dataset.usable,
        validation=config.validation,
        test=config.test,
        seed=config.split_seed,
    )
    mean, std = inherited_statistics(experiment.transfer, entry, spec.channels) or channel_statistics(
        dataset.images, split.train
    )
    return Prepared(dataset, split, spec, Normaliser(mean, std), faults)


def input_spec(config: InputConfig, entry: Architecture, channels: int) -> InputSpec:
    """The model's input: the architecture's default, changed by what was asked for.

    The shorter side of the resize keeps its proportion to the crop when only the size is changed.

    Raises:
        ConfigurationError: the crop is larger than what it is cut from.
    """
    default = entry.input
    size = config.size or default.height
    mode = config.resize or default.resize.mode
    side = config.shorter_side
    if side is None and default.resize.shorter_side is not None and mode == "crop":
        side = round(default.resize.shorter_side * size / default.height)
    if side is not None and side < size:
        raise ConfigurationError(f"input.shorter_side {side} is smaller than the input of {size}x{size}; enlarge it")
    resize = Resize(mode=mode, shorter_side=side, interpolation=default.resize.interpolation)
    return InputSpec(height=size, width=size, channels=1 if channels == 1 else 3, resize=resize)
