"""Which smaller formats of a model are worth keeping: those that are measured both good enough and faster.

int8 can ruin a network or run slower than float, and fp16 is slower on most CPUs. So each variant is built, run on the
held-out images and timed beside the float model; what is not kept leaves its reason and figures in the manifest.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
from numpy.typing import NDArray

from service.artifact import RejectedVariant, Variant
from service.errors import ConfigurationError, TrainingError
from service.providers import CPU, CUDA, TENSORRT
from service.runners import Outputs
from training import metrics, speed
from training.config import ExportConfig, VariantName
from training.gates import BATCHES, sample
from training.quantize import Int8, Int8Form, cpu_form, needs_reduced_range, tensorrt_form, to_fp16
from training.rows import Images
from training.runtime import Session, usable

NAMES: tuple[VariantName, ...] = get_args(VariantName)
# TensorRT's own file only on request: without a GPU its speed cannot be measured.
DEFAULT: tuple[VariantName, ...] = ExportConfig().variants

Compare = Callable[[Session, Session, Images], speed.Comparison]

# What is faster by less than this is within the noise, and not worth a second file.
_MIN_SPEEDUP = 1.05
# A loss of exactly the budget passes, whatever the last bit of a difference of accuracies says.
_ROUNDING = 1e-9
_CANARY_TOLERANCE = 0.02
_CANARY_TOLERANCE_LIMIT = 0.9


@dataclass(frozen=True)
class Baseline:
    """The float model that every variant is held against.

    Attributes:
        model: its graph.
        session: the same, running on the CPU provider.
        outputs: its answers to `holdout`.
        holdout: uint8[V, H, W, C].
        labels: int64[V].
        canary: uint8[N, H, W, C].
        calibration: uint8[M, H, W, C], training images.
        batches: sizes at which a variant's outputs have to be finite.
    """

    model: onnx.ModelProto
    session: Session
    outputs: Outputs
    holdout: Images
    labels: NDArray[np.int64]
    canary: NDArray[np.uint8]
    calibration: NDArray[np.uint8]
    batches: Sequence[int] = BATCHES

    @property
    def accuracy(self) -> float:
        """Top-1 on the held-out images, 0..1."""
        return metrics.accuracy(self.outputs.logits.argmax(axis=1), self.labels)


@dataclass
class Outcome:
    """Variants with their serialised graphs, and what was not kept."""

    kept: list[tuple[Variant, bytes]] = field(default_factory=list)
    rejected: list[RejectedVariant] = field(default_factory=list)


class _Rejection(Exception):  # noqa: N818  it is an outcome, not an error
    """The message says why, with figures."""


class _TooInaccurate(_Rejection):
    """With how many points of accuracy it loses."""

    def __init__(self, points: float, message: str) -> None:
        super().__init__(message)
        self.points = points


def check_names(names: Sequence[str], budget_points: float) -> tuple[VariantName, ...]:
    """The variants asked for, once each.

    Raises:
        ConfigurationError: an unknown name, or a negative budget.
    """
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        raise ConfigurationError(f"unknown variant {unknown[0]!r}; choose among {', '.join(NAMES)}")
    if not budget_points >= 0:
        raise ConfigurationError(f"the accuracy budget is a number of points of 0 or more, not {budget_points}")
    return tuple(name for name in NAMES if name in names)


def build(
    names: Sequence[VariantName],
    baseline: Baseline,
    budget_points: float,
    compare: Compare = speed.compare,
    tell: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Builds and judges each variant.

    Args:
        names: what to try.
        baseline: the float model and the images.
        budget_points: top-1 points (hundredths) that a variant may lose on the held-out images.
        compare: times a session against a reference.
        tell: told what is done next, in words for people.
    """
    outcome = Outcome()
    for name in names:
        try:
            outcome.kept.append(_build_one(_Judge(name, baseline, budget_points, compare, tell)))
        except (_Rejection, TrainingError) as reason:
            outcome.rejected.append(RejectedVariant(name=name, reason=str(reason)))
    return outcome


def _build_one(judge: _Judge) -> tuple[Variant, bytes]:
    if judge.name == "fp16":
        judge.tell("fp16: converting")
        return judge.verdict(to_fp16(judge.baseline.model), CUDA if usable(CUDA) else CPU)
    if judge.name == "int8":
        return _search_int8(judge, cpu_form(reduce_range=needs_reduced_range()), CPU)
    return _search_int8(judge, tensorrt_form(), TENSORRT if usable(TENSORRT) else None)


def _search_int8(judge: _Judge, form: Int8Form, provider: str | None) -> tuple[Variant, bytes]:
    """All layers in int8; if that loses too much, the first, the last, and both of them in float."""
    with tempfile.TemporaryDirectory(prefix="convoy-int8-") as folder:
        int8 = Int8(judge.baseline.model, judge.baseline.calibration, form, Path(folder))
        first, last = int8.ends
        attempts = {"": [], "the first layer": [first], "the last layer": [last], "first and last layer": [first, last]}
        losses = []
        for words, keep_float in attempts.items():
            judge.tell(f"{judge.name}: calibrating and quantising" + (f", {words} in float" if words else ""))
            model = int8.quantize(keep_float)
            try:
                return judge.verdict(model, provider, f"{words} in float" if words else "")
            except _TooInaccurate as loss:
                losses.append(loss)
    least = min(loss.points for loss in losses)
    raise _Rejection(f"{losses[0]}; with its first and last layers in float still {least:.2f} points")


@dataclass(frozen=True)
class _Judge:
    name: VariantName
    baseline: Baseline
    budget_points: float
    compare: Compare
    tell: Callable[[str], None]

    def verdict(self, model: onnx.ModelProto, provider: str | None, remark: str = "") -> tuple[Variant, bytes]:
        """Measures speed first, since it is quick, then accuracy.

        Args:
            model: the candidate.
            provider: where its speed counts; None if there is no such device here.
            remark: on how it was made, for the note.

        Raises:
            _Rejection: it is not faster, or too inaccurate.
        """
        onnx.helper.set_model_props(model, {p.key: p.value for p in self.baseline.model.metadata_props})
        serialised = model.SerializeToString(deterministic=True)
        self.tell(f"{self.name}: measuring speed")
        rate, speed_note = self._speed(serialised, provider)
        self.tell(f"{self.name}: measuring accuracy on {len(self.baseline.labels)} held-out images")
        session = Session(serialised)
        for size in self.baseline.batches:
            self._check_finite(session.run(sample(self.baseline.holdout, size)))
        outputs = session.run_all(self.baseline.holdout)
        self._check_finite(outputs)
        accuracy = metrics.accuracy(outputs.logits.argmax(axis=1), self.baseline.labels)
        lost_points = 100 * (self.baseline.accuracy - accuracy)
        if lost_points > self.budget_points + _ROUNDING:
            raise _TooInaccurate(lost_points, self._inaccurate(lost_points, accuracy))
        others = int((outputs.logits.argmax(axis=1) != self.baseline.outputs.logits.argmax(axis=1)).sum())
        images = len(outputs.logits)
        few = f"so few cannot show a loss below {100 / images:.1f} points" if 100 / images > self.budget_points else ""
        if few and others > 1:  # that as many became right as wrong is chance
            words = f"another top class than fp32 on {others} of {images} held-out images, and {few}"
            raise _TooInaccurate(100 * others / images, words)
        same = 1 - others / images
        notes = [speed_note, f"same top class as fp32 on {same:.2%} of {images} images", few, remark]
        variant = Variant(
            name=self.name,
            file=f"model.{self.name}.onnx",
            accuracy=accuracy,
            images_per_second=rate,
            canary_tolerance=self._canary_tolerance(session),
            note="; ".join(note for note in notes if note),
        )
        return variant, serialised

    def _speed(self, serialised: bytes, provider: str | None) -> tuple[float | None, str]:
        if provider is None:
            return None, "speed not measured: TensorRT is not available where it was exported"
        reference = self.baseline.session
        if provider != CPU:
            reference = Session(self.baseline.model.SerializeToString(), provider)
        found = self.compare(reference, Session(serialised, provider), self.baseline.holdout)
        measured = f"{found.ratio:.2f} times as fast as fp32 ({speed.CONDITIONS} on {provider})"
        if found.ratio < _MIN_SPEEDUP:
            raise _Rejection(f"{measured}; less than {_MIN_SPEEDUP:g} is not worth a file")
        if found.cautious_ratio < 1:
            raise _Rejection(f"{measured}, but only {found.cautious_ratio:.2f} times in a quarter of the rounds")
        return found.images_per_second, measured

    def _inaccurate(self, lost_points: float, accuracy: float) -> str:
        return (
            f"loses {lost_points:.2f} points of accuracy ({accuracy:.4f} instead of {self.baseline.accuracy:.4f} on "
            f"{len(self.baseline.labels)} held-out images); allowed are {self.budget_points:g}"
        )

    def _canary_tolerance(self, session: Session) -> float:
        """Half as much again as it is off here, for providers that round otherwise, on top of the float model's."""
        found = session.run_all(self.baseline.canary).probabilities
        wanted = self.baseline.session.run_all(self.baseline.canary).probabilities
        worst = float(np.abs(found - wanted).max())
        return round(min(_CANARY_TOLERANCE + 1.5 * worst, _CANARY_TOLERANCE_LIMIT), 4)

    @staticmethod
    def _check_finite(outputs: Outputs) -> None:
        if not (np.isfinite(outputs.logits).all() and np.isfinite(outputs.probabilities).all()):
            raise _Rejection("some of its outputs are not finite")
