"""Preparing the data of a run: read, cleaned, split, with the statistics of its pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np

from service.artifact import InputSpec, Resize
from service.errors import ConfigurationError, DataError
from service.resources import cpu_count
from training import cache
from training.config import Experiment, InputConfig
from training.data import list_images
from training.display import Display
from training.distributed import Group
from training.duplicates import find_duplicates
from training.listing import TEST, VALIDATION, Listing
from training.models import Architecture
from training.pixels import Normaliser, channel_statistics
from training.prepared import FullSize, Prepared, calibration_rows
from training.read import Dataset, Fault, check_classes, count_channels, read_images
from training.shard_scan import Scanned, count_shard_channels, scan
from training.shards import find_shards, is_sharded, part_of
from training.split import Split, make_split
from training.transfer import inherited_statistics

T = TypeVar("T")


def prepare(
    experiment: Experiment, entry: Architecture, source: Path, cache_folder: Path, display: Display, group: Group
) -> Prepared:
    """Reads and splits the images; with several processes, one reads and all map the same file.

    Raises:
        DataError: the images cannot be used.
        ConfigurationError: the input's size and resize rule contradict each other.
    """
    if is_sharded(source):
        return _prepare_shards(experiment, entry, source, cache_folder, display, group)
    config = experiment.data
    listing = list_images(source)
    spec = input_spec(
        experiment.input, entry, experiment.input.channels or count_channels(listing), experiment.model.options
    )
    smaller = train_spec(experiment.input, spec)
    dataset, faults = _read(experiment, listing, smaller or spec, cache_folder, display, group)
    duplicates = find_duplicates(dataset)
    faults += duplicates.values()
    dataset = dataset.without(duplicates)
    check_classes(dataset, faults)
    try:
        split = make_split(
            dataset.listing, dataset.usable, validation=config.validation, test=config.test, seed=config.split_seed
        )
    except DataError:
        display.faults(faults)  # they may be why
        raise
    inherited = inherited_statistics(experiment.transfer, entry, spec.channels)
    normalise = Normaliser(*(inherited or channel_statistics(dataset.images, split.train)))
    full_size = None
    if smaller:
        full_size = _read_full_size(experiment, dataset, split, spec, cache_folder, display, group)
    return Prepared(dataset, split, spec, normalise, faults, train_spec=smaller, full_size=full_size)


def parts_given(source: Path) -> frozenset[int]:
    """The parts of a split that come with the data. No image is read.

    Raises:
        DataError: the images cannot be found.
    """
    if is_sharded(source):
        return frozenset(map(part_of, find_shards(source)))
    return frozenset(list_images(source).splits.tolist())


def _read_full_size(
    experiment: Experiment,
    dataset: Dataset,
    split: Split,
    spec: InputSpec,
    cache_folder: Path,
    display: Display,
    group: Group,
) -> FullSize:
    """Decodes what is judged by, and what int8 is calibrated with, once more at the input's size.

    Raises:
        DataError: a file that could be read a moment ago cannot any more.
    """
    calibration = calibration_rows(split, experiment.export.calibration_images)
    rows = np.unique(np.concatenate([split.validation, split.test, calibration]))
    judged, faults = _read(experiment, dataset.listing.chosen(rows), spec, cache_folder, display, group)
    if faults:
        raise DataError(
            f"{faults[0].path} could be read a moment ago, and now: {faults[0].message} Leave the images as they are "
            "while they are read, and start again"
        )
    return FullSize(judged, rows, calibration)


def _prepare_shards(
    experiment: Experiment, entry: Architecture, source: Path, cache_folder: Path, display: Display, group: Group
) -> Prepared:
    """Training samples stay in their shards; what is held out is unpacked and read."""
    config = experiment.data
    spec = input_spec(
        experiment.input, entry, experiment.input.channels or count_shard_channels(source), experiment.model.options
    )

    def look() -> Scanned:
        with display.reading(None) as advance:
            return scan(
                source,
                spec,
                cache_folder,
                min_side_pixels=config.min_side_pixels,
                validation=config.validation,
                test=config.test,
                seed=config.split_seed,
                workers=cpu_count(),
                advance=advance,
            )

    found = _main_first(look, group)
    dataset, faults = _read(experiment, found.held_out, spec, cache_folder, display, group)
    given, nothing = found.held_out.splits[dataset.usable], np.array([], dtype=np.int64)
    split = Split(nothing, dataset.usable[given == VALIDATION], dataset.usable[given == TEST])
    inherited = inherited_statistics(experiment.transfer, entry, spec.channels)
    normalise = Normaliser(*(inherited or (found.shards.mean, found.shards.std)))
    faults = [*found.faults, *faults]
    smaller = train_spec(experiment.input, spec)
    return Prepared(dataset, split, spec, normalise, faults, found.shards, train_spec=smaller)


def _read(
    experiment: Experiment, listing: Listing, spec: InputSpec, cache_folder: Path, display: Display, group: Group
) -> tuple[Dataset, list[Fault]]:
    least = experiment.data.min_side_pixels
    mapped = cache.choose(experiment.data.cache, listing, spec, shared=group.world > 1)

    def read() -> tuple[Dataset, list[Fault]]:
        with display.reading(len(listing), f"images at {spec.width}x{spec.height}") as advance:
            if mapped:
                return cache.read_mapped(
                    listing, spec, cache_folder, min_side_pixels=least, workers=cpu_count(), advance=advance
                )
            return read_images(listing, spec, min_side_pixels=least, workers=cpu_count(), advance=advance)

    return _main_first(read, group)


def _main_first(read: Callable[[], T], group: Group) -> T:
    """Calls `read` in the main process, which leaves a cache, and then in the others, which find it."""
    if not group.main:
        group.wait()
    found = read()
    if group.main:
        group.wait()
    return found


def input_spec(
    config: InputConfig, entry: Architecture, channels: int, options: Mapping[str, bool | int | float]
) -> InputSpec:
    """The model's input: the architecture's default with these options, changed by what was asked for.

    The shorter side of the resize keeps its proportion to the crop when only the size is changed.

    Raises:
        ConfigurationError: the crop is larger than what it is cut from.
    """
    default = entry.input_for(options)
    size = config.size or default.height
    mode = config.resize or default.resize.mode
    side = config.shorter_side
    if mode == "stretch" and side is not None:
        raise ConfigurationError("input.shorter_side is of a crop, and images are stretched; set input.resize to crop")
    if side is None and default.resize.shorter_side is not None and mode == "crop":
        side = round(default.resize.shorter_side * size / default.height)
    if side is not None and side < size:
        raise ConfigurationError(f"input.shorter_side {side} is smaller than the input of {size}x{size}; enlarge it")
    resize = Resize(mode=mode, shorter_side=side, interpolation=default.resize.interpolation)
    return InputSpec(height=size, width=size, channels=1 if channels == 1 else 3, resize=resize)


def train_spec(config: InputConfig, spec: InputSpec) -> InputSpec | None:
    """The training images' size and resize rule, with the same view as the model's input; None if it is the same."""
    size = config.train_size
    if size is None or size == spec.height:
        return None
    side = spec.resize.shorter_side
    side = None if side is None else max(size, round(side * size / spec.height))
    resize = spec.resize.model_copy(update={"shorter_side": side})
    return spec.model_copy(update={"height": size, "width": size, "resize": resize})
