"""`convoy classify`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from service.commands import options
from service.errors import DataError
from service.exits import PartialError
from service.files import IMAGES, OTHER_PICTURES, visible_below

if TYPE_CHECKING:
    from convoy.v1 import image_classifier_pb2 as pb

    from service.client import Client, ClientTls
    from service.exits import ServerRefusedError

_REQUEST_BYTES = 8 << 20
_REQUEST_IMAGES = 16


@click.command()
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@options.server
@click.option("--model", default="", help="Name of the model. May be left out if the server has only one.")
@click.option("--version", type=options.VERSION, help="Version of the model.  [default: the latest]")
@click.option("--top-k", default=5, show_default=True, type=options.TOP_K, help="Classes for each image.")
@click.option(
    "--min-score", default=0.0, show_default=True, type=click.FloatRange(0, 1), help="Leave out classes below this."
)
@options.timeout
@options.tls
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each image, on a line of its own.")
def classify(
    images: Sequence[str],
    *,
    server: str,
    model: str,
    version: int | None,
    top_k: int,
    min_score: float,
    timeout_s: float,
    tls: ClientTls | None,
    as_json: bool,
) -> None:
    """Classify images with a running server.

    IMAGE is a file, a folder (every image below it that is not hidden), or - for one image on standard input.

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
    with Client(server, timeout_s, tls=tls) as client:
        query = pb.ClassifyRequest(model=model, version=version, top_k=top_k, min_score=min_score)
        for batch in _batches(files):
            outcomes = _outcomes(client, query, [data for _, data in batch])
            for (name, _), outcome in zip(batch, outcomes, strict=True):
                failed += outcome.WhichOneof("outcome") == "error"
                answered += 1
                click.echo(_as_json(name, outcome) if as_json else _as_text(name, outcome))
    if failed == answered:
        raise DataError(
            "the image could not be classified" if failed == 1 else f"none of the {failed} images could be classified"
        )
    if failed:
        raise PartialError(f"{failed} of {answered} images could not be classified")


def _files(arguments: Iterable[str]) -> Iterator[Path]:
    """The files named, and those in the folders named, sorted."""
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            files = visible_below(path)
            found = [p for p in files if p.suffix.lower() in IMAGES]
            if not found:
                raise DataError(f"the folder {path} holds no image ({', '.join(sorted(IMAGES))})")
            if others := [p for p in files if p.suffix.lower() in OTHER_PICTURES]:
                more = f" and {len(others) - 1} more" if len(others) > 1 else ""
                click.echo(f"left out: {others[0]}{more}, in formats that are not read; save as JPEG or PNG", err=True)
            yield from found
        elif argument == "-" or path.exists():  # a file, or a pipe
            yield path
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


def _outcomes(client: Client, query: pb.ClassifyRequest, images: Sequence[bytes]) -> Sequence[pb.ImageResult]:
    """The server's result for each image; when it refused all of them, each one's own refusal.

    A server may allow less in one request than is sent here: what it refuses as a whole is sent in halves, down to the
    image that is too large alone.
    """
    from convoy.v1 import image_classifier_pb2 as pb

    from service.exits import ServerRefusedError

    request = pb.ClassifyRequest(images=images)
    request.MergeFrom(query)
    try:
        return client.classify(request).results
    except ServerRefusedError as refused:
        errors, too_much = _told(refused)
        if len(errors) == len(images):
            return [pb.ImageResult(error=error) for error in errors]
        if not errors and not too_much:
            raise
        if len(images) == 1:
            fault = pb.ImageError(reason=pb.ImageError.TOO_LARGE, message=refused.text)
            return [pb.ImageResult(error=fault)]
    middle = len(images) // 2
    return [*_outcomes(client, query, images[:middle]), *_outcomes(client, query, images[middle:])]


def _told(refused: ServerRefusedError) -> tuple[Sequence[pb.ImageError], bool]:
    """What a refusal says of the images, where it does; and whether fewer of them would do."""
    from convoy.v1 import image_classifier_pb2 as pb
    from google.rpc.error_details_pb2 import ErrorInfo

    errors, info = pb.ImageErrors(), ErrorInfo()
    for detail in refused.details:
        detail.Unpack(errors)
        detail.Unpack(info)
    # gRPC's own limit on the size of a message has a status and no details.
    too_much = info.reason == "TOO_MANY_IMAGES" or (refused.code == "RESOURCE_EXHAUSTED" and not refused.details)
    return errors.errors, too_much


def _as_json(name: str, outcome: pb.ImageResult) -> str:
    from google.protobuf.json_format import MessageToDict

    if outcome.WhichOneof("outcome") == "error":
        body = MessageToDict(outcome, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    else:
        found = outcome.classification.classes
        body = {
            "classes": [
                {"index": each.index, "label": each.label, "score": float(f"{each.score:.8g}")} for each in found
            ]
        }
    return json.dumps({"file": name, **body}, ensure_ascii=False)


def _as_text(name: str, outcome: pb.ImageResult) -> str:
    from service.terminal import printable

    if outcome.WhichOneof("outcome") == "error":
        return f"{click.style(name, bold=True)}\n  {click.style('cannot be used: ' + outcome.error.message, fg='red')}"
    lines = [click.style(name, bold=True)]
    for found in outcome.classification.classes:
        bar = "█" * round(found.score * 20)
        lines.append(f"  {found.score:7.2%}  {click.style(f'{bar:<20}', fg='cyan')}  {printable(found.label)}")
    return "\n".join(lines if len(lines) > 1 else [*lines, "  no class above the minimum score"])
