"""What training hands to export: a finished model with all that the version and its card tell about it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from service.artifact import NAME_PATTERN, InputSpec, Weights
from service.errors import TrainingError
from training.rows import Images


@dataclass(frozen=True)
class Trained:
    """A trained classifier, its provenance, and the images that certify it.

    Attributes:
        model: float32[N, C, H, W], normalised, to logits float32[N, K]. It is copied, never changed.
        name: of the model in the repository.
        architecture: as `training.models.create` knows it.
        classes: K names in the order of the logits.
        input: shape and resize rule of one image.
        mean: per channel, of pixels in 0..1.
        std: per channel, of pixels in 0..1.
        temperature: the logits are divided by it in the exported graph.
        metrics: figures of the held-out images, e.g. `accuracy`.
        data: source, counts per class and split, digest.
        recipe: what was asked of training: epochs, rates, augmentation ...
        weights: where the weights come from, and their licence.
        canary: a few encoded held-out images, of different classes.
        calibration: uint8[M, H, W, C], preprocessed training images for quantisation.
        holdout: uint8[V, H, W, C], preprocessed images that training never saw.
        holdout_labels: int64[V].
        history: figures per epoch, for the curves of the card.
        holdout_paths: the files of `holdout`, in its order.
    """

    model: nn.Module
    name: str
    architecture: str
    classes: tuple[str, ...]
    input: InputSpec
    mean: tuple[float, ...]
    std: tuple[float, ...]
    temperature: float
    metrics: Mapping[str, float]
    data: Mapping[str, Any]
    recipe: Mapping[str, Any]
    weights: Weights
    canary: Sequence[Path]
    calibration: NDArray[np.uint8]
    holdout: Images
    holdout_labels: NDArray[np.int64]
    history: Sequence[Mapping[str, float]]
    holdout_paths: Sequence[Path]

    def check(self) -> None:
        """Finds contradictions before minutes are spent on an export.

        Raises:
            TrainingError: a field that the artifact cannot hold, or two that do not fit each other.
        """
        faults = [message for wrong, message in self._rules() if wrong]
        if faults:
            raise TrainingError(f"{self.name or 'the model'} cannot be exported: {'; '.join(faults)}")

    def _rules(self) -> list[tuple[bool, str]]:
        images, labels, channels = self.holdout, self.holdout_labels, self.input.channels
        doubles = sorted(name for name, count in Counter(self.classes).items() if count > 1)
        label_range = len(labels) == 0 or (labels.min() >= 0 and labels.max() < len(self.classes))
        return [
            (
                not re.fullmatch(NAME_PATTERN, self.name),
                f"the name {self.name!r} may hold letters, digits and ._- only",
            ),
            (len(self.classes) < 2, f"a classifier needs two classes, there are {len(self.classes)}"),  # noqa: PLR2004
            (bool(doubles), f"classes appear twice: {', '.join(doubles)}"),
            (len(self.mean) != channels or len(self.std) != channels, f"mean and std need {channels} values"),
            (not all(value > 0 for value in self.std), f"std has to be positive, not {self.std}"),
            (not 0 < self.temperature < np.inf, f"the temperature has to be positive, not {self.temperature}"),
            (len(images) == 0, "there are no held-out images to check it with; enlarge the validation split"),
            (images.shape[1:] != self.input.shape, f"held-out images are {images.shape[1:]}, not {self.input.shape}"),
            (labels.shape != images.shape[:1], f"there are {len(images)} held-out images but {len(labels)} labels"),
            (not label_range, f"held-out labels go beyond the {len(self.classes)} classes"),
            (len(self.holdout_paths) != len(images), "every held-out image needs its path"),
            (not self.canary, "the canary needs at least one encoded image"),
        ]
