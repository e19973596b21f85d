"""`convoy import`: an ONNX classifier from elsewhere becomes a model version.

Imported by `convoy --help`, with or without the `training` extra: everything heavy is imported inside the command.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click

from training.cli import require_extra

_PRESETS = ("imagenet-torchvision", "imagenet-caffe-bgr", "tf-inception", "zero-one", "none")


def _numbers(_: click.Context, __: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    """One number, or three separated by commas."""
    try:
        return None if value is None else tuple(float(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a number or a list like 0.485,0.456,0.406") from None


def _size(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """Height and width in pixels: `224`, or `240x320`."""
    if value is None:
        return None
    found = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", value)
    if not found:
        raise click.BadParameter(f"{value!r} is not a size like 224 or 240x320")
    return int(found[1]), int(found[2] or found[1])


@click.command("import", short_help="Turn an ONNX classifier into a model version.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--labels", type=click.Path(path_type=Path), required=True, help="Text file, one class per line.")
@click.option("--name", help="Model name; by default that of the file.")
@click.option(
    "--repository",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("models"),
    show_default=True,
    help="Model repository: the version appears as REPOSITORY/NAME/<number>/.",
)
@click.option(
    "--preset",
    type=click.Choice(_PRESETS),
    default=_PRESETS[0],
    show_default=True,
    help="How the model wants its pixels. The options below override it one by one.",
)
@click.option("--mean", metavar="R,G,B", callback=_numbers, help="Subtracted, of pixels in 0..1; red, green, blue.")
@click.option(
    "--std", metavar="R,G,B", callback=_numbers, help="Divides afterwards, of pixels in 0..1; red, green, blue."
)
@click.option("--order", type=click.Choice(("rgb", "bgr")), help="Channel order that the model wants.")
@click.option("--resize", type=click.Choice(("crop", "stretch")), help="Cut the centre, or squeeze the whole image.")
@click.option("--shorter-side", type=click.IntRange(1, 8192), help="Pixels of the shorter side before a crop.")
@click.option("--interpolation", type=click.Choice(("bilinear", "bicubic")), default="bilinear", show_default=True)
@click.option(
    "--layout", type=click.Choice(("nchw", "nhwc")), help="Where the channels are, if the shape does not tell."
)
@click.option("--size", metavar="H[xW]", callback=_size, help="Pixels of the input, if the graph takes any.")
@click.option("--output", help="Output with the scores, if there are several.")
@click.option("--scores", type=click.Choice(("logits", "probabilities")), help="Their meaning, if not to be found out.")
@click.option(
    "--canary",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Image to prove the version with at every load; repeatable. Without, a few are drawn.",
)
@click.option("--source", default="imported", show_default=True, help="Where the weights come from.")
@click.option("--licence", default="unspecified", show_default=True, help="Licence of the weights.")
def import_model(
    model: Path, labels: Path, name: str | None, repository: Path, source: str, licence: str, **choices: Any
) -> None:
    """Turn MODEL, an ONNX image classifier from anywhere, into a model version that `convoy serve` loads.

    The graph may take float images as NCHW or NHWC with a fixed or dynamic batch, and give logits or probabilities.
    Normalisation moves into the graph, external data into the file, a fixed batch becomes dynamic, and the version has
    to answer like the original in batches of 1, 2, 7 and 64 images.

    \b
    Examples:
      convoy import resnet50.onnx --labels imagenet.txt
      convoy import keras.onnx --labels names.txt --preset imagenet-caffe-bgr --name keras-resnet
      convoy import own.onnx --labels names.txt --mean 0.5 --std 0.25 --resize stretch --canary cat.jpg
    """
    require_extra()
    from service.artifact import Weights
    from training.conventions import Request
    from training.folders import name_for
    from training.importer import import_version

    request = Request(
        model=model,
        labels=labels,
        name=name or name_for(model),
        weights=Weights(source=source, licence=licence),
        **choices,
    )
    version = import_version(request, repository)
    click.echo(f"Wrote {version}")
    click.echo(f"Model card: {version / 'card.html'}")
    click.echo(_understood(version, request.preset))
    click.echo("Next:")
    click.echo(f"  convoy serve --repository {shlex.quote(str(repository))}")
    click.echo(f"  convoy classify IMAGE --server localhost:8500 --model {request.name}")


def _understood(version: Path, preset: str) -> str:
    """How images will be treated: most of it is assumed, and answers depend on it."""
    from service import artifact

    manifest = artifact.read_manifest(version)
    mean, std = (", ".join(f"{value:.4g}" for value in manifest.recipe[key]) for key in ("mean", "std"))
    return (
        f"Images: {manifest.input.describe()}, {manifest.recipe['channel_order']}, minus {mean}, divided by {std} "
        f"(preset {preset}, but for the options given). If the model was trained otherwise, its answers are wrong"
    )
