"""Tar shards in the WebDataset layout, for sets that are larger than the disk: read as streams, epoch after epoch.

A sample is a run of files with one key: `<key>.jpg` (or another image) and `<key>.cls`, the class as text. The key ends
at the first dot of the file's name, and what follows is its type: `<key>.seg.png` is no image. Shards are the `*.tar`
of a folder, or the lines of a `.txt` file: paths, or URLs that fsspec can open. A shard belongs to the part
of the split that its name begins with (train, val, test); any other name counts as train.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, groupby, islice
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple, cast

import fsspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.artifact import InputSpec
from service.errors import DataError
from service.preprocess import preprocess
from training.batches import Batch, ahead, batch_starts
from training.distributed import Group
from training.draws import draws
from training.listing import SPLIT_ALIASES, TRAIN, is_image
from training.seeds import Purpose, derive

_SHARDS = "[!.]*.tar"  # without those that a Mac puts beside each
_LABEL = "cls"


class Sample(NamedTuple):
    """One image of a shard, encoded. `suffix`: of its file name, with the dot. `label`: text of the `.cls` file.

    `repeated`: what the sample has more than once, the image or the label, of which the first is here; else empty.
    """

    key: str
    suffix: str
    image: bytes
    label: str
    repeated: str = ""


@dataclass(frozen=True)
class ShardSet:
    """The training part of a set of shards, after it has been scanned.

    `parts[s]`: int8, one entry per sample of shard s in the order of the file: TRAIN, or anything else for samples that
    are held out or set aside. `labels[s]`: int64, the same length. `mean`, `std`: of the training pixels in 0..1.
    `calibration`: uint8[M, H, W, C], some of the training images. `digest`: SHA-256 over keys, labels and contents.
    """

    urls: tuple[str, ...]
    parts: tuple[NDArray[np.int8], ...]
    labels: tuple[NDArray[np.int64], ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    calibration: NDArray[np.uint8]
    digest: str

    def __len__(self) -> int:
        return sum(int((part == TRAIN).sum()) for part in self.parts)

    def train_labels(self) -> NDArray[np.int64]:
        """int64[N], in the order of the shards."""
        chosen = [labels[part == TRAIN] for labels, part in zip(self.labels, self.parts, strict=True)]
        return np.concatenate(chosen)


def is_sharded(source: Path) -> bool:
    """Whether a source is a folder of tar files or a list of shards."""
    return source.suffix == ".txt" if source.is_file() else source.is_dir() and any(source.glob(_SHARDS))


def find_shards(source: Path) -> list[str]:
    """The shards of a folder or of a list, sorted; relative paths in a list start at its folder.

    Raises:
        DataError: the list is empty, or images lie beside the shards, which would be left out without a word.
    """
    if source.is_dir():
        for file in chain(source.glob("[!.]*/*"), source.glob("[!.]*/[!.]*/*")):  # classes, or parts with classes
            if is_image(file.name):
                raise DataError(
                    f"{source} holds tar shards and beside them images, as {file}; move one of the two away"
                )
        return sorted(str(file) for file in source.glob(_SHARDS))
    try:
        lines = [line.strip() for line in source.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is no list of shards in UTF-8: {error}") from None
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror}") from error
    urls = [line if "://" in line else str(source.parent / line) for line in lines if line and line[0] != "#"]
    if not urls:
        raise DataError(f"{source} lists no shards; write a path or URL of a .tar file on each line")
    return sorted(urls)


def part_of(url: str) -> int:
    """The part of the split that a shard's name says."""
    name = PurePosixPath(url).name.lower()
    letters = name[: next((i for i, c in enumerate(name) if not c.isalpha()), len(name))]
    return SPLIT_ALIASES.get(letters, TRAIN)


def read_shard(url: str) -> Iterator[Sample]:
    """The samples of a shard, in order, read as one stream.

    Raises:
        DataError: the shard cannot be opened or read.
    """
    try:
        with fsspec.open(url, "rb") as stream:
            tail = _Tail(stream)
            with tarfile.open(fileobj=cast("IO[bytes]", tail), mode="r|") as archive:
                yield from _samples(archive)
            if not tail.ends_as_an_archive():
                raise tarfile.ReadError("it is cut short; copy it again")
    except (OSError, tarfile.TarError, ValueError, ImportError) as error:
        raise DataError(f"shard {url} cannot be read: {error}") from error


class _Tail:
    """A stream that knows how it ended: tarfile takes an archive that is cut between two files for a whole one."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._last = b""

    def read(self, size: int) -> bytes:
        """As the stream's own."""
        content: bytes = self._stream.read(size)
        self._last = (self._last + content)[-tarfile.BLOCKSIZE :]
        return content

    def ends_as_an_archive(self) -> bool:
        """Reads the rest; whether it ends with a block of zeros, as the format wants it."""
        while self.read(tarfile.RECORDSIZE):
            pass
        return self._last == bytes(tarfile.BLOCKSIZE)


def _samples(archive: tarfile.TarFile) -> Iterator[Sample]:
    paths = ((PurePosixPath(member.name), member) for member in archive)
    # Hidden files, which tar on a Mac puts between those of a sample, would part them.
    files = ((path, archive.extractfile(member)) for path, member in paths if not path.name.startswith("."))
    for key, run in groupby(files, key=lambda file: _key_of(file[0])):
        sample, wanted = Sample(key, "", b"", ""), False
        for path, content in run:
            kind = path.name.partition(".")[2].lower()
            last = kind.rpartition(".")[2]
            image = is_image(path.name)
            if content is None or not (image or last == _LABEL):
                continue  # a folder, or something else about the image
            wanted = True  # also where it is "seg.png", so that a sample without an image is told
            if kind == last:
                sample = _with_image(sample, kind, content.read()) if image else _with_label(sample, content.read())
        if wanted:
            yield sample


def _with_image(sample: Sample, kind: str, image: bytes) -> Sample:
    if sample.suffix:
        return sample._replace(repeated="image")
    return sample._replace(suffix=f".{kind}", image=image)


def _with_label(sample: Sample, content: bytes) -> Sample:
    if sample.label:
        return sample._replace(repeated="label (.cls)")
    return sample._replace(label=content.decode("utf-8", "replace").replace("\0", "").strip())


def _key_of(path: PurePosixPath) -> str:
    """WebDataset's rule: the key ends at the first dot of the file name."""
    return str(path.parent / path.name.partition(".")[0])


class ShardSource:
    """Training batches from shards: their order shuffled, and the samples in a buffer of encoded images.

    Every process reads all shards and decodes its part of each batch, so that several end with the weights of one.
    """

    def __init__(
        self, shards: ShardSet, spec: InputSpec, batch_size: int, seed: int, *, group: Group, buffer: int, workers: int
    ) -> None:
        self._shards = shards
        self._spec = spec
        self._batch_size = batch_size
        self._seed = seed
        self._group = group
        self._buffer = buffer
        self._workers = workers

    def __len__(self) -> int:
        return len(self._shards)

    @property
    def steps(self) -> int:
        """Batches per epoch."""
        return len(self._starts())

    def _starts(self) -> NDArray[np.int64]:
        return batch_starts(len(self), self._batch_size, self._group.world)

    def batches(self, epoch: int, first: int) -> Iterator[Batch]:
        """The batches of an epoch, from the one numbered `first`; those before it are read but not decoded."""
        return ahead(self._cut(epoch, first))

    def _cut(self, epoch: int, first: int) -> Iterator[Batch]:
        bounds = [*self._starts().tolist(), len(self)]
        samples = self._shuffled(epoch)
        with ThreadPoolExecutor(self._workers) as pool:
            for number, size in enumerate(np.diff(bounds).tolist()):
                taken = list(islice(samples, size))
                if number >= first:
                    yield self._decode(taken[self._group.part(size)], size, pool)

    def _decode(self, taken: Sequence[tuple[bytes, int, Tensor]], whole: int, pool: ThreadPoolExecutor) -> Batch:
        images = np.empty((len(taken), *self._spec.shape), dtype=np.uint8)
        encoded = [image for image, _, _ in taken]
        for _ in pool.map(lambda data, out: preprocess(data, self._spec, out=out), encoded, images):
            pass  # raises what a thread has raised
        labels = torch.tensor([label for _, label, _ in taken], dtype=torch.int64)
        uniform = torch.stack([row for _, _, row in taken]) if taken else draws(0, 0, 0)
        return Batch(torch.from_numpy(images), labels, uniform, whole)

    def _shuffled(self, epoch: int) -> Iterator[tuple[bytes, int, Tensor]]:
        random = np.random.default_rng(derive(self._seed, Purpose.SHARDS, epoch))
        order = random.permutation(len(self._shards.urls))
        buffer: list[tuple[bytes, int, Tensor]] = []
        for sample in self._stream(epoch, order):
            buffer.append(sample)
            if len(buffer) > self._buffer:
                yield _pop(buffer, random)
        while buffer:
            yield _pop(buffer, random)

    def _stream(self, epoch: int, order: NDArray[np.int64]) -> Iterator[tuple[bytes, int, Tensor]]:
        shards = self._shards
        for number in order.tolist():
            parts, labels = shards.parts[number], shards.labels[number]
            uniform = draws(len(parts), self._seed, epoch, number + 1)
            count = 0
            for place, sample in enumerate(read_shard(shards.urls[number])):
                count += 1
                if count <= len(parts) and parts[place] == TRAIN:
                    yield sample.image, int(labels[place]), uniform[place]
            if count != len(parts):
                raise DataError(
                    f"shard {shards.urls[number]} has {count} samples, and had {len(parts)} when it was scanned; train "
                    "on shards that nobody writes"
                )


def _pop(buffer: list[tuple[bytes, int, Tensor]], random: np.random.Generator) -> tuple[bytes, int, Tensor]:
    place = int(random.integers(len(buffer)))
    buffer[place], buffer[-1] = buffer[-1], buffer[place]
    return buffer.pop()
