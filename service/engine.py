"""Runs a model version on ONNX Runtime: `uint8[N, H, W, C]` in, `float32[N, K]` out.

The only importer of onnxruntime. Everything above knows the port `Engine`, and is tested with a toy one.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from service import artifact, providers
from service.artifact import ModelVersion
from service.errors import ArtifactError, EngineError, OutOfMemoryError, ProviderError

_ERRORS_ONLY = 3  # ONNX Runtime's log severity


class Outputs(NamedTuple):
    """Of N images: `logits` and `probabilities`, float32[N, K] each."""

    logits: NDArray[np.float32]
    probabilities: NDArray[np.float32]


class Engine(Protocol):
    """What the layers above need of a runtime."""

    @property
    def provider(self) -> str:
        """The execution provider that really runs the model."""

    @property
    def variant(self) -> str:
        """File name of the variant that runs."""

    @property
    def buckets(self) -> Sequence[int]:
        """Batch sizes that are warmed up, ascending; the last is the largest allowed."""

    @property
    def measured_s(self) -> Mapping[int, float]:
        """Seconds of each bucket, as measured by the warm-up."""

    def infer(self, chunks: Sequence[NDArray[np.uint8]]) -> Outputs:
        """Runs one batch made of chunks of uint8[n, H, W, C], in order."""

    def close(self) -> None:
        """Releases the runtime's memory."""


class OrtEngine:
    """A session of ONNX Runtime with an input buffer of its own.

    Not thread-safe: one owner thread calls `infer`.

    Args:
        version: the verified model version.
        plan: provider and threads.
        max_batch_size: the largest bucket; the others are the powers of two below it.
        variant: file name of the variant to run.

    Raises:
        ArtifactError: the graph cannot be loaded, or its signature breaks the contract.
        ProviderError: ONNX Runtime took another provider than the planned one.
    """

    def __init__(
        self, version: ModelVersion, plan: providers.Plan, max_batch_size: int, variant: str = artifact.MODEL
    ) -> None:
        self._version = version
        self.variant = variant
        self.measured_s: dict[int, float] = {}
        self.buckets = batch_buckets(max_batch_size)
        self._session = _session(version.file(variant), plan)
        artifact.check_signature(
            version.manifest, _signature(self._session, "inputs"), _signature(self._session, "outputs")
        )
        self.provider: str = self._session.get_providers()[0]
        if self.provider != plan.provider:
            raise ProviderError(f"{version.path}: asked for {plan.provider}, ONNX Runtime took {self.provider}")
        self._buffer = np.zeros((max_batch_size, *version.manifest.input.shape), np.uint8)

    def infer(self, chunks: Sequence[NDArray[np.uint8]]) -> Outputs:
        """Runs one batch, padded with the buffer's old content to the next bucket.

        Raises:
            OutOfMemoryError: the allocator is exhausted.
            EngineError: the runtime failed in another way.
        """
        count = 0
        for chunk in chunks:
            self._buffer[count : count + len(chunk)] = chunk
            count += len(chunk)
        bucket = next(size for size in self.buckets if size >= count)
        with _translated_errors():
            logits, probabilities = self._session.run(
                [artifact.LOGITS_NAME, artifact.PROBABILITIES_NAME], {artifact.INPUT_NAME: self._buffer[:bucket]}
            )
        return Outputs(logits[:count], probabilities[:count])

    def close(self) -> None:
        """Drops the session and its arena."""
        del self._session

    def warm_up(self) -> None:
        """Runs every bucket, so that no request pays for a first time, and measures it."""
        for bucket in self.buckets:
            self.infer([self._buffer[:bucket]])
            began = time.monotonic()
            self.infer([self._buffer[:bucket]])
            self.measured_s[bucket] = time.monotonic() - began


def batch_buckets(max_batch_size: int) -> tuple[int, ...]:
    """Powers of two up to `max_batch_size`, and that itself."""
    powers = [1 << bit for bit in range(max_batch_size.bit_length()) if 1 << bit < max_batch_size]
    return (*powers, max_batch_size)


def available_providers() -> list[str]:
    """Execution providers of this build of ONNX Runtime."""
    return list(ort.get_available_providers())


def _session(path: Path, plan: providers.Plan) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = plan.intra_op_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    # Spinning threads burn the quota of the decode threads beside them.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(path, options, providers=[plan.provider])
    except Exception as error:  # ONNX Runtime's exceptions have no common base below Exception
        raise ArtifactError(f"{path} cannot be loaded by ONNX Runtime: {error}") from error


def _signature(session: ort.InferenceSession, side: str) -> dict[str, tuple[str, list[int | str | None]]]:
    nodes = session.get_inputs() if side == "inputs" else session.get_outputs()
    return {node.name: (node.type, list(node.shape)) for node in nodes}


@contextlib.contextmanager
def _translated_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # ONNX Runtime's exceptions have no common base below Exception
        text = str(error)
        if "Failed to allocate memory" in text or "out of memory" in text.lower():
            raise OutOfMemoryError(text) from error
        raise EngineError(text) from error
