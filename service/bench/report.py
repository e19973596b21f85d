"""The figures as a table in the terminal and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from service import terminal
from service.bench.summary import Summary, histogram

_BAR_WIDTH = 40


def show(summaries: Sequence[Summary], console: Console | None = None) -> None:
    """Prints one row for each level, then failures, server times and warnings; of a single level, a histogram."""
    console = console or terminal.console(highlight=False)
    console.print(_table(summaries))
    for summary in summaries:
        for line in _remarks(summary):
            console.print(line, soft_wrap=True)
    if len(summaries) == 1 and len(summaries[0].latencies_ms):
        console.print(_histogram(summaries[0]))


def write_json(file: Path, summaries: Sequence[Summary], settings: dict[str, Any]) -> None:
    """Writes everything measured, and with which settings."""
    content = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": settings,
        "levels": [summary.as_json() for summary in summaries],
    }
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _table(summaries: Sequence[Summary]) -> Table:
    open_loop = any(summary.loop == "open" for summary in summaries)
    since = " from the intended time" if open_loop else ""
    table = Table(box=box.SIMPLE_HEAD, caption=f"rates per second; latencies in ms{since}", padding=(0, 1, 0, 0))
    table.add_column("load", no_wrap=True)
    for name in ("answered", "good", "images", "p50", "p90", "p99", "p99.9", "max", "failed"):
        table.add_column(name, justify="right", no_wrap=True)
    for summary in summaries:
        latencies = [summary.percentiles_ms.get(p) for p in ("p50", "p90", "p99", "p99.9")]
        failed = sum(failures.count for failures in summary.failures.values())
        table.add_row(
            summary.level,
            f"{summary.throughput:.1f}",
            f"{summary.goodput:.1f}",
            f"{summary.images:.1f}",
            *(_ms(value) for value in [*latencies, summary.max_ms]),
            f"{failed / summary.sent:.1%}" if failed else "0",
        )
    return table


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 10 else f"{value:.0f}" if value >= 100 else f"{value:.1f}"  # noqa: PLR2004


def _remarks(summary: Summary) -> list[Text]:
    lines = []
    if summary.server_ms:
        stages = ", ".join(f"{stage} {_ms(value)}" for stage, value in summary.server_ms.items())
        lines.append(Text(f"{summary.level}: inside the server, median ms: {stages}", style="dim"))
    for status, failures in sorted(summary.failures.items()):
        lines.append(
            Text(f"{summary.level}: {failures.count} x {status}, median {_ms(failures.p50_ms)} ms", style="red")
        )
    if summary.bad_images:
        lines.append(Text(f"{summary.level}: {summary.bad_images} images could not be classified", style="red"))
    lines += [Text(f"{summary.level}: {warning}", style="yellow") for warning in summary.warnings]
    return lines


def _histogram(summary: Summary) -> Table:
    bins = histogram(summary.latencies_ms)
    most = max(count for _, count in bins)
    table = Table(title="latency", box=None, show_header=False)
    table.add_column(justify="right")
    table.add_column()
    table.add_column(justify="right")
    for bound, count in bins:
        table.add_row(f"<= {_ms(bound)} ms", Text("█" * round(_BAR_WIDTH * count / most), style="cyan"), str(count))
    return table
