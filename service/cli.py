"""The `convoy` command.

Serving commands live here; those of training join through the entry-point group `convoy.commands`, so that nothing of
training is imported by the service. Commands import what they need when they run: `convoy --help` stays fast.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args, get_origin

import click

from service import exits
from service.errors import ConfigurationError, ConvoyError, DataError
from service.exits import Exit, PartialError

if TYPE_CHECKING:
    from convoy.v1 import image_classifier_pb2 as pb

    from service.client import Client

_GROUP = "convoy.commands"
_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"})
_REQUEST_BYTES = 8 << 20
_REQUEST_IMAGES = 16

_EPILOG = f"""\b
Exit codes:
{exits.table()}"""


class _Commands(click.Group):
    """The group, with commands of other packages loaded when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *(point.name for point in metadata.entry_points(group=_GROUP))})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        points = metadata.entry_points(group=_GROUP, name=cmd_name)
        command = next(iter(points)).load() if points else None
        return command if isinstance(command, click.Command) else None


@click.group(cls=_Commands, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="convoy", prog_name="convoy")
def cli() -> None:
    """Train image classifiers and serve them over gRPC.

    \b
    Three commands take a folder of photos to an endpoint:
      convoy train PHOTOS --model resnet18 --epochs 10 --repository models --name photos
      convoy serve --repository models
      convoy classify holiday.jpg --model photos
    """


def main() -> NoReturn:
    """Entry point: runs a command, and turns what went wrong into one line and an exit code."""
    try:
        cli.main(standalone_mode=False)
        code: int = Exit.OK
    except click.exceptions.Exit as finished:
        code = finished.exit_code
    except click.ClickException as error:
        error.show()
        code = Exit.USAGE
    except (click.Abort, KeyboardInterrupt):
        code = Exit.CTRL_C
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone; there is nobody to tell
        code = Exit.OK
    except ConvoyError as error:
        click.secho(f"convoy: {error}", err=True, fg="red")
        code = exits.code_of(error)
    sys.exit(code)


# --- serve


def _flags(command: Callable[..., None]) -> Callable[..., None]:
    """One flag for each setting, made from its declaration."""
    from service.settings import Settings

    for name, field in reversed(Settings.model_fields.items()):
        kind, multiple = _click_type(field.annotation)
        default = "" if field.default in ((), None) else f" [default: {field.default}]"
        command = click.option(
            f"--{name.replace('_', '-')}",
            name,
            type=kind,
            multiple=multiple,
            default=None,
            help=f"{field.description}{default}",
        )(command)
    return command


def _click_type(annotation: Any) -> tuple[Any, bool]:
    if get_origin(annotation) is Literal:
        return click.Choice([str(choice) for choice in get_args(annotation)]), False
    if get_origin(annotation) is tuple:
        return str, True
    if isinstance(annotation, UnionType):
        return _click_type(next(kind for kind in get_args(annotation) if kind is not type(None)))
    return (click.Path(path_type=Path) if annotation is Path else annotation), False


@cli.command()
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="CONVOY_CONFIG",
    help="Settings file (YAML). Environment variables CONVOY_<SETTING> and flags win over it.",
)
@_flags
def serve(config: Path | None, **flags: Any) -> None:
    """Serve the models of a repository over gRPC.

    Prints `ready` when it takes traffic. SIGTERM or Ctrl-C drains: calls in flight are answered, new ones are refused.

    \b
    Examples:
      convoy serve --repository models
      convoy serve --repository models --host 0.0.0.0 --port 8500 --http-port 8501
      CONVOY_MAX_BATCH_SIZE=64 convoy serve --config convoy.yaml
    """
    from service import logs, settings
    from service.server import serve as run

    given = {name: value for name, value in flags.items() if value not in (None, ())}
    chosen = settings.load(config, given)
    logs.configure(chosen.log_level, chosen.log_format)
    run(chosen)


# --- classify


_server = click.option(
    "--server", default="localhost:8500", envvar="CONVOY_SERVER", show_default=True, help="Address, host:port."
)
_timeout = click.option(
    "--timeout",
    "timeout_s",
    default=30.0,
    show_default=True,
    type=click.FloatRange(min=0.001),
    help="Seconds per call.",
)


@cli.command()
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@_server
@click.option("--model", default="", help="Name of the model. May be left out if the server has only one.")
@click.option("--version", type=click.IntRange(min=1), help="Version of the model.  [default: the latest]")
@click.option("--top-k", default=5, show_default=True, type=click.IntRange(min=1), help="Classes for each image.")
@click.option(
    "--min-score", default=0.0, show_default=True, type=click.FloatRange(0, 1), help="Leave out classes below this."
)
@_timeout
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each image, on a line of its own.")
def classify(
    images: Sequence[str],
    server: str,
    model: str,
    version: int | None,
    top_k: int,
    min_score: float,
    timeout_s: float,
    as_json: bool,
) -> None:
    """Classify images with a running server.

    IMAGE is a file, a folder (every image below it), or - for one image on standard input.

    \b
    Examples:
      convoy classify cat.jpg dog.png --model pets --top-k 3
      convoy classify photos/ --server gpu-box:8500 --json > results.jsonl
      curl -s URL | convoy classify - --json
    """
    from convoy.v1 import image_classifier_pb2 as pb

    from service.client import Client

    files = list(_files(images))
    failed = answered = 0
    with Client(server, timeout_s) as client:
        for batch in _batches(files):
            request = pb.ClassifyRequest(
                model=model, version=version, images=[data for _, data in batch], top_k=top_k, min_score=min_score
            )
            for (name, _), outcome in zip(batch, _outcomes(client, request), strict=True):
                failed += outcome.WhichOneof("outcome") == "error"
                answered += 1
                click.echo(_as_json(name, outcome) if as_json else _as_text(name, outcome))
    if failed == answered:
        raise DataError("the image could not be classified" if failed == 1 else f"none of the {failed} images could be")
    if failed:
        raise PartialError(f"{failed} of {answered} images could not be classified")


def _files(arguments: Iterable[str]) -> Iterator[Path]:
    """The files named, and those in the folders named, sorted."""
    for argument in arguments:
        path = Path(argument)
        if argument == "-" or path.is_file():
            yield path
        elif path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
            if not found:
                raise DataError(f"the folder {path} holds no image ({', '.join(sorted(_SUFFIXES))})")
            yield from found
        else:
            raise DataError(f"{path} does not exist")


def _read(path: Path) -> bytes:
    try:
        return sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _batches(files: Iterable[Path]) -> Iterator[list[tuple[str, bytes]]]:
    """Files with their bytes, as many as fit into one request."""
    batch: list[tuple[str, bytes]] = []
    size = 0
    for path in files:
        data = _read(path)
        if batch and (size + len(data) > _REQUEST_BYTES or len(batch) == _REQUEST_IMAGES):
            yield batch
            batch, size = [], 0
        batch.append((str(path), data))
        size += len(data)
    if batch:
        yield batch


def _outcomes(client: Client, request: pb.ClassifyRequest) -> Sequence[pb.ImageResult]:
    """The server's result for each image; when it refused all of them, each one's own refusal."""
    from convoy.v1 import image_classifier_pb2 as pb

    from service.exits import ServerRefusedError

    try:
        return client.classify(request).results
    except ServerRefusedError as refused:
        if not str(refused).startswith("INVALID_ARGUMENT: image 0: "):
            raise
        faults = str(refused).removeprefix("INVALID_ARGUMENT: ").split("; image ")
        return [pb.ImageResult(error=pb.ImageError(message=fault.partition(": ")[2])) for fault in faults]


def _as_json(name: str, outcome: pb.ImageResult) -> str:
    from google.protobuf.json_format import MessageToDict

    body = MessageToDict(outcome, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    body.get("classification", {}).pop("logits", None)
    return json.dumps({"file": name, **body.get("classification", body)}, ensure_ascii=False)


def _as_text(name: str, outcome: pb.ImageResult) -> str:
    if outcome.WhichOneof("outcome") == "error":
        return f"{click.style(name, bold=True)}\n  {click.style('cannot be used: ' + outcome.error.message, fg='red')}"
    lines = [click.style(name, bold=True)]
    for found in outcome.classification.classes:
        bar = "█" * round(found.score * 20)
        lines.append(f"  {found.score:7.2%}  {click.style(f'{bar:<20}', fg='cyan')}  {found.label}")
    return "\n".join(lines if len(lines) > 1 else [*lines, "  no class above the minimum score"])


# --- models and inspect


@cli.command()
@_server
@_timeout
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each version.")
def models(server: str, timeout_s: float, as_json: bool) -> None:
    """List what a running server serves."""
    from convoy.v1 import image_classifier_pb2 as pb
    from google.protobuf.json_format import MessageToDict
    from rich.console import Console
    from rich.table import Table

    from service.client import Client

    with Client(server, timeout_s) as client:
        found = client.models()
    if as_json:
        for summary in found:
            body = MessageToDict(summary, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
            click.echo(json.dumps({**body, "version": summary.version}))
        return
    table = Table("model", "version", "state", "architecture", "classes", "provider", "default")
    for summary in found:
        table.add_row(
            summary.name,
            str(summary.version),
            pb.State.Name(summary.state),
            summary.architecture,
            str(summary.num_classes),
            summary.provider,
            "yes" if summary.is_default else "",
        )
    Console().print(table)


@cli.command()
@click.argument("version_dir", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
def inspect(version_dir: Path, as_json: bool) -> None:
    """Verify a model version on disk, and show what it is.

    VERSION_DIR is <repository>/<model>/<number>. Checks every file against its SHA-256, the graph against the labels,
    and runs the canary images on the CPU; ends with 3 if anything is wrong.
    """
    from service import artifact, canary, engine, providers, resources

    if not version_dir.is_dir():
        raise ConfigurationError(f"{version_dir} is no directory; name <repository>/<model>/<number>")
    version = artifact.load(version_dir)
    plan = providers.cpu_plan(engine.available_providers(), resources.cpu_count())
    difference = canary.check(version, engine.OrtEngine(version, plan, max_batch_size=8))
    if as_json:
        click.echo(version.manifest.model_dump_json(indent=2))
        return
    for name, value in _described(version, difference):
        click.echo(f"{click.style(f'{name:<13}', bold=True)}{value}")


def _described(version: Any, difference: float) -> Iterator[tuple[str, str]]:
    manifest = version.manifest
    shown = ", ".join(manifest.classes[:12]) + (", …" if len(manifest.classes) > 12 else "")  # noqa: PLR2004
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
