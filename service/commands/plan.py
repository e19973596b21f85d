"""`convoy plan`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from service.errors import ConfigurationError

if TYPE_CHECKING:
    from service.candidates import Machine
    from service.plan_cache import Row, Table

_COLOURS = {"chosen": "bold green", "slower": "", "refused": "red", "failed": "red", "skipped": "dim"}


@click.command()
@click.argument("version_dir", type=click.Path(path_type=Path))
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="CONVOY_CONFIG",
    help="Settings file (YAML) of the server: providers, options and limits are taken from it.",
)
@click.option("--providers", help="Providers to choose from, separated by commas; wins over the settings file.")
@click.option("--variant", help="Only this variant; wins over the settings file.")
@click.option("--refresh", is_flag=True, help="Measure again, even if this machine has measured before.")
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def plan(
    version_dir: Path, config: Path | None, providers: str | None, variant: str | None, refresh: bool, as_json: bool
) -> None:
    """Show what a model version would run on here, and what it was chosen from.

    VERSION_DIR is <repository>/<model>/<number>. Each variant is tried on each provider: it has to pass the canary,
    and the fastest that does is what `convoy serve` runs. The measurement is remembered; the server uses it, too.

    \b
    Examples:
      convoy plan models/photos/1
      convoy plan models/photos/1 --providers openvino,cpu --refresh
    """
    from service import artifact, logs, selection, settings

    if not version_dir.is_dir():
        raise ConfigurationError(f"{version_dir} is no directory; name <repository>/<model>/<number>")
    chosen = settings.load(config)
    logs.configure("warning", chosen.log_format)
    version = artifact.load(version_dir)
    machine = selection.this_machine()
    selector = selection.Selector(machine, chosen.cache_dir)
    wishes = chosen.wishes(version.manifest.name)
    if providers and providers.strip(" ,"):
        wishes = dataclasses.replace(wishes, providers=tuple(filter(None, map(str.strip, providers.split(",")))))
    if variant:
        wishes = dataclasses.replace(wishes, variant=variant)
    table, remembered = selector.table(version, wishes, refresh=refresh)
    if as_json:
        click.echo(table.model_dump_json(indent=2))
        return
    _show(table, machine, remembered=remembered)


def _show(table: Table, machine: Machine, *, remembered: bool) -> None:
    from rich import box
    from rich.table import Table as Grid

    from service import terminal
    from service.providers import short_name

    grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, padding=(0, 1))
    for name in ("", "variant", "provider", "precision", "runs", "images/s", "canary", "ready in"):
        grid.add_column(name, no_wrap=True, justify="right" if name in ("images/s", "canary", "ready in") else "left")
    for row in table.rows:
        grid.add_row(*_cells(row), style=_COLOURS[row.outcome])
    console = terminal.console(highlight=False)
    console.print(grid)
    for row in table.rows:
        if row.note:
            console.print(
                f"{row.outcome}: {row.variant} on {short_name(row.provider)} {row.precision}".rstrip() + f": {row.note}"
            )
    where = ", ".join([f"{machine.cpu_name or 'CPU'} ({machine.cpus} CPUs)", *machine.gpus])
    age = "remembered; --refresh measures again" if remembered else f"measured in {table.seconds:.1f} s"
    console.print(f"on {where}: batches of at most {table.largest_batch} images; {age}")


def _cells(row: Row) -> tuple[str, ...]:
    from service.providers import GPU_PROVIDERS, short_name

    return (
        row.outcome,
        row.variant,
        short_name(row.provider),
        row.precision,
        str(row.executors) if row.provider in GPU_PROVIDERS else f"{row.executors} x {row.threads}",
        f"{row.images_per_second:,.0f}" if row.images_per_second else "",
        f"{row.difference:.2g}" if row.difference is not None else "",
        f"{row.load_s:.2f} s" if row.load_s is not None else "",
    )
