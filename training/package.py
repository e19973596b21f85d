"""Puts a model version together on disk: canary, manifest, publication under the next free number.

Shared by `training.export` and `training.importer`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service import artifact, publication
from service.artifact import Canary, InputSpec, Manifest
from service.beside import file_beside
from service.errors import ArtifactError, ConfigurationError, DataError, InvalidImageError
from service.preprocess import preprocess
from training.runtime import Session

_LIBRARIES = ("convoy", "torch", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime", "numpy", "pillow")
# Exporters that race for a number meet at most this often before something else must be wrong.
_MAX_RACES = 100
_LATEST = ".latest"  # beside the versions: the number of the last one


@contextlib.contextmanager
def staged(repository: Path, name: str) -> Iterator[Path]:
    """An empty directory beside the versions of a model, gone afterwards unless it was published.

    Raises:
        ConfigurationError: the repository cannot be written.
    """
    model_dir = repository / name
    try:
        staging = publication.staging_dir(repository, name, next_version(model_dir))
    except OSError as error:
        raise ConfigurationError(
            f"the repository {repository} cannot be written: {error.strerror or error}; choose another directory"
        ) from error
    try:
        yield staging
    except OSError as error:
        place = error.filename or staging
        raise ArtifactError(f"{place} cannot be written: {error.strerror or error}; make room and try again") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        with contextlib.suppress(OSError):  # it holds versions, or another exporter's work
            model_dir.rmdir()


def next_version(model_dir: Path) -> int:
    """The number after the latest version, also after one that was removed; 1 for a new model.

    What clients have pinned, logs and metrics name by a number is to stay one and the same version.
    """
    try:
        latest = int((model_dir / _LATEST).read_text(encoding="ascii"))
    except (OSError, ValueError):
        latest = 0
    return max(latest, *artifact.versions(model_dir), 0) + 1


def _remember(version: Path) -> None:
    # Where that fails the version is published all the same.
    with contextlib.suppress(OSError), file_beside(version.with_name(_LATEST)) as beside:
        beside.write_text(version.name, encoding="ascii")


def publish_next(staging: Path, repository: Path, name: str, manifest_of: Callable[[int], Manifest]) -> Path:
    """Publishes under the next number; if another exporter takes it first, under the one after.

    Args:
        staging: from `staged`, complete but for what depends on the number.
        repository: where the models are.
        name: of the model.
        manifest_of: finishes the staging directory for a version number and returns its manifest.

    Returns:
        The version's directory.

    Raises:
        ArtifactError: it cannot be published.
    """
    for _ in range(_MAX_RACES):
        manifest = manifest_of(next_version(repository / name))
        try:
            version = publication.publish(staging, repository, manifest)
        except ArtifactError:
            if not (repository / name / str(manifest.version)).exists():
                raise
        else:
            _remember(version)
            return version
    raise ArtifactError(f"{repository / name}: no version number stays free long enough; who else is writing there?")


def publish(
    staging: Path, repository: Path, session: Session, fields: Mapping[str, Any], render: Callable[[Manifest], str]
) -> Path:
    """Adds manifest and card to a staging directory and publishes it under the next number.

    Args:
        staging: from `staged`, with all files but those two.
        repository: where the models are.
        session: the float model, whose signature has to keep the contract.
        fields: of the manifest, but for what is known here: version, time, files and libraries.
        render: makes the card of a manifest whose list of files lacks the card itself.

    Returns:
        The version's directory.

    Raises:
        ArtifactError: the graph breaks the contract, or the version cannot be published.
    """
    files = publication.list_files(staging)

    def manifest_of(version: int) -> Manifest:
        manifest = Manifest(version=version, created=publication.now(), files=files, libraries=libraries(), **fields)
        artifact.check_signature(manifest, *session.signature)
        card = staging / artifact.CARD
        card.write_text(render(manifest), encoding="utf-8")
        return manifest.model_copy(update={"files": {**files, artifact.CARD: artifact.file_entry(card)}})

    return publish_next(staging, repository, fields["name"], manifest_of)


def read_images(paths: Sequence[Path]) -> list[tuple[str, bytes]]:
    """Path and content of encoded images.

    Raises:
        DataError: one cannot be read.
    """
    try:
        return [(str(path), path.read_bytes()) for path in paths]
    except OSError as error:
        raise DataError(f"{error.filename} cannot serve as canary: {error.strerror}; choose another image") from error


def write_canary(
    staging: Path, images: Sequence[tuple[str, bytes]], session: Session, spec: InputSpec
) -> tuple[Canary, NDArray[np.uint8]]:
    """Writes encoded images into the version and records what the float model says to them.

    Args:
        staging: from `staged`.
        images: name, for its suffix and for messages, and content.
        session: the float model.
        spec: the model's input.

    Returns:
        The canary, and its images' pixels as uint8[N, H, W, C].

    Raises:
        DataError: an image cannot be decoded.
    """
    (staging / artifact.CANARY_DIR).mkdir()
    names, pixels = [], []
    for index, (name, encoded) in enumerate(images):
        try:
            pixels.append(preprocess(encoded, spec))
        except InvalidImageError as error:
            raise DataError(f"{name} cannot serve as canary: {error}; choose another image") from error
        names.append(f"{artifact.CANARY_DIR}/{index:02d}{Path(name).suffix.lower()}")
        (staging / names[-1]).write_bytes(encoded)
    batch = np.stack(pixels)
    probabilities = session.run_all(batch).probabilities
    rows = tuple(tuple(round(float(p), 8) for p in row) for row in probabilities)
    return Canary(images=tuple(names), probabilities=rows), batch


def check_name(name: str) -> None:
    """Refuses a model name that cannot be a directory, a label and part of a URL.

    Raises:
        ConfigurationError: it has other characters than the contract allows.
    """
    if not re.fullmatch(artifact.NAME_PATTERN, name):  # match lets a line feed at the end pass
        raise ConfigurationError(
            f"the name {name!r} may hold letters, digits and ._- only, and begins with one of the former"
        )


def libraries() -> dict[str, str]:
    """Versions of what had a hand in the export; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
