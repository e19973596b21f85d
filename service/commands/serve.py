"""`convoy serve`."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click

from service.settings import Settings


def _flags(command: Callable[..., None]) -> Callable[..., None]:
    """One flag for each setting, made from its declaration."""
    for name, field in reversed(Settings.model_fields.items()):
        if get_origin(field.annotation) is Mapping:  # a table has no flag
            continue
        kind, multiple = _click_type(field.annotation)
        default = ", ".join(field.default) if isinstance(field.default, tuple) else field.default
        told = "" if default in ("", None) else f" [default: {default}]"
        command = click.option(
            f"--{name.replace('_', '-')}",
            name,
            type=kind,
            multiple=multiple,
            default=None,
            help=f"{field.description}{told}",
        )(command)
    return command


def _click_type(annotation: Any) -> tuple[Any, bool]:
    """The type of a flag, and whether it may be given several times."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return click.Choice([str(choice) for choice in arguments]), False
    if origin is tuple:
        return str, True
    if origin is Annotated:
        return _click_type(arguments[0])
    if origin in (Union, UnionType):
        return _click_type(next(kind for kind in arguments if kind is not type(None)))
    return (click.Path(path_type=Path) if annotation is Path else annotation), False


@click.command()
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="CONVOY_CONFIG",
    help="Settings file (YAML). Environment variables CONVOY_<SETTING> and flags win over it.",
)
@_flags
def serve(config: Path | None, **flags: Any) -> None:
    """Serve the models of a repository over gRPC.

    Prints `ready` when it takes traffic. SIGTERM or Ctrl-C drains: calls in flight are answered, new ones are refused,
    and it ends with 0. A second one, half a second later or more, cancels what is left.

    \b
    Examples:
      convoy serve --repository models
      convoy serve --repository models --host 0.0.0.0 --port 8500 --http-port 8501
      CONVOY_MAX_BATCH_SIZE=64 convoy serve --config convoy.yaml
    """
    from service import logs, settings, threads
    from service.server import serve as run

    given = {name: value for name, value in flags.items() if value not in (None, ())}
    chosen = settings.load(config, given)
    logs.configure(chosen.log_level, chosen.log_format)
    for variable, meant in settings.mistyped(os.environ).items():
        logs.get("serve").warning("environment variable sets nothing", variable=variable, meant=meant)
    # What was imported lives as long as the process; without this every full collection looks at all of it, and all
    # requests wait.
    gc.freeze()
    threads.answers_soon()
    run(chosen)
