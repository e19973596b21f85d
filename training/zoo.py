"""`convoy zoo`: the architectures, what they cost and what they take.

Imported by `convoy --help`, with or without the `training` extra: everything heavy is imported inside the command.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from training.cli import require_extra

if TYPE_CHECKING:
    from rich.console import Console

    from training.models import Option


@click.command(short_help="List the architectures: size, cost, input, accuracy.")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--json", "as_json", is_flag=True, help="All figures, options and published files as JSON.")
def zoo(names: tuple[str, ...], as_json: bool) -> None:
    """List the architectures that can be trained; with NAME, their options and published weights.

    Parameters and multiply-adds are counted on the network itself, at its default input.

    \b
    Examples:
      convoy zoo
      convoy zoo resnet50 vgg16_bn
      convoy zoo --json
    """
    require_extra()
    from rich.console import Console

    from service import terminal
    from training import models

    console = terminal.console()
    with Console(stderr=True).status("Counting parameters and operations"):
        entries = [_entry(name) for name in names or models.names()]
    if as_json:
        click.echo(json.dumps(entries, indent=2))
    elif names:
        for entry in entries:
            _show(console, entry)
    else:
        _table(console, entries)


def _entry(name: str) -> dict[str, Any]:
    """All that is known of one architecture, as plain values."""
    from training.models import WEIGHTS_URL, describe
    from training.models.measure import measure

    architecture, cost = describe(name), measure(name)
    return {
        "name": name,
        "family": architecture.family,
        "parameters": cost.parameters,
        "multiply_adds": cost.multiply_adds,
        "classes": architecture.config.num_classes,
        "input": architecture.input.model_dump(mode="json"),
        "resize": architecture.input.describe(),
        "min_size": architecture.min_size,
        "mean": architecture.mean,
        "std": architecture.std,
        "options": [_option(option) for option in architecture.options],
        "weights": [
            {"file": w.file, "url": WEIGHTS_URL + w.file, "top1": w.top1, "shorter_side": w.shorter_side}
            for w in architecture.weights
        ],
    }


def _option(option: Option) -> dict[str, Any]:
    return {"name": option.name, "default": option.default, "range": option.range, "help": option.help}


def _table(console: Console, entries: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(
        caption="GMAC: 10^9 multiply-adds for one image. Top-1: of published ImageNet weights, in percent.\n"
        "`convoy zoo NAME` shows the options and the files."
    )
    table.add_column("Architecture")
    for heading in ("Parameters", "GMAC", "Input", "Smallest", "Top-1"):
        table.add_column(heading, justify="right")
    for entry in entries:
        top1 = max((w["top1"] for w in entry["weights"]), default=None)
        table.add_row(
            entry["name"],
            f"{entry['parameters']:,}",
            _gmac(entry),
            _size(entry),
            str(entry["min_size"]),
            "" if top1 is None else f"{top1:.2f}",
        )
    console.print(table)


def _show(console: Console, entry: dict[str, Any]) -> None:
    """One architecture in full."""
    console.print(f"[bold]{entry['name']}[/bold]  ({entry['family']})", markup=True, highlight=False)
    facts = {
        "parameters": f"{entry['parameters']:,} with {entry['classes']} classes",
        "cost": f"{_gmac(entry)} GMAC for one image",
        "input": f"{_size(entry)}; {entry['resize']}; at least {entry['min_size']}x{entry['min_size']}",
        "mean, std": f"{', '.join(map(str, entry['mean']))}; {', '.join(map(str, entry['std']))}",
    }
    rows = list(facts.items())
    rows += [(f"option {o['name']}", f"{o['help']} {_values(o)}") for o in entry["options"]]
    rows += [(f"{w['top1']:.2f}%", f"{w['url']} (shorter side {w['shorter_side']})") for w in entry["weights"]]
    _pairs(console, rows)


def _pairs(console: Console, rows: list[tuple[str, str]]) -> None:
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in rows:
        grid.add_row(f"  {name}", text)
    console.print(grid, highlight=False)
    console.print()


def _gmac(entry: dict[str, Any]) -> str:
    return f"{entry['multiply_adds'] / 1e9:.3g}"


def _size(entry: dict[str, Any]) -> str:
    return "{width}x{height}x{channels}".format_map(entry["input"])


def _values(option: dict[str, Any]) -> str:
    default = str(option["default"]).lower()
    return f"(default {default})" if option["range"] is None else f"(default {default}, {option['range']})"
