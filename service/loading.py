"""What is said of a load: that it lasts, and what its failure means."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from service import faults, logs
from service.errors import ArtifactError, ConvoyError, OutOfMemoryError, OutOfReachError

_log = logs.get("repository")

# A load that takes longer is told, every so many seconds.
_LONG_LOAD_S = 60.0


@dataclass(frozen=True)
class Load:
    """A version that is being loaded. `began`: monotonic seconds."""

    name: str
    number: int
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """How long it has lasted."""
        return time.monotonic() - self.began

    @contextmanager
    def told_while_it_lasts(self) -> Iterator[None]:
        """Logs a load that takes long, again and again: an engine may be built for minutes, a file system may hang."""

        async def tell() -> None:
            while True:
                await asyncio.sleep(_LONG_LOAD_S)
                _log.warning(
                    "model is still being loaded", model=self.name, version=self.number, seconds=round(self.seconds)
                )

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
