"""`convoy inspect`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from service.errors import ConfigurationError

if TYPE_CHECKING:
    from service.artifact import ModelVersion

_SHOWN_CLASSES = 12


@click.command()
@click.argument("version_dir", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
def inspect(version_dir: Path, as_json: bool) -> None:
    """Verify a model version on disk, and show what it is.

    VERSION_DIR is <repository>/<model>/<number>. Checks every file against its SHA-256, the graph against the labels,
    and runs the canary images on the CPU; ends with 3 if anything is wrong.

    \b
    Examples:
      convoy inspect models/photos/1
      convoy inspect models/photos/1 --json
    """
    from service import artifact, canary, engine, providers

    if not version_dir.is_dir():
        raise ConfigurationError(f"{version_dir} is no directory; name <repository>/<model>/<number>")
    version = artifact.load(version_dir)
    difference = canary.check(version, engine.build(version, providers.cpu_plan(1), max_batch_size=8)[0])
    if as_json:
        click.echo(version.manifest.model_dump_json(indent=2))
        return
    for name, value in _described(version, difference):
        click.echo(f"{click.style(f'{name:<13}', bold=True)}{value}")


def _described(version: ModelVersion, difference: float) -> Iterator[tuple[str, str]]:
    manifest = version.manifest
    shown = ", ".join(manifest.classes[:_SHOWN_CLASSES])
    shown += ", …" if len(manifest.classes) > _SHOWN_CLASSES else ""
    yield (
        "model",
        f"{manifest.name} version {manifest.version}, {manifest.architecture}, {manifest.created:%F %R}",
    )
    yield "classes", f"{len(manifest.classes)}: {shown}"
    spec = manifest.input
    yield "input", f"uint8[N, {spec.height}, {spec.width}, {spec.channels}], {spec.describe()}"
    yield "metrics", ", ".join(f"{name} {value:.4g}" for name, value in manifest.metrics.items()) or "none"
    for variant in manifest.variants:
        size = manifest.files[variant.file].size_bytes / (1 << 20)
        accuracy = "not measured" if variant.accuracy is None else f"{variant.accuracy:.2%}"
        yield "variant", f"{variant.name}: {variant.file}, {size:.2f} MiB, accuracy {accuracy}"
    for rejected in manifest.rejected_variants:
        yield "not kept", f"{rejected.name}: {rejected.reason}"
    yield "weights", f"{manifest.weights.source}; licence: {manifest.weights.licence}"
    yield "files", f"{len(manifest.files)} verified; model SHA-256 {version.digest}"
    yield "canary", f"{len(manifest.canary.images)} images, largest difference {difference:.2g}: passed"
