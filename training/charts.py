"""Charts of the model card as inline SVG: a few kilobytes each, sharp at any size, in the page's own colours.

Colours and fonts come from the card's style sheet by class (`s0`, `s1` ... for series), so the charts follow dark mode.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from markupsafe import Markup, escape

from service.svg import Scale, round_ticks
from training.calibrate import Reliability

_WIDTH, _HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 12, 30
_MAX_POINTS = 400


class _Frame:
    """The scales of one chart, and its axes."""

    def __init__(self, x_range: tuple[float, float], y_range: tuple[float, float]) -> None:
        self.x = Scale(*x_range, _LEFT, _WIDTH - _RIGHT)
        self.y = Scale(*y_range, _HEIGHT - _BOTTOM, _TOP)

    def axes(self, x_label: str, *, whole_x: bool) -> Iterator[Markup]:
        for tick in round_ticks(self.y.low, self.y.high):
            y = self.y(tick)
            yield Markup('<path class="grid" d="M{} {:.1f}H{}"/>').format(_LEFT, y, _WIDTH - _RIGHT)
            yield Markup('<text x="{}" y="{:.1f}" text-anchor="end">{:g}</text>').format(_LEFT - 6, y + 3.5, tick)
        for tick in round_ticks(self.x.low, self.x.high):
            if not whole_x or tick == int(tick):
                place = (self.x(tick), _HEIGHT - _BOTTOM + 15)
                yield Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{:g}</text>').format(*place, tick)
        yield Markup('<text x="{}" y="{}" text-anchor="end" class="axis">{}</text>').format(
            _WIDTH - _RIGHT, _HEIGHT - 2, x_label
        )


def curves(series: Mapping[str, Sequence[float]]) -> Markup:
    """Lines over the epochs 1, 2, 3 ...; values that are missing or not finite leave a gap.

    Args:
        series: name to one value per epoch, all of the same length; float("nan") where there is none.
    """
    finite = [v for values in series.values() for v in values if math.isfinite(v)]
    if not finite:
        return Markup("")
    epochs = max(len(values) for values in series.values())
    low, high = min(finite), max(finite)
    frame = _Frame((1, max(epochs, 2)), (low, high if high > low else low + 1))
    parts = list(frame.axes("epoch", whole_x=True))
    for index, values in enumerate(series.values()):
        parts.append(Markup('<path class="line s{}" d="{}"/>').format(index, _path(frame, values)))
        if epochs == 1 and math.isfinite(values[0]):
            dot = (index, frame.x(1), frame.y(values[0]))
            parts.append(Markup('<circle class="dot s{}" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(*dot))
    return _svg(parts, _described(series))


def reliability_diagram(found: Reliability, title: str) -> Markup:
    """Accuracy of each confidence bin as bars against the diagonal of perfect calibration.

    The gap to the mean confidence of a bin is drawn on top of the lower of both; bars are the fainter the fewer images
    they stand for.
    """
    frame = _Frame((0, 1), (0, 1))
    parts = list(frame.axes("confidence", whole_x=False))
    busiest = max(int(found.count.max()), 1)
    bins = zip(itertools.pairwise(found.edges), found.count, found.confidence, found.accuracy, strict=True)
    for (left, right), count, confidence, accuracy in bins:
        if not count:
            continue
        x, width = frame.x(left) + 1, frame.x(right) - frame.x(left) - 2
        opacity = 0.35 + 0.65 * math.sqrt(count / busiest)
        hint = f"{left:.2f} to {right:.2f}: {count} images, confidence {confidence:.3f}, accuracy {accuracy:.3f}"
        parts += [
            Markup('<g opacity="{:.2f}"><title>{}</title>').format(opacity, hint),
            _rectangle("bar", x, frame.y(min(accuracy, confidence)), width,
                       frame.y(0) - frame.y(min(accuracy, confidence))),
            _rectangle("gap" if confidence > accuracy else "spare", x, frame.y(max(accuracy, confidence)), width,
                       abs(frame.y(accuracy) - frame.y(confidence))),
            Markup("</g>"),
        ]  # fmt: skip
    diagonal = (frame.x(0), frame.y(0), frame.x(1), frame.y(1))
    parts.append(Markup('<path class="diagonal" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>').format(*diagonal))
    return _svg(parts, f"{title}: expected calibration error {found.error:.4f}")


def sorted_counts(counts: Sequence[int]) -> Markup:
    """Images per class, most frequent first, as one area: the shape of an imbalance among many classes."""
    ordered = np.sort(np.asarray(counts))[::-1]
    frame = _Frame((1, max(len(ordered), 2)), (0, max(int(ordered[0]), 1)))
    parts = list(frame.axes("classes, most frequent first", whole_x=True))
    line = _path(frame, [float(v) for v in ordered])
    closed = f"{line}L{frame.x(len(ordered)):.1f} {frame.y(0):.1f}L{frame.x(1):.1f} {frame.y(0):.1f}Z"
    parts.append(Markup('<path class="area" d="{}"/>').format(closed))
    return _svg(parts, f"images per class, from {ordered[0]} down to {ordered[-1]}")


def _path(frame: _Frame, values: Sequence[float]) -> str:
    stride = max(1, math.ceil(len(values) / _MAX_POINTS))
    shown = sorted({*range(0, len(values), stride), len(values) - 1})
    drawing, pen = [], "M"
    for index in shown:
        if math.isfinite(values[index]):
            drawing.append(f"{pen}{frame.x(index + 1):.1f} {frame.y(values[index]):.1f}")
            pen = "L"
        else:
            pen = "M"
    return "".join(drawing)


def _rectangle(kind: str, x: float, y: float, width: float, height: float) -> Markup:
    text = '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>'
    return Markup(text).format(kind, x, y, width, height)  # noqa: S704  the template is a literal


def _described(series: Mapping[str, Sequence[float]]) -> str:
    return "; ".join(f"{name} ends at {values[-1]:.4g}" for name, values in series.items())


def _svg(parts: Sequence[Markup], description: str) -> Markup:
    opening = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
        _WIDTH, _HEIGHT, escape(description)
    )
    return Markup("").join([opening, *parts, Markup("</svg>")])
