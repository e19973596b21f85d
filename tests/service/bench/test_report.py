"""What people and programs get to read: the table, the JSON and the picture."""

import io
import json
import xml.etree.ElementTree as ET

import pytest
from rich.console import Console

from service.bench import plot, report
from service.bench.load import OK, Level, Measurement, Sample
from service.bench.summary import summarise


def summary(value=4.0, loop="closed", status=OK, latencies_ms=range(1, 101), bad=0, cpu_share=0.1):
    samples = [
        Sample(k / 100, k / 100, k / 100 + ms / 1e3, status if k % 2 else OK, 1, bad, 100, 200, 300)
        for k, ms in enumerate(latencies_ms)
    ]
    return summarise(Measurement(Level(loop, value), 0.5, samples, (0.0, 1.0), [0.001], cpu_share, 1.0))


def failed():
    samples = [Sample(0.1, 0.1, 0.2, "UNAVAILABLE")]
    return summarise(Measurement(Level("open", 9), 0.5, samples, (0.0, 1.0), [], 0.1, 1.0))


def shown(*summaries):
    stream = io.StringIO()
    report.show(summaries, Console(file=stream, width=80))
    return stream.getvalue()


def test_table_has_a_row_for_each_level_and_fits_a_terminal():
    text = shown(summary(4.0), summary(16.0))

    rows = [line for line in text.splitlines() if "callers" in line and "server" not in line]
    assert [row.split()[0] for row in rows] == ["4", "16"]
    assert "…" not in text
    assert "50.0" in rows[0]  # p50


def test_failures_bad_images_and_warnings_are_told():
    text = shown(summary(status="UNAVAILABLE", bad=1, cpu_share=0.99))

    assert "50 x UNAVAILABLE" in text
    assert "images could not be classified" in text
    assert "99% of a core" in text
    assert "50.0%" in text


def test_a_single_level_comes_with_its_histogram_and_a_sweep_does_not():
    assert "█" in shown(summary())
    assert "█" not in shown(summary(1), summary(2))


def test_a_level_without_answers_is_shown():
    assert "100.0%" in shown(failed())


def test_json_holds_every_figure(tmp_path):
    file = tmp_path / "results.json"

    report.write_json(file, [summary(), failed()], {"server": "localhost:8500"})

    content = json.loads(file.read_text())
    level = content["levels"][0]
    assert content["settings"] == {"server": "localhost:8500"}
    assert level["percentiles_ms"]["p50"] == pytest.approx(50)
    assert sum(entry["count"] for entry in level["histogram"]) == 100
    assert content["levels"][1]["failures"]["UNAVAILABLE"]["count"] == 1
    assert content["levels"][1]["max_ms"] is None


@pytest.mark.parametrize(
    "summaries",
    [[summary()], [summary(1), summary(8), summary(64)], [summary(100, "open"), failed()], [failed()]],
    ids=["one", "sweep", "one failed", "all failed"],
)
def test_picture_is_well_formed_and_stays_inside_its_frame(tmp_path, summaries):
    file = tmp_path / "sweep.svg"

    plot.write_svg(file, summaries, "host <&> port")

    root = ET.fromstring(file.read_text())
    width, height = float(root.get("width")), float(root.get("height"))
    lines = [element for element in root.iter() if element.tag.endswith("polyline")]
    answered = sum(bool(len(s.latencies_ms)) for s in summaries)
    assert len(lines) == 2 + answered
    for line in lines:
        for point in line.get("points").split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= width
            assert 0 <= y <= height
    words = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert "host <&> port" in words
    assert "99.9" in words


def test_latency_curve_rises_to_the_slowest_request(tmp_path):
    file = tmp_path / "sweep.svg"
    plot.write_svg(file, [summary(latencies_ms=[1.0] * 99 + [100.0])], "")

    curve = [e for e in ET.fromstring(file.read_text()).iter() if e.tag.endswith("polyline")][-1]
    heights = [float(point.split(",")[1]) for point in curve.get("points").split()]
    assert heights == sorted(heights, reverse=True)  # SVG counts downwards
    assert heights[0] - heights[-1] > 100
