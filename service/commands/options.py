"""Options that several commands share."""

from __future__ import annotations

import click

server = click.option(
    "--server", default="localhost:8500", envvar="CONVOY_SERVER", show_default=True, help="Address, host:port."
)
timeout = click.option(
    "--timeout",
    "timeout_s",
    default=30.0,
    show_default=True,
    type=click.FloatRange(min=0.001),
    help="Seconds per call.",
)
