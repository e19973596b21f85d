"""The local copies of a remote repository, which several processes may share.

Two servers on one machine have the same cache unless they are told otherwise, and pods may share a volume. What one of
them writes or replaces, another may be reading.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from service import publication
from service.beside import left_beside
from service.locks import is_locked, locked

# A directory is locked within microseconds of being made; without a lock after so long, its maker has died.
_ABANDONED_S = 60.0


@contextlib.contextmanager
def staging(mirror: Path, name: str, number: int) -> Iterator[Path]:
    """An empty directory beside a version's place, which readers ignore; it is gone afterwards, or has been moved.

    What processes that were killed left there is removed: after a minute, or where locks are not known a day.
    """
    _sweep(mirror / name)
    path = publication.staging_dir(mirror, name, number)
    try:
        with locked(path):
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def replacing(mirror: Path) -> contextlib.AbstractContextManager[None]:
    """While it lasts, no other process replaces a copy."""
    return locked(mirror / ".lock")


def replace(target: Path, staging: Path) -> None:
    """Puts a finished copy where another one may be. Call it while `replacing`."""
    aside = staging.with_name(f"{staging.name}.old")
    with contextlib.suppress(FileNotFoundError):
        target.rename(aside)  # who has opened its files goes on reading them
    staging.rename(target)
    shutil.rmtree(aside, ignore_errors=True)


def _sweep(model: Path) -> None:
    for leftover in left_beside(model):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > _ABANDONED_S and not is_locked(leftover):
                shutil.rmtree(leftover, ignore_errors=True)
