"""Tar shards of small noise images, and what a scan and a source make of them."""

import io
import tarfile

import numpy as np
from PIL import Image

from service.artifact import InputSpec
from training.distributed import Group
from training.shard_scan import scan
from training.shards import ShardSource

SPEC = InputSpec(height=16, width=16, channels=1)


def add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def png(seed, side=20):
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(file, samples):
    """`samples`: (key, encoded image or None, label or None)."""
    file.parent.mkdir(exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for key, image, label in samples:
            if image is not None:
                add(archive, f"{key}.png", image)
            if label is not None:
                add(archive, f"{key}.cls", str(label).encode())
            add(archive, f"{key}.json", b"{}")


def numbered(count, first=0, classes=3):
    """Samples of images that differ, with labels in turn."""
    return [(f"s{i:04d}", png(i), i % classes) for i in range(first, first + count)]


def scanned(source, tmp_path, **options):
    wanted = {"min_side_pixels": 1, "validation": 0.1, "test": 0.1, "seed": 0, "workers": 2, "advance": lambda _: None}
    return scan(source, SPEC, tmp_path / "cache", **{**wanted, **options})


def source_of(shards, batch_size=16, seed=0, group=None, buffer=25):
    group = group or Group()
    return ShardSource(shards, SPEC, batch_size, seed, group=group, buffer=buffer, workers=2)


def seen(batches):
    return [image.numpy().tobytes() for batch in batches for image in batch.images]
