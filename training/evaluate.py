"""Exact figures on held-out images: every image counts once, and nothing is padded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from training import metrics
from training.batches import Examples
from training.distributed import Group
from training.pixels import Normaliser, unit_range

_AT_ONCE = 256
TOP_K = 5


@dataclass(frozen=True)
class Evaluation:
    """What a model does on N images of K classes.

    `logits`: float32[N, K]. `labels`: int64[N]. `loss`: mean cross-entropy in nats. `accuracy`, `top5`: 0..1.
    """

    logits: NDArray[np.float32]
    labels: NDArray[np.int64]
    loss: float
    accuracy: float
    top5: float

    @property
    def predicted(self) -> NDArray[np.int64]:
        """int64[N], the class with the highest logit."""
        return np.asarray(self.logits.argmax(1), dtype=np.int64)

    def per_class(self) -> metrics.ClassScores:
        """Precision, recall and F1 of each class."""
        return metrics.class_scores(self.predicted, self.labels, self.logits.shape[1])


def evaluate(
    model: nn.Module,
    examples: Examples,
    normalise: Normaliser,
    *,
    at_once: int = _AT_ONCE,
    group: Group | None = None,
) -> Evaluation:
    """Runs `model` in evaluation mode over examples, of which there has to be one; processes share the work.

    No more than `at_once` are in memory at a time: who trains on few for want of it has no more for this.

    What is judged is the main process's model, whose BatchNorm statistics all have afterwards.
    """
    group = group or Group()
    group.share(model.buffers())
    part = group.part(len(examples))
    logits = group.gather(
        predict(model, examples.images, examples.indices[part], normalise, max(1, at_once // group.world))
    )
    labels = examples.part_labels
    return Evaluation(
        logits=logits,
        labels=labels,
        loss=float(functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels))),
        accuracy=metrics.accuracy(logits.argmax(1), labels),
        top5=metrics.top_k_accuracy(logits, labels, TOP_K),
    )


@torch.inference_mode()
def predict(
    model: nn.Module,
    images: NDArray[np.uint8],
    indices: NDArray[np.int64],
    normalise: Normaliser,
    at_once: int = _AT_ONCE,
) -> NDArray[np.float32]:
    """Logits float32[N, K] of `images[indices]`, uint8[N, H, W, C], in float32.

    The model's training mode is put back afterwards, module by module.
    """
    modes = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    size = min(at_once, _AT_ONCE)
    model.eval()
    try:
        parts = [
            model(normalise(unit_range(torch.from_numpy(images[indices[at : at + size]]).to(device)))).cpu().numpy()
            for at in range(0, len(indices), size)
        ]
    finally:
        for module, training in modes.items():
            module.training = training
    return np.concatenate(parts).astype(np.float32) if parts else np.empty((0, 0), dtype=np.float32)
