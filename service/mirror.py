"""The local copies of a remote repository, which several processes may share.

Two servers on one machine have the same cache unless they are told otherwise, and pods may share a volume. What one of
them writes or replaces, another may be reading.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

# A directory is locked within microseconds of being made; without a lock after so long, its maker has died.
_ABANDONED_S = 60.0
# Where the file system knows no locks.
_STALE_S = 24 * 3600.0


@contextlib.contextmanager
def staging(model: Path, number: int) -> Iterator[Path]:
    """An empty directory beside a version's place, which readers ignore; it is gone afterwards, or has been moved.

    What processes that were killed left there is removed.
    """
    _sweep(model)
    path = model / f".{number}.writing-{secrets.token_hex(8)}"
    path.mkdir(parents=True)
    try:
        with _lock(path):
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """While it lasts, no other process replaces a copy below."""
    with _lock(root / ".lock", os.O_CREAT | os.O_RDWR):
        yield


def replace(target: Path, staging: Path) -> None:
    """Puts a finished copy where another one may be. Call it while `locked`."""
    aside = staging.with_name(f"{staging.name}.old")
    with contextlib.suppress(FileNotFoundError):
        target.rename(aside)  # who has opened its files goes on reading them
    staging.rename(target)
    shutil.rmtree(aside, ignore_errors=True)


def _sweep(model: Path) -> None:
    for leftover in model.glob(".*.writing-*"):
        with contextlib.suppress(OSError):
            age_s = time.time() - leftover.stat().st_mtime
            if age_s > _STALE_S or (age_s > _ABANDONED_S and not _is_locked(leftover)):
                shutil.rmtree(leftover, ignore_errors=True)


def _is_locked(path: Path) -> bool:
    """Also where that cannot be told."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextlib.contextmanager
def _lock(path: Path, flags: int = os.O_RDONLY) -> Iterator[None]:
    """Holds a file or directory; without effect where the file system knows no locks."""
    descriptor = os.open(path, flags, 0o666)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
