"""Locks between processes, which the system releases when their holder dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """While it lasts, no other process is in such a block for the same file or directory; a file is made if need be.

    Without effect where the file system knows no locks.
    """
    descriptor = _opened(path)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def held(path: Path) -> Iterator[bool]:
    """Takes the lock without waiting for it, and yields whether it could be taken; True where there are no locks."""
    descriptor, mine = _opened(path), True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        mine = not isinstance(error, BlockingIOError)
    try:
        yield mine
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether a process holds it; also where that cannot be told."""
    descriptor = _opened(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _opened(path: Path) -> int:
    return os.open(path, os.O_RDONLY if path.is_dir() else os.O_CREAT | os.O_RDWR, 0o666)
