"""ONNX Runtime as training needs it: to check what was exported and to measure it.

The service has an engine of its own with buckets and providers; here a plain session on the CPU provider is the
reference that every later provider is held against.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from service import cuda
from service.artifact import INPUT_NAME, LOGITS_NAME, PROBABILITIES_NAME
from service.errors import ArtifactError, TrainingError
from service.providers import CPU, TENSORRT
from service.runners import Outputs
from training.rows import Images
from training.wording import first_line

MOST_AT_ONCE = 64
_PIXELS_AT_ONCE = MOST_AT_ONCE * 384 * 384

_FATAL_ONLY = 4  # ONNX Runtime's log severity: its errors arrive as exceptions, and need not be printed twice


class Signature(NamedTuple):
    """A graph's inputs and outputs: {name: (ORT type, shape)}."""

    inputs: dict[str, tuple[str, list[int | str | None]]]
    outputs: dict[str, tuple[str, list[int | str | None]]]


class Session:
    """A model file's bytes, ready to run.

    Args:
        model: the serialised graph, complete in itself.
        provider: the execution provider; another one is never taken in its place.

    Raises:
        TrainingError: ONNX Runtime cannot load the graph, or lacks the provider.
    """

    def __init__(self, model: bytes, provider: str = CPU) -> None:
        try:
            self._session = ort.InferenceSession(model, _options(), providers=[provider], enable_fallback=0)
        except Exception as error:  # ONNX Runtime's exceptions have no common base below Exception
            raise TrainingError(f"ONNX Runtime cannot load the exported model: {first_line(error)}") from error
        taken = self._session.get_providers()[0]
        if taken != provider:
            raise TrainingError(f"{provider} is not usable here: ONNX Runtime took {taken} instead")

    @property
    def signature(self) -> Signature:
        """What the graph takes and gives."""
        return Signature(
            {node.name: (node.type, node.shape) for node in self._session.get_inputs()},
            {node.name: (node.type, node.shape) for node in self._session.get_outputs()},
        )

    def run(self, pixels: NDArray[np.uint8]) -> Outputs:
        """One batch, uint8[N, H, W, C].

        Raises:
            TrainingError: the graph fails on it.
        """
        try:
            found = self._session.run([LOGITS_NAME, PROBABILITIES_NAME], {INPUT_NAME: pixels})
        except Exception as error:  # see above
            raise TrainingError(f"the exported model fails on a batch of {len(pixels)}: {first_line(error)}") from error
        return Outputs(*found)

    def run_all(self, pixels: Images) -> Outputs:
        """Any number of images, a few at a time; see `run`."""
        batch = at_once(*pixels.shape[1:3])
        parts = [self.run(pixels[start : start + batch]) for start in range(0, len(pixels), batch)]
        return Outputs(np.concatenate([p.logits for p in parts]), np.concatenate([p.probabilities for p in parts]))


class ForeignSession:
    """Somebody else's classifier as it came: any names, one float input, one output that matters.

    Args:
        model: the serialised graph.
        output: name of the output.

    Raises:
        ArtifactError: ONNX Runtime cannot load it.
    """

    def __init__(self, model: bytes, output: str) -> None:
        self._output = output
        try:
            self._session = ort.InferenceSession(model, _options(), providers=[CPU])
        except Exception as error:  # see above
            raise ArtifactError(f"ONNX Runtime cannot load the model: {first_line(error)}") from error

    def run(self, x: NDArray[np.floating]) -> NDArray[np.float32]:
        """One batch.

        Raises:
            ArtifactError: the graph fails on it, or its output is not made of numbers.
        """
        name = self._session.get_inputs()[0].name
        try:
            (found,) = self._session.run([self._output], {name: x})
        except Exception as error:  # see above
            raise ArtifactError(f"the model fails on an input of shape {x.shape}: {first_line(error)}") from error
        if not isinstance(found, np.ndarray) or found.dtype.kind not in "fiub":  # text, or a list of tensors or maps
            raise ArtifactError(f"output {self._output} is no tensor of numbers; choose the scores with --output")
        return np.asarray(found, np.float32)


def at_once(height: int, width: int) -> int:
    """Images of a batch where any number will do; fewer of large ones: activations take some hundred bytes a pixel."""
    return max(1, min(MOST_AT_ONCE, _PIXELS_AT_ONCE // (height * width)))


def usable(provider: str) -> bool:
    """Whether a GPU provider is built in and finds what it needs; asking for it without would fill the terminal."""
    if provider not in ort.get_available_providers() or not cuda.visible():
        return False
    return provider != TENSORRT or bool(cuda.tensorrt_version())


def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    # Threads that spin after a run take the cores from the next session, when two are compared in turns.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options
