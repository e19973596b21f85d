"""Proof that a model version gives, here and now, the answers that it gave where it was exported."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from service import threads
from service.artifact import ModelVersion
from service.engine import Engine
from service.errors import ArtifactError, CanaryError, InvalidImageError
from service.preprocess import Pixels, preprocess


def check(version: ModelVersion, engine: Engine) -> float:
    """Runs the canary on an engine that nobody else uses yet.

    It covers the whole path: the files, the decoder, the resize rule, the provider and its precision. The engine runs
    in the background: other models are being served.

    Returns:
        The largest absolute difference of a probability.

    Raises:
        CanaryError: it is above the version's tolerance, or not finite.
    """
    images = pixels(version)
    return compare(version, threads.in_background(probabilities, engine, images), engine)


def probabilities(engine: Engine, images: Pixels) -> NDArray[np.float32]:
    """Of images uint8[M, H, W, C], as many at a time as the engine takes: float32[M, K]."""
    step = engine.buckets[-1]
    return np.concatenate([engine.infer([images[i : i + step]]).probabilities for i in range(0, len(images), step)])


def pixels(version: ModelVersion) -> Pixels:
    """The canary's images as the model sees them: uint8[M, H, W, C].

    Raises:
        ArtifactError: one of them is gone, or no image.
    """
    try:
        return np.stack([preprocess(data, version.manifest.input) for data in version.canary_images()])
    except InvalidImageError as error:
        raise ArtifactError(f"{version.path}: a canary image cannot be used: {error}") from error


def compare(version: ModelVersion, probabilities: NDArray[np.float32], engine: Engine) -> float:
    """Holds probabilities, float32[M, K], that an engine gave against those of the manifest.

    Returns:
        The largest absolute difference.

    Raises:
        CanaryError: it is above what the version allows the engine's variant, or not finite.
    """
    allowed = version.manifest.tolerance(engine.variant)
    worst = float(np.max(np.abs(probabilities - np.asarray(version.manifest.canary.probabilities, np.float32))))
    if not worst <= allowed:  # catches NaN, too
        raise CanaryError(
            f"{version.path}: the canary's probabilities are off by {worst:.4g} with {engine.variant} on "
            f"{engine.provider}, allowed are {allowed:g}; the model file, the provider or the preprocessing is not "
            "what it was",
            worst,
        )
    return worst
