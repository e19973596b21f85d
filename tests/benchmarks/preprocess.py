"""CPU time and accuracy of ways to turn a JPEG into 224x224 pixels, against the textbook Pillow pipeline.

    python tests/benchmarks/preprocess.py            # about two minutes on one core
    python tests/benchmarks/preprocess.py --json preprocess.json

Every way is timed on every photo in turn, in one process, so that what disturbs one disturbs all; what counts are the
ratios of the medians. Time is CPU time of the whole process: a library that spreads over threads gains nothing. The
difference to the textbook's pixels (0 to 255) is taken photo by photo: MAE is the mean absolute difference, of which
the mean and the 99th percentile over the photos are shown, and bias the largest mean signed difference. Libraries
that are not installed are left out.
"""

import importlib.util
import io
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import photos
import simplejpeg
from cykooz_resizer import CropBox, FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer
from PIL import Image, ImageOps
from rich.console import Console
from rich.table import Table

from service.artifact import InputSpec, Resize
from service.geometry import resized_size
from service.preprocess import preprocess

SHORTER, CROP = 256, 224
SPEC = InputSpec(height=CROP, width=CROP, resize=Resize(shorter_side=SHORTER))
BILINEAR = ResizeAlg.convolution(FilterType.bilinear)

Way = Callable[[bytes], np.ndarray]


def box(width: int, height: int) -> tuple[float, float, float, float]:
    """The centre crop in the pixels of the source."""
    new_width, new_height = resized_size(width, height, SHORTER)
    left, top = round((new_width - CROP) / 2), round((new_height - CROP) / 2)
    across, down = width / new_width, height / new_height
    return left * across, top * down, (left + CROP) * across, (top + CROP) * down


def textbook(data: bytes) -> np.ndarray:
    """Open, orient, convert, resize everything, cut."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    width, height = resized_size(*image.size, SHORTER)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - CROP) / 2), round((height - CROP) / 2)
    return np.asarray(image.crop((left, top, left + CROP, top + CROP)))


def pillow_folded(data: bytes) -> np.ndarray:
    """Pillow, the crop folded into the resize."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return np.asarray(image.resize((CROP, CROP), Image.Resampling.BILINEAR, box(*image.size)))


def pillow_draft(data: bytes) -> np.ndarray:
    """The same after a scaled decode to at least twice the size needed."""
    image = Image.open(io.BytesIO(data))
    width, height = image.size
    scale = dct_scale(width, height)
    image.draft("RGB", (width // scale, height // scale))
    part = tuple(side / scale for side in box(width, height))
    return np.asarray(image.convert("RGB").resize((CROP, CROP), Image.Resampling.BILINEAR, part))


def dct_scale(width: int, height: int, headroom: float = 2) -> int:
    return next((s for s in (8, 4, 2) if min(width, height) / SHORTER >= headroom * s), 1)


def decode(data: bytes, scale: int = 1, *, fast: bool = False) -> np.ndarray:
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    least = {"min_height": math.ceil(height / scale), "min_width": math.ceil(width / scale), "min_factor": scale}
    return simplejpeg.decode_jpeg(data, fastupsample=fast, **least)


def turbo_pillow(data: bytes) -> np.ndarray:
    pixels = decode(data)
    image = Image.fromarray(pixels)
    return np.asarray(image.resize((CROP, CROP), Image.Resampling.BILINEAR, box(*image.size)))


def turbo_vectorised(scale: int | None = 1, *, headroom: float = 2, fast: bool = False) -> Way:
    """simplejpeg and cykooz-resizer; a scale of None chooses as the service does."""

    def way(data: bytes) -> np.ndarray:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        factor = scale or dct_scale(width, height, headroom)
        pixels = decode(data, factor, fast=fast)
        left, top, right, bottom = (side / factor for side in box(width, height))
        source = ImageData(pixels.shape[1], pixels.shape[0], PixelType.U8x3, pixels.tobytes())
        target = ImageData(CROP, CROP, PixelType.U8x3)
        part = CropBox(left, top, right - left, bottom - top)
        Resizer().resize(source, target, ResizeOptions(resize_alg=BILINEAR, crop_box=part))
        return np.frombuffer(target.get_buffer(), np.uint8).reshape(CROP, CROP, 3)

    return way


def opencv_ways() -> dict[str, Way]:
    import cv2

    cv2.setNumThreads(1)

    def resized(pixels: np.ndarray, method: int) -> np.ndarray:
        width, height = resized_size(pixels.shape[1], pixels.shape[0], SHORTER)
        left, top = round((width - CROP) / 2), round((height - CROP) / 2)
        return cv2.resize(pixels, (width, height), interpolation=method)[top : top + CROP, left : left + CROP]

    def alone(data: bytes) -> np.ndarray:
        return resized(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB), cv2.INTER_AREA)

    def smoothed(data: bytes) -> np.ndarray:
        kernel = np.array([0.15, 0.7, 0.15])
        return resized(cv2.sepFilter2D(decode(data), -1, kernel, kernel), cv2.INTER_LINEAR)

    return {
        "opencv decode + area": alone,
        "simplejpeg + opencv linear (aliased)": lambda data: resized(decode(data), cv2.INTER_LINEAR),
        "simplejpeg + opencv area": lambda data: resized(decode(data), cv2.INTER_AREA),
        "simplejpeg + opencv smooth + linear": smoothed,
    }


def vips_ways() -> dict[str, Way]:
    import pyvips

    def thumbnail(data: bytes) -> np.ndarray:
        image = pyvips.Image.thumbnail_buffer(data, SHORTER, height=SHORTER, crop="centre")
        left = (SHORTER - CROP) // 2
        return image.crop(left, left, CROP, CROP).numpy()

    def resized(data: bytes) -> np.ndarray:
        image = pyvips.Image.new_from_buffer(data, "")
        width, height = resized_size(image.width, image.height, SHORTER)
        image = image.resize(width / image.width, vscale=height / image.height, kernel="linear")
        return image.crop(round((width - CROP) / 2), round((height - CROP) / 2), CROP, CROP).numpy()

    return {"libvips thumbnail": thumbnail, "libvips resize linear": resized}


def kornia_ways() -> dict[str, Way]:
    from kornia_rs import imgproc

    def way(data: bytes) -> np.ndarray:
        pixels = decode(data)
        width, height = resized_size(pixels.shape[1], pixels.shape[0], SHORTER)
        left, top = round((width - CROP) / 2), round((height - CROP) / 2)
        resized = imgproc.resize(pixels, (height, width), "bilinear")
        return np.asarray(resized)[top : top + CROP, left : left + CROP]

    return {"simplejpeg + kornia-rs": way}


OPTIONAL = {"cv2": opencv_ways, "pyvips": vips_ways, "kornia_rs": kornia_ways}


def ways() -> dict[str, Way]:
    found: dict[str, Way] = {
        "textbook (Pillow)": textbook,
        "Pillow, crop folded": pillow_folded,
        "Pillow, scaled decode, crop folded": pillow_draft,
        "simplejpeg + Pillow resize": turbo_pillow,
        "simplejpeg + cykooz": turbo_vectorised(),
        "the same, fast chroma": turbo_vectorised(fast=True),
        "the same, scaled, headroom 2": turbo_vectorised(None),
        "the same, scaled, headroom 1": turbo_vectorised(None, headroom=1),
        "simplejpeg decode alone": decode,
        "service.preprocess": lambda data: preprocess(data, SPEC),
    }
    for module, more in OPTIONAL.items():
        if importlib.util.find_spec(module):
            found.update(more())
    return found


def measure(data: list[bytes], candidates: dict[str, Way], rounds: int) -> list[dict[str, float | str | None]]:
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for photo in data:
            for name, way in candidates.items():
                start = time.process_time()
                way(photo)
                seconds[name].append(time.process_time() - start)
    baseline = statistics.median(seconds["textbook (Pillow)"])
    expected = [textbook(photo).astype(int) for photo in data]
    rows = []
    for name, way in candidates.items():
        median = statistics.median(seconds[name])
        row = {"way": name, "ms": median * 1e3, "ratio": median / baseline}
        rows.append(row | accuracy([way(photo) for photo in data], expected))
    return rows


def accuracy(found: list[np.ndarray], expected: list[np.ndarray]) -> dict[str, float | None]:
    if found[0].shape != expected[0].shape:
        return {"mae": None, "mae_p99": None, "bias": None}
    differences = [one.astype(int) - other for one, other in zip(found, expected, strict=True)]
    absolute = [float(np.abs(difference).mean()) for difference in differences]
    return {
        "mae": statistics.mean(absolute),
        "mae_p99": float(np.quantile(absolute, 0.99)),
        "bias": max(abs(float(difference.mean())) for difference in differences),
    }


def show(title: str, rows: list[dict[str, float | str | None]]) -> None:
    table = Table(title=title)
    table.add_column("way")
    for column in ("CPU ms", "ratio", "MAE", "MAE p99", "bias"):
        table.add_column(column, justify="right")
    for row in rows:
        exact = [f"{row[key]:.2f}" if row[key] is not None else "-" for key in ("mae", "mae_p99", "bias")]
        table.add_row(row["way"], f"{row['ms']:.2f}", f"{row['ratio']:.2f}", *exact)
    Console().print(table)


@click.command(help=__doc__.splitlines()[0])
@click.option("--small", "small_count", default=60, show_default=True, help="Photos of 500x375.")
@click.option("--large", "large_count", default=8, show_default=True, help="Photos of 4000x3000.")
@click.option("--rounds", default=5, show_default=True, help="Times each photo is decoded in each way.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the results here.")
def main(small_count: int, large_count: int, rounds: int, json_file: Path | None) -> None:
    candidates = ways()
    results = {}
    for title, data in (("500x375", photos.small(small_count)), ("4000x3000", photos.large(large_count))):
        mean_kb = statistics.mean(len(photo) for photo in data) / 1e3
        results[title] = measure(data, candidates, rounds if title == "500x375" else max(1, rounds // 2))
        show(f"{len(data)} JPEGs of {title}, {mean_kb:.0f} KB on average", results[title])
    if json_file:
        json_file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
