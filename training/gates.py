"""The gate that an exported graph has to pass: the same answers as PyTorch, on real pixels, at every kind of batch.

The reference normalises on its own and calls the bare model in evaluation mode, so the gate also finds a wrong mean,
a wrong channel order and layers that were exported in training mode. PyTorch's exporter only warns of such things.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.errors import TrainingError
from service.runners import Outputs
from training.graph import Servable
from training.rows import Images
from training.runtime import MOST_AT_ONCE, Session, at_once

_SMALL_BATCHES = (1, 2, 7)
BATCHES = (*_SMALL_BATCHES, MOST_AT_ONCE)
# Largest difference of a probability. float32 on two runtimes differs by about 1e-6.
MAX_PROBABILITY_DIFFERENCE = 1e-3
# Largest difference of a logit, as a share of the largest logit: it still sees errors where probabilities saturate.
MAX_LOGIT_DIFFERENCE = 1e-3
# Two probabilities closer than this are a tie, and either may win.
_TIE = 1e-4


@dataclass(frozen=True)
class Original:
    """What the graph has to agree with, in the words of the message if it does not."""

    name: str = "PyTorch"
    advice: str = "does a layer behave differently in evaluation mode?"


PYTORCH = Original()


@dataclass(frozen=True)
class Parity:
    """How far ONNX Runtime is from the original: largest difference of a probability, and the images compared."""

    probability_difference: float
    images: int

    def describe(self, original: Original) -> str:
        """For the note of a variant."""
        return f"probabilities within {self.probability_difference:.1e} of {original.name} on {self.images} images"


def batches_up_to(largest: int) -> tuple[int, ...]:
    """One image, two, an odd number, and the largest batch that has to work."""
    return tuple(sorted({*_SMALL_BATCHES, largest}))


def batches_of(height: int, width: int) -> tuple[int, ...]:
    """`BATCHES`, with fewer images in the largest where 64 of this size would take many gigabytes."""
    return batches_up_to(max(_SMALL_BATCHES[-1], at_once(height, width)))


def reference(
    servable: Servable, mean: Sequence[float], std: Sequence[float], pixels: NDArray[np.uint8], classes: int
) -> Outputs:
    """What PyTorch says to uint8[N, H, W, C], computed as training does it: scale to 0..1, normalise, run.

    Raises:
        TrainingError: the model does not return logits [N, classes].
    """
    servable.eval()
    with torch.inference_mode():
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255  # [N, C, H, W]
        x = (x - torch.tensor(mean).view(1, -1, 1, 1)) / torch.tensor(std).view(1, -1, 1, 1)  # [N, C, H, W]
        logits = servable.model(x)  # [N, K]
        if not isinstance(logits, Tensor) or logits.shape != (len(pixels), classes):
            found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise TrainingError(f"the model returns {found} for {len(pixels)} images, not logits of {classes} classes")
        logits = logits / servable.temperature
        return Outputs(logits.numpy(), logits.softmax(dim=1).numpy())


def check_parity(
    session: Session,
    wanted: Outputs,
    pixels: NDArray[np.uint8],
    batches: Sequence[int] = BATCHES,
    original: Original = PYTORCH,
) -> Parity:
    """Runs the graph on batches of each size and compares every row.

    Args:
        session: the exported graph.
        wanted: the original's answers for `pixels`.
        pixels: uint8[max(batches), H, W, C].
        batches: sizes to try.
        original: what it is compared with.

    Raises:
        TrainingError: the graph refuses a batch size, a difference is above the limits, or the top class differs.
    """
    worst = 0.0
    for size in batches:
        rows = slice(len(pixels) - size, None)
        try:
            found = session.run(np.ascontiguousarray(pixels[rows]))
        except TrainingError as error:
            raise TrainingError(str(error) if original is PYTORCH else f"{error}; {original.advice}") from error
        expected = Outputs(wanted.logits[rows], wanted.probabilities[rows])
        worst = max(worst, _compare(found, expected, original))
    return Parity(worst, len(pixels))


def sample(pixels: Images, images: int) -> NDArray[np.uint8]:
    """`images` of uint8[V, H, W, C], spread evenly; repeated if there are too few."""
    return pixels[np.linspace(0, len(pixels) - 1, images).round().astype(np.int64)]


def _compare(found: Outputs, wanted: Outputs, original: Original) -> float:
    """Largest difference of a probability, if all is well."""
    size = len(wanted.logits)
    if found.logits.shape != wanted.logits.shape or found.probabilities.shape != wanted.probabilities.shape:
        raise TrainingError(
            f"the export differs from {original.name} on a batch of {size}: outputs are {found.logits.shape} and "
            f"{found.probabilities.shape}, not {wanted.logits.shape}; {original.advice}"
        )
    difference = float(np.abs(found.probabilities - wanted.probabilities).max())
    logit_difference = float(np.abs(found.logits - wanted.logits).max())
    logit_limit = MAX_LOGIT_DIFFERENCE * max(1.0, float(np.abs(wanted.logits).max()))
    top_two = np.sort(wanted.probabilities, axis=1)[:, -2:]
    decided = top_two[:, 1] - top_two[:, 0] > _TIE
    flipped = int((decided & (found.probabilities.argmax(axis=1) != wanted.probabilities.argmax(axis=1))).sum())
    # Written so that NaN fails too.
    if not (difference <= MAX_PROBABILITY_DIFFERENCE and logit_difference <= logit_limit and flipped == 0):
        raise TrainingError(
            f"the export differs from {original.name} on a batch of {size}: "
            f"probabilities by up to {difference:.3g} (allowed {MAX_PROBABILITY_DIFFERENCE:g}), "
            f"logits by up to {logit_difference:.3g} (allowed {logit_limit:.3g}), "
            f"top class on {flipped} of {size} images; {original.advice}"
        )
    return difference
