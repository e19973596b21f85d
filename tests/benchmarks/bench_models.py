"""The model versions that benchmarks serve: random weights, real photos, exported like any other model.

python tests/benchmarks/bench_models.py FOLDER resnet18 resnet50

Random weights cost the same time as trained ones. Their int8 variant is kept whatever it does to the accuracy, which
means nothing here. Each version has weights of its own, so that an answer tells which version gave it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import photos
import torch

from service.artifact import Weights
from service.preprocess import preprocess
from training.export import export_version
from training.models import create, describe
from training.trained import Trained

PHOTOS = 100


def photo_folder(folder: Path) -> Path:
    """Photo-like JPEGs of 500x375, made once."""
    target = folder / "photos"
    if not target.is_dir():
        target.mkdir(parents=True)
        for number, data in enumerate(photos.small(PHOTOS)):
            (target / f"{number:03d}.jpg").write_bytes(data)
    return target


def benchmark_model(folder: Path, name: str, number: int = 1, variants: Sequence[str] = ("int8",)) -> Path:
    """`<folder>/models/<name>/<number>`, exported once; earlier versions have to be there."""
    version = folder / "models" / name / str(number)
    if version.is_dir():
        return version
    torch.manual_seed(number - 1)
    entry = describe(name)
    classes = entry.config.num_classes
    model = create(name, classes, entry.input.channels).eval()
    paths = sorted(photo_folder(folder).glob("*.jpg"))
    pixels = np.stack([preprocess(path.read_bytes(), entry.input) for path in paths])
    trained = Trained(
        model=model,
        name=name,
        architecture=name,
        classes=tuple(f"class {index}" for index in range(classes)),
        input=entry.input,
        mean=entry.mean,
        std=entry.std,
        temperature=1.0,
        metrics={},
        data={},
        recipe={},
        weights=Weights(source="random"),
        canary=paths[:2],
        calibration=pixels[:32],
        holdout=pixels[32:],
        holdout_labels=np.zeros(len(pixels) - 32, np.int64),
        history=[],
        holdout_paths=paths[32:],
    )
    return export_version(trained, folder / "models", variants=variants, budget_points=100)


if __name__ == "__main__":
    for each in sys.argv[2:]:
        click.echo(benchmark_model(Path(sys.argv[1]), each))
