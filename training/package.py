"""Puts a model version together on disk: canary, manifest, publication under the next free number.

Shared by `training.export` and `training.importer`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service import artifact
from service.artifact import Canary, InputSpec, Manifest
from service.errors import ArtifactError, ConfigurationError, DataError, InvalidImageError
from service.preprocess import preprocess
from training.runtime import Session

_LIBRARIES = ("convoy", "torch", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime", "numpy", "pillow")
# Exporters that race for a number meet at most this often before something else must be wrong.
_MAX_RACES = 100


@contextlib.contextmanager
def staged(repository: Path, name: str) -> Iterator[Path]:
    """An empty directory beside the versions of a model, gone afterwards unless it was published.

    Raises:
        ConfigurationError: the repository cannot be written.
    """
    model_dir = repository / name
    try:
        staging = artifact.staging_dir(repository, name, next_version(model_dir))
    except OSError as error:
        raise ConfigurationError(
            f"the repository {repository} cannot be written: {error.strerror or error}; choose another directory"
        ) from error
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        with contextlib.suppress(OSError):  # it holds versions, or another exporter's work
            model_dir.rmdir()


def next_version(model_dir: Path) -> int:
    """The number after the latest version; 1 for a new model."""
    return max(artifact.versions(model_dir), default=0) + 1


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
            return artifact.publish(staging, repository, manifest)
        except ArtifactError:
            if not (repository / name / str(manifest.version)).exists():
                raise
    raise ArtifactError(f"{repository / name}: no version number stays free long enough; who else is writing there?")


def write_canary(
    staging: Path, images: Sequence[Path], session: Session, spec: InputSpec
) -> tuple[Canary, NDArray[np.uint8]]:
    """Copies encoded images into the version and records what the float model says to them.

    Returns:
        The canary, and its images' pixels as uint8[N, H, W, C].

    Raises:
        DataError: an image cannot be read or decoded.
    """
    (staging / artifact.CANARY_DIR).mkdir()
    names, pixels = [], []
    for index, path in enumerate(images):
        try:
            encoded = path.read_bytes()
            pixels.append(preprocess(encoded, spec))
        except (OSError, InvalidImageError) as error:
            raise DataError(f"{path} cannot serve as canary: {error}; choose another image") from error
        names.append(f"{artifact.CANARY_DIR}/{index:02d}{path.suffix.lower()}")
        (staging / names[-1]).write_bytes(encoded)
    batch = np.stack(pixels)
    probabilities = session.run_all(batch).probabilities
    rows = tuple(tuple(round(float(p), 8) for p in row) for row in probabilities)
    return Canary(images=tuple(names), probabilities=rows), batch


def libraries() -> dict[str, str]:
    """Versions of what had a hand in the export; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
