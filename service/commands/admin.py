"""`convoy status`, `load`, `unload` and `route`: operating a running server through its admin API."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

import click

from service.commands import options
from service.errors import ConfigurationError
from service.exits import ServerUnreachableError

if TYPE_CHECKING:
    from convoy.v1 import admin_pb2 as pb
    from convoy.v1 import admin_pb2_grpc as pb_grpc

_admin = click.option(
    "--admin",
    default="localhost:8502",
    envvar="CONVOY_ADMIN",
    show_envvar=True,
    show_default=True,
    help="Address of the admin API, host:port; the server opens it with --admin-port.",
)
_version = click.option("--version", type=options.VERSION, help="One version.  [default: by the model's policy]")

# A load includes warm-up, and on some devices the compilation of an engine; the server does one at a time.
_timeout = click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    default=900.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for the answer; a load that has begun goes on after that.",
)
_STATUS_TIMEOUT_S = 30.0

_WAIT_LONGER = (
    "it makes one change at a time, and ends the load that it has begun. Look with `convoy status`, or wait longer "
    "with --timeout"
)


@contextlib.contextmanager
def _stub(address: str, *, when_late: str = _WAIT_LONGER) -> Iterator[pb_grpc.AdminStub]:
    """A stub, with errors of the server turned into those of the command line; advice for when its answer is late."""
    import grpc
    from convoy.v1 import admin_pb2_grpc as pb_grpc

    from service.client import refusal

    with grpc.insecure_channel(address) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=3)
        except grpc.FutureTimeoutError:
            raise ServerUnreachableError(
                f"no admin API answers at {address}; start the server with --admin-port, or name another with --admin"
            ) from None
        try:
            yield pb_grpc.AdminStub(channel)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise ServerUnreachableError(f"{address} did not answer in time: {when_late}") from None
            raise refusal(error) from None


@click.command()
@_admin
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
def status(admin: str, as_json: bool) -> None:
    """Show what a server serves, how it is routed, what is being loaded, failed to load, or was unloaded.

    \b
    Examples:
      convoy status
      convoy status --admin localhost:9502 --json
    """
    from convoy.v1 import admin_pb2 as pb
    from google.protobuf.json_format import MessageToDict

    with _stub(admin, when_late="it is stuck, or has no CPU; its log may say why") as stub:
        reply = stub.GetStatus(pb.GetStatusRequest(), timeout=_STATUS_TIMEOUT_S)
    if as_json:
        click.echo(json.dumps(MessageToDict(reply, preserving_proto_field_name=True), ensure_ascii=False, indent=2))
        return
    if not reply.models:
        click.echo("nothing is served")
    for model in reply.models:
        numbers = {served.version for served in model.versions}
        state = "unloaded" if model.unloaded else "not served"
        routing = _routing_text(model.routing, numbers) if numbers else state
        click.echo(f"{click.style(model.model, bold=True)}  {routing}")
        split = numbers.intersection(model.routing.traffic)
        for served in model.versions:
            answers = ", answers" if (served.version in split if split else served.is_default) else ""
            click.echo(f"  version {served.version}: {served.architecture} on {served.provider}{answers}")
        if model.HasField("loading"):
            click.echo(f"  version {model.loading.version} is being loaded ({model.loading.seconds:.0f} s so far)")
        for number in () if model.unloaded else model.unloaded_versions:
            click.echo(f"  version {number}: unloaded")
        for failure in model.failures:
            click.secho(f"  version {failure.version} failed to load: {failure.reason}", fg="red")


@click.command()
@click.argument("model")
@_version
@_timeout
@_admin
def load(model: str, version: int | None, timeout_s: float, admin: str) -> None:
    """Load MODEL, or load it again from what is now in the repository.

    The new version is verified, warmed up and checked beside the old one, which answers until then. If it cannot be
    served, the old one serves on and the command ends with 5.

    \b
    Examples:
      convoy load photos
      convoy load photos --version 7
    """
    from convoy.v1 import admin_pb2 as pb

    with _stub(admin) as stub:
        reply = stub.LoadModel(pb.LoadModelRequest(model=model, version=version), timeout=timeout_s)
    numbers = ", ".join(str(served.version) for served in reply.versions)
    click.echo(f"{model}: version {numbers} in service")


@click.command()
@click.argument("model")
@_version
@_timeout
@_admin
def unload(model: str, version: int | None, timeout_s: float, admin: str) -> None:
    """Take MODEL, or one version of it, out of service. Calls that have begun are answered.

    \b
    Examples:
      convoy unload photos
      convoy unload photos --version 6
    """
    from convoy.v1 import admin_pb2 as pb

    with _stub(admin) as stub:
        stub.UnloadModel(pb.UnloadModelRequest(model=model, version=version), timeout=timeout_s)
    click.echo(f"{model}{'' if version is None else f' version {version}'}: out of service")


@click.command()
@click.argument("model")
@click.option("--versions", default="latest", show_default=True, help="latest, latest:N, all, or numbers like 1,3.")
@click.option(
    "--traffic", help="Split for requests that name no version, such as 1=90,2=10.  [default: all to the latest]"
)
@click.option("--shadow", type=options.VERSION, help="Version that gets a copy of every request, never answers.")
@_timeout
@_admin
def route(model: str, versions: str, traffic: str | None, shadow: int | None, timeout_s: float, admin: str) -> None:
    """Change which versions of MODEL are loaded and which of them answers.

    \b
    Examples:
      convoy route photos --traffic 1=90,2=10      # canary: one request in ten goes to version 2
      convoy route photos --versions 1 --shadow 2  # compare version 2 without answering from it
      convoy route photos --versions 1             # back to version 1
    """
    from convoy.v1 import admin_pb2 as pb

    wanted = pb.Routing(versions=versions, traffic=_split(traffic), shadow=shadow)
    with _stub(admin) as stub:
        reply = stub.SetRouting(pb.SetRoutingRequest(model=model, routing=wanted), timeout=timeout_s)
    click.echo(f"{model}: {_routing_text(reply.routing, set(reply.routing.traffic))}")


def _split(text: str | None) -> dict[int, float]:
    try:
        pairs = [part.split("=") for part in text.split(",")] if text else []
        split = {options.VERSION.convert(int(number), None, None): float(weight) for number, weight in pairs}
    except (ValueError, click.BadParameter):
        raise ConfigurationError(f"--traffic {text}: write version=weight pairs, such as 1=90,2=10") from None
    if len(split) < len(pairs):
        raise ConfigurationError(f"--traffic {text}: a version is there twice")
    return split


def _routing_text(routing: pb.Routing, served: Collection[int]) -> str:
    """Who answers, of the versions that are in service: they share what was meant for the others."""
    shares = {number: weight for number, weight in sorted(routing.traffic.items()) if number in served}
    total = sum(shares.values())
    split = ", ".join(f"{weight / total:.0%} to version {number}" for number, weight in shares.items())
    absent = [str(number) for number in sorted(routing.traffic) if number not in served]
    missing = f" (version {', '.join(absent)} is not in service)" if absent else ""
    shadow = f"; version {routing.shadow} shadows" if routing.HasField("shadow") else ""
    return f"serves {routing.versions}; {split or 'all to the latest'}{missing}{shadow}"
