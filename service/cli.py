"""The `convoy` command.

Serving commands live here; those of training join through the entry-point group `convoy.commands`, so that nothing of
training is imported by the service. Commands import what they need when they run: `convoy --help` stays fast.
"""

from __future__ import annotations

import difflib
import importlib
import os
import signal
import sys
from importlib import metadata
from typing import Any, NoReturn

import click

from service import exits
from service.errors import ConvoyError
from service.exits import Exit

_GROUP = "convoy.commands"

# Command to the module below `service` that holds it.
_OWN = {
    "bench": "bench",
    "classify": "commands.classify",
    "inspect": "commands.inspect",
    "load": "commands.admin",
    "models": "commands.models",
    "plan": "commands.plan",
    "route": "commands.admin",
    "serve": "commands.serve",
    "status": "commands.admin",
    "unload": "commands.admin",
}

_EPILOG = f"""\b
Exit codes:
{exits.table()}"""


class _Commands(click.Group):
    """The group; a command's module is loaded when the command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return sorted({*_OWN, *(point.name for point in metadata.entry_points(group=_GROUP))})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        if cmd_name in _OWN:
            command = getattr(importlib.import_module(f"service.{_OWN[cmd_name]}"), cmd_name)
        else:
            points = metadata.entry_points(group=_GROUP, name=cmd_name)
            command = next(iter(points)).load() if points else None
        return command if isinstance(command, click.Command) else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            meant = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            raise (click.UsageError(f"{error.message} Did you mean {meant[0]!r}?", ctx) if meant else error) from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # The reader of our output has gone, as with `| head`: no fault, and nobody to tell. What is still in the
            # buffer would fail once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(Exit.OK)


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


def _is_no_text(argument: str) -> bool:
    """Whether it came as bytes that are no UTF-8: Python keeps them as lone surrogates."""
    return any("\ud800" <= character <= "\udfff" for character in argument)


def main() -> NoReturn:
    """Entry point: runs a command, and turns what went wrong into one line and an exit code."""
    # gRPC would write a line of its own for each failed handshake, as of a port scan, among the lines of the log.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    if sys.argv[1:2] == ["serve"]:
        # As the first process of a container it would not get a signal that it does not handle; the server handles it
        # once it is there.
        signal.signal(signal.SIGTERM, lambda *_: os._exit(Exit.OK))
    try:
        # Outside standalone mode click returns what a command passed to Context.exit; otherwise commands return None.
        returned = cli.main(prog_name="convoy", standalone_mode=False)
        code: int = returned if isinstance(returned, int) else Exit.OK
    except click.exceptions.Exit as finished:
        code = finished.exit_code
    except click.ClickException as error:
        error.show()
        code = Exit.USAGE
    except (click.Abort, KeyboardInterrupt):
        code = Exit.CTRL_C
    except UnicodeEncodeError as error:
        if not any(_is_no_text(argument) for argument in sys.argv):
            raise
        click.echo(f"convoy: an argument is not in UTF-8: {error.object!a}", err=True)
        code = Exit.USAGE
    except ConvoyError as error:
        click.secho(f"convoy: {error}", err=True, fg="red")
        code = exits.code_of(error)
    sys.exit(code)
