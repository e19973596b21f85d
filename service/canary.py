"""Proof that a model version gives, here and now, the answers that it gave where it was exported."""

from __future__ import annotations

import numpy as np

from service.artifact import ModelVersion
from service.engine import Engine
from service.errors import ArtifactError
from service.preprocess import preprocess


def check(version: ModelVersion, engine: Engine) -> float:
    """Classifies the version's canary images from their encoded bytes and compares the probabilities.

    It covers the whole path: the files, the decoder, the resize rule, the provider and its precision.

    Returns:
        The largest absolute difference of a probability.

    Raises:
        ArtifactError: it is above the version's tolerance, or not finite.
    """
    manifest = version.manifest
    images = np.stack([preprocess(data, manifest.input) for data in version.canary_images()])
    step = engine.buckets[-1]
    found = np.concatenate([engine.infer([images[i : i + step]]).probabilities for i in range(0, len(images), step)])
    worst = float(np.max(np.abs(found - np.asarray(manifest.canary.probabilities, np.float32))))
    if not worst <= manifest.canary.tolerance:  # catches NaN, too
        raise ArtifactError(
            f"{version.path}: the canary's probabilities are off by {worst:.4g} on {engine.provider}, allowed are "
            f"{manifest.canary.tolerance:g}; the model file, the provider or the preprocessing is not what it was"
        )
    return worst
