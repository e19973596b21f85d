"""Files and folders that appear whole or not at all: written beside their place, where readers do not look, and moved.

What is being written is named `.<name>.writing-<random>`. No process identifier is in it: those of two containers that
share a volume are mostly the same. What killed writers have left is removed by those who come after them.
"""

from __future__ import annotations

import glob
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_STALE_S = 24 * 3600


def name_beside(path: Path) -> Path:
    """Where to write what will be moved to `path`: a name that no other caller gets."""
    return path.with_name(f".{path.name}.writing-{secrets.token_hex(8)}")


def left_beside(folder: Path, name: str = "*") -> Iterator[Path]:
    """What is being written into a folder, or was when its writer died; of one name, or of all."""
    return folder.glob(f".{name}.writing-*")


@contextmanager
def file_beside(path: Path, *, sole_writer: bool = False) -> Iterator[Path]:
    """Where to write a file, which takes its place afterwards; with an error nothing is left of it.

    Args:
        path: its place, in a folder that exists.
        sole_writer: nobody else writes this file: what was left of it is removed now, and not when it is a day old.

    Raises:
        OSError: it cannot be moved.
    """
    remove_leftovers(path.parent)
    if sole_writer:
        for leftover in left_beside(path.parent, glob.escape(path.name)):
            leftover.unlink(missing_ok=True)
    beside = name_beside(path)
    try:
        yield beside
        beside.replace(path)
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """An empty folder, which takes its place afterwards; with an error nothing is left of it.

    Raises:
        OSError: it cannot be made or moved; that folder is there already.
    """
    remove_leftovers(path.parent)
    beside = name_beside(path)
    beside.mkdir()
    try:
        yield beside
        beside.rename(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes have left, once it is a day old; what is younger may still be written."""
    for leftover in left_beside(folder):
        with suppress(OSError):  # another process may have been faster
            within = leftover.iterdir() if leftover.is_dir() else ()
            newest = max(path.stat().st_mtime for path in (leftover, *within))
            if time.time() - newest > _STALE_S:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
