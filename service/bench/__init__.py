"""`convoy bench`: how much a server can do, and how long its callers wait."""

from __future__ import annotations

import asyncio
import gc
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from service.commands import options
from service.exits import Exit

if TYPE_CHECKING:
    from service.bench.load import Level, Plan
    from service.bench.summary import Summary
    from service.client import ClientTls

_DEFAULT_CONCURRENCY = (1.0, 4.0, 16.0)
_MOST_PIXELS = 64_000_000  # what a server takes by default


class _Numbers(click.ParamType[tuple[float, ...]]):
    """Positive numbers separated by commas."""

    name = "numbers"

    def __init__(self, *, whole: bool) -> None:
        self._whole = whole

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 1,2,4", param, ctx)
        if any(not 0 < number < float("inf") or (self._whole and number % 1) for number in numbers):
            self.fail(f"{value!r} has to hold {'whole ' if self._whole else ''}numbers above 0", param, ctx)
        return numbers


class _Size(click.ParamType[tuple[int, int]]):
    """Width and height as in 500x375."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", str(value))
        if not found:
            self.fail(f"{value!r} is not WIDTHxHEIGHT such as 500x375", param, ctx)
        width, height = int(found[1]), int(found[2])
        if width * height > _MOST_PIXELS:
            self.fail(f"{value} has more than {_MOST_PIXELS:,} pixels", param, ctx)
        return width, height


def _writable(_: click.Context, __: click.Parameter, value: Path | None) -> Path | None:
    """Refuses what could not be written after the measurement."""
    if value is not None and not os.access(value if value.exists() else value.parent, os.W_OK):
        raise click.BadParameter(f"{value} cannot be written; name a file in a folder that exists")
    return value


def _svg(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    if value is not None and value.suffix.lower() != ".svg":
        raise click.BadParameter(f"{value} has to end in .svg; browsers and office programs open it")
    return _writable(ctx, param, value)


@click.command()
@click.argument("images", nargs=-1, type=click.Path(path_type=Path), metavar="[IMAGE]...")
@options.server
@options.tls
@click.option("--model", default="", help="Name of the model. May be left out if the server has only one.")
@click.option("--version", type=options.VERSION, help="Version of the model.  [default: the latest]")
@click.option("--synthetic", type=_Size(), metavar="WxH", help="Make up photo-like JPEGs instead of IMAGE.")
@click.option(
    "--concurrency",
    type=_Numbers(whole=True),
    metavar="N,...",
    help="Closed loop: callers that each wait for their answer.  [default: 1,4,16]",
)
@click.option(
    "--rate",
    type=_Numbers(whole=False),
    metavar="R,...",
    help="Open loop: requests per second, arriving at random (Poisson) whether or not answers come.",
)
@click.option("--duration", default=10.0, show_default=True, type=click.FloatRange(min=0.1), help="Seconds per level.")
@click.option("--requests", "count", type=click.IntRange(min=1), help="Stop a level after so many, instead.")
@click.option("--warmup", default=2.0, show_default=True, type=click.FloatRange(min=0), help="Seconds not counted.")
@click.option("--images-per-request", default=1, show_default=True, type=click.IntRange(min=1))
@click.option("--top-k", default=5, show_default=True, type=options.TOP_K, help="Classes for each image.")
@click.option(
    "--deadline-ms", default=1000.0, show_default=True, type=click.FloatRange(min=1), help="Deadline of each request."
)
@click.option("--connections", default=1, show_default=True, type=click.IntRange(1, 256), help="HTTP/2 connections.")
@click.option("--seed", default=0, show_default=True, help="Of the arrivals and of made-up images.")
@click.option(
    "--json",
    "json_file",
    callback=_writable,
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the figures here.",
)
@click.option(
    "--plot",
    "plot_file",
    callback=_svg,
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw them into FILE.svg.",
)
@click.pass_context
def bench(ctx: click.Context, /, **flags: Any) -> None:
    """Measure a running server under load.

    IMAGE is a file or a folder (every image below it). All figures are of requests; "good" are those answered within
    the deadline. With --rate, latencies count from the time at which a request was to be sent, so that a stall shows
    in every request that it delayed. Ctrl-C ends the measurement and shows what there is.

    \b
    Examples:
      convoy bench photos/ --model pets
      convoy bench --synthetic 500x375 --concurrency 1,2,4,8,16,32 --plot sweep.svg
      convoy bench photos/ --rate 100,200,400 --deadline-ms 200 --json results.json
    """
    import uvloop

    from service.bench import plot, report
    from service.bench.load import Plan

    levels = _levels(flags["concurrency"], flags["rate"])
    requests = _requests(flags)
    plan = Plan(flags["deadline_ms"] / 1e3, flags["warmup"], flags["duration"], flags["count"], flags["seed"])
    # A full collection looks at everything that was imported, and every request that is to leave meanwhile is late.
    gc.freeze()
    summaries, interrupted = uvloop.run(
        _measure(flags["server"], flags["tls"], requests, levels, plan, flags["connections"])
    )
    if summaries:
        report.show(summaries)
        if flags["json_file"]:
            report.write_json(flags["json_file"], summaries, _shown(flags))
        if flags["plot_file"]:
            plot.write_svg(flags["plot_file"], summaries, f"convoy bench, {flags['server']}")
    if interrupted:
        ctx.exit(Exit.CTRL_C)
    if not summaries:
        raise click.UsageError("nothing was measured; raise --duration, or the rate")


def _levels(concurrency: Sequence[float] | None, rates: Sequence[float] | None) -> list[Level]:
    from service.bench.load import Level

    if concurrency and rates:
        raise click.UsageError("--concurrency (closed loop) and --rate (open loop) exclude each other")
    if rates:
        return [Level("open", rate) for rate in rates]
    return [Level("closed", callers) for callers in concurrency or _DEFAULT_CONCURRENCY]


def _requests(flags: dict[str, Any]) -> list[bytes]:
    from service.bench import images

    if bool(flags["images"]) == bool(flags["synthetic"]):
        raise click.UsageError("name images or folders to send, or --synthetic WxH, and not both")
    if flags["synthetic"]:
        width, height = flags["synthetic"]
        found = images.synthetic(width, height, flags["seed"])
    else:
        found = images.from_disk(flags["images"])
    return images.requests(found, flags["images_per_request"], flags["model"], flags["version"], flags["top_k"])


def _shown(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags as the results record them; of TLS only whether it was spoken."""
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in flags.items()}
    return plain | {"images": [str(path) for path in flags["images"]], "tls": flags["tls"] is not None}


async def _measure(
    target: str,
    tls: ClientTls | None,
    requests: Sequence[bytes],
    levels: Sequence[Level],
    plan: Plan,
    connections: int,
) -> tuple[list[Summary], bool]:
    """Runs the levels one after the other; the summaries, and whether Ctrl-C cut them short."""
    import signal

    from service.bench.load import measure, sender
    from service.bench.summary import summarise

    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    summaries = []
    async with sender(target, requests, plan.deadline_s, connections, tls=tls) as send:
        loop.add_signal_handler(signal.SIGINT, stopped.set)
        try:
            for level in levels:
                click.echo(f"{level} ...", err=True)
                summary = summarise(await measure(send, level, plan, stopped))
                if summary.sent:
                    summaries.append(summary)
                elif not stopped.is_set():
                    click.echo(f"no request of {level} was sent after the warm-up; raise --duration", err=True)
                if stopped.is_set():
                    break
        finally:
            loop.remove_signal_handler(signal.SIGINT)
    return summaries, stopped.is_set()
