"""The figures as a picture: an SVG file, written without a plotting library, which the service does not install.

Left: answers per second against the load. Right: latency (logarithmic) against the percentile, on the scale of nines
that HdrHistogram made customary, one line for each level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np

from service.bench.summary import Summary, percentile
from service.svg import Scale, round_ticks

_WIDTH, _HEIGHT = 460, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 40, 48
# Colour-blind safe (Okabe and Ito).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7f7f7f")
_NINES = (0.0, 50.0, 90.0, 99.0, 99.9, 99.99)
_POINTS_PER_LINE = 120

Points = Sequence[tuple[float, float]]


class _Panel:
    """One pair of axes at an offset in the picture.

    Args:
        left_px: where the panel begins.
        x_range, y_range: values at the ends of the axes, already transformed.
    """

    def __init__(self, left_px: float, x_range: tuple[float, float], y_range: tuple[float, float]) -> None:
        self.x = Scale(*x_range, left_px + _LEFT, left_px + _WIDTH - _RIGHT)
        self.y = Scale(*y_range, _HEIGHT - _BOTTOM, _TOP)
        self.marks: list[str] = []

    def axes(self, title: str, x_label: str, x_ticks: dict[float, str], y_ticks: dict[float, str]) -> None:
        left, right, bottom = self.x.start, self.x.end, self.y.start
        centre = (left + right) / 2
        self.marks.append(_text(centre, 20, title, 'font-weight="bold"'))
        self.marks.append(_text(centre, _HEIGHT - 10, x_label))
        for value, label in y_ticks.items():
            self.marks.append(_line(left, self.y(value), right, self.y(value), "#ddd"))
            self.marks.append(_text(left - 6, self.y(value) + 4, label, 'text-anchor="end"'))
        for value, label in x_ticks.items():
            self.marks.append(_line(self.x(value), bottom, self.x(value), bottom + 4, "#444"))
            self.marks.append(_text(self.x(value), bottom + 18, label))
        self.marks.append(_line(left, bottom, right, bottom, "#444"))

    def curve(self, points: Points, colour: str, *, dots: bool = False, dashed: bool = False) -> None:
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.marks.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        if dots:
            self.marks += [
                f'<circle cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="3" fill="{colour}"/>' for x, y in points
            ]

    def legend(self, entries: Sequence[tuple[str, str]]) -> None:
        for index, (label, colour) in enumerate(entries):
            y = _TOP + 14 + 15 * index
            self.marks.append(_line(self.x.start + 8, y - 4, self.x.start + 24, y - 4, colour, 3))
            self.marks.append(_text(self.x.start + 30, y, label, 'text-anchor="start"'))


def write_svg(file: Path, summaries: Sequence[Summary], title: str) -> None:
    """Draws all levels; those in which nothing was answered have no latencies to show."""
    marks = _rates(summaries).marks + _latencies(summaries).marks
    width, height = 2 * _WIDTH, _HEIGHT + 24
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12" text-anchor="middle">\n'
        f'<rect width="{width}" height="{height}" fill="white"/>'
    )
    foot = _text(_WIDTH, _HEIGHT + 14, title, 'fill="#666"')
    file.write_text("\n".join([head, *marks, foot, "</svg>"]) + "\n", encoding="utf-8")


def _rates(summaries: Sequence[Summary]) -> _Panel:
    loads = [summary.value for summary in summaries]
    top = max([summary.throughput for summary in summaries] + [1e-9]) * 1.15
    panel = _Panel(0, (0, max(loads) * 1.05), (0, top))
    label = "requests in flight" if summaries[0].loop == "closed" else "requests/s offered"
    panel.axes("answers per second", label, _labelled(max(loads)), _labelled(top))
    for read, colour, dashed in (
        (lambda s: s.throughput, _COLOURS[0], False),
        (lambda s: s.goodput, _COLOURS[1], True),
    ):
        panel.curve(_series(summaries, read), colour, dots=True, dashed=dashed)
    panel.legend([("answered", _COLOURS[0]), ("within the deadline", _COLOURS[1])])
    return panel


def _series(summaries: Sequence[Summary], read: Callable[[Summary], float]) -> Points:
    return sorted((summary.value, read(summary)) for summary in summaries)


def _latencies(summaries: Sequence[Summary]) -> _Panel:
    shown = [summary for summary in summaries if len(summary.latencies_ms)]
    values = [value for s in shown for value in (s.latencies_ms[0], s.latencies_ms[-1])] or [1.0]
    low, high = math.floor(math.log10(max(min(values), 1e-3))), math.ceil(math.log10(max(values)) + 1e-9)
    panel = _Panel(_WIDTH, (0, _nines(_NINES[-1])), (low, max(high, low + 1)))
    panel.axes(
        "latency, ms",
        "percentile",
        {_nines(percent): f"{percent:g}" for percent in _NINES},
        {power: f"{10.0**power:g}" for power in range(low, max(high, low + 1) + 1)},
    )
    colours = [_COLOURS[index % len(_COLOURS)] for index in range(len(shown))]
    for summary, colour in zip(shown, colours, strict=True):
        panel.curve(_percentile_curve(summary), colour)
    panel.legend([(summary.level, colour) for summary, colour in zip(shown, colours, strict=True)])
    return panel


def _percentile_curve(summary: Summary) -> Points:
    """Up to where a single request makes the percentile, and no further."""
    latencies = summary.latencies_ms
    end = min(_nines(100 * (1 - 1 / (len(latencies) + 1))), _nines(_NINES[-1]))
    points = []
    for position in np.linspace(0, end, _POINTS_PER_LINE):
        percent = 100 * (1 - 10**-position)
        points.append((float(position), math.log10(max(percentile(latencies, percent), 1e-3))))
    return points


def _nines(percent: float) -> float:
    """0 for 0%, 1 for 90%, 2 for 99% ..."""
    return -math.log10(1 - percent / 100)


def _labelled(top: float) -> dict[float, str]:
    """Round values from 0."""
    return {value: f"{value:g}" for value in round_ticks(0, top, about=6)}


def _text(x: float, y: float, content: str, extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {extra}>{escape(content)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: int = 1) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}"/>'
