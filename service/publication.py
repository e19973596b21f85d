"""Model versions on their way into a repository: staged where readers do not look, and made to appear all at once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from service.artifact import MANIFEST, FileEntry, Manifest, file_entry
from service.beside import name_beside, remove_leftovers
from service.errors import ArtifactError


def list_files(path: Path) -> dict[str, FileEntry]:
    """Entries for every file below a version's directory but the manifest, sorted by path."""
    files = sorted(p for p in path.rglob("*") if p.is_file() and p != path / MANIFEST)
    return {p.relative_to(path).as_posix(): file_entry(p) for p in files}


def publish(staging: Path, repository: Path, manifest: Manifest) -> Path:
    """Makes a finished staging directory appear as `<repository>/<name>/<version>/`, all or nothing.

    Writes the manifest into `staging`, flushes every file and directory to disk and renames. `staging` has to lie on
    the file system of `repository` (`staging_dir` makes one).

    Returns:
        The version's directory.

    Raises:
        ArtifactError: that version exists already.
    """
    target = repository / manifest.name / str(manifest.version)
    (staging / MANIFEST).write_text(
        json.dumps(manifest.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n",
        encoding="utf-8",
    )
    _fsync_tree(staging)
    try:
        # On POSIX a directory replaces only an empty directory: an existing version is never overwritten.
        staging.rename(target)
    except OSError as error:
        raise ArtifactError(f"{target} cannot be published: {error.strerror or error}") from error
    _fsync(target.parent)
    return target


def staging_dir(repository: Path, name: str, version: int) -> Path:
    """Makes an empty directory beside the future version, ignored by readers, for this caller alone.

    What crashed writers left behind is removed once it is a day old; younger ones may still be at work.
    """
    model_dir = repository / name
    remove_leftovers(model_dir)
    path = name_beside(model_dir / str(version))
    path.mkdir(parents=True)
    return path


def now() -> datetime:
    """The time of creation for a manifest, in UTC, to the second."""
    return datetime.now(UTC).replace(microsecond=0)


def _fsync_tree(path: Path) -> None:
    children: Iterable[Path] = sorted(path.rglob("*"))
    for child in children:
        _fsync(child)
    _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
