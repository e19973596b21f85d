"""Options that several commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from service.errors import ConfigurationError

_file = click.Path(path_type=Path, dir_okay=False)

# Numbers of the API that travel in fixed widths.
VERSION = click.IntRange(1, 2**63 - 1)
TOP_K = click.IntRange(1, 2**32 - 1)

server = click.option(
    "--server",
    default="localhost:8500",
    envvar="CONVOY_SERVER",
    show_envvar=True,
    show_default=True,
    help="Address, host:port.",
)
timeout = click.option(
    "--timeout",
    "timeout_s",
    default=30.0,
    show_default=True,
    type=click.FloatRange(min=0.001),
    help="Seconds per call.",
)


def tls(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the flags for TLS, and hands the command what they name as `tls`; None without them."""

    @click.option("--tls-ca", type=_file, help="Certificate that the server's is signed by (PEM): speak TLS.")
    @click.option("--tls-certificate", type=_file, help="The client's own certificate (PEM), where the server asks.")
    @click.option("--tls-key", type=_file, help="Key of --tls-certificate (PEM).")
    @functools.wraps(command)
    def with_tls(
        tls_ca: Path | None, tls_certificate: Path | None, tls_key: Path | None, *args: Any, **kwargs: Any
    ) -> Any:
        from service.client import ClientTls

        if (tls_certificate is None) != (tls_key is None):
            raise ConfigurationError("--tls-certificate and --tls-key belong together; give both")
        if tls_ca is None and tls_certificate is not None:
            raise ConfigurationError("--tls-certificate needs --tls-ca, too")
        files = None if tls_ca is None else ClientTls(tls_ca, tls_certificate, tls_key)
        return command(*args, tls=files, **kwargs)

    return with_tls
