"""`convoy models`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from service.commands import options

if TYPE_CHECKING:
    from service.client import ClientTls


@click.command()
@options.server
@options.timeout
@options.tls
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each version.")
def models(server: str, timeout_s: float, tls: ClientTls | None, as_json: bool) -> None:
    """List what a running server serves.

    \b
    Examples:
      convoy models
      convoy models --server gpu-box:8500 --json
    """
    from convoy.v1 import image_classifier_pb2 as pb
    from google.protobuf.json_format import MessageToDict
    from rich.table import Table

    from service import terminal
    from service.client import Client

    with Client(server, timeout_s, tls=tls) as client:
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
    terminal.console().print(table)
