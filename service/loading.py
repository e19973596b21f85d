"""What is said of a load: that it lasts, and what its failure means."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service import faults, logs
from service.errors import ArtifactError, ConvoyError, OutOfMemoryError, OutOfReachError

_log = logs.get("repository")

# A load that takes longer is told, every so many seconds.
_LONG_LOAD_S = 60.0


@contextmanager
def told_while_it_lasts(name: str, number: int) -> Iterator[None]:
    """Logs a load that takes long, again and again: an engine may be built for minutes, a file system may hang."""
    began = time.monotonic()

    async def tell() -> None:
        while True:
            await asyncio.sleep(_LONG_LOAD_S)
            took_s = round(time.monotonic() - began)
            _log.warning("model is still being loaded", model=name, version=number, seconds=took_s)

    telling = asyncio.create_task(tell())
    try:
        yield
    finally:
        telling.cancel()


def meaning(error: Exception, version: str, path: Path | None) -> ConvoyError:
    """What it means that a version cannot be loaded: `path` is its directory, if it has been fetched."""
    if isinstance(error, ArtifactError) and path is not None and not path.is_dir():
        # Another process may share the cache: what it removes is fetched again.
        return OutOfReachError(f"{path} has been removed meanwhile: {error}")
    if isinstance(error, ConvoyError):
        return error
    if isinstance(error, OSError):
        return OutOfReachError(f"{version} cannot be read: {error}")
    if isinstance(error, MemoryError):
        return OutOfMemoryError(f"there is not enough memory to load {version}")
    if faults.is_shortage(error):
        return OutOfReachError(f"{version} cannot be loaded now: {error}")
    _log.error("a version cannot be loaded for no known reason", version=version, exc_info=error)
    return ArtifactError(f"{version} cannot be loaded: {type(error).__name__}: {error}")
