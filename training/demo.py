"""`convoy demo`: the whole way, from pictures to a served model, on real handwritten digits.

It plays every role: it trains like `convoy train`, starts a real `convoy serve` in a process of its own, and then is an
ordinary gRPC client. Nothing in it is special to the demo but the drawing.
"""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from convoy.v1 import image_classifier_pb2 as pb
from PIL import Image
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.text import Text

from service.client import Client
from service.errors import TrainingError
from training.config import Experiment, load_experiment
from training.digits import write_digits
from training.display import Display
from training.interrupt import InterruptedRunError
from training.run import Result, run

NAME = "digits"

_READY_TIMEOUT_S = 60
_SHOWN = 6
_SHADES = " ░▒▓█"


@dataclass(frozen=True)
class Served:
    """Of each held-out image, in order: what the service said.

    `top`: (label, score) best first. `latencies_ms`: one request each. `seconds`: for all of them.
    """

    top: list[list[tuple[str, float]]]
    latencies_ms: list[float]
    seconds: float

    def accuracy(self, files: Sequence[Path]) -> float:
        """Part of the files whose best class is the folder they lie in."""
        return sum(top[0][0] == file.parent.name for top, file in zip(self.top, files, strict=True)) / len(files)


def demo(folder: Path, console: Console, *, train_only: bool) -> None:
    """Runs the demo in `folder`, which may hold an earlier one.

    Raises:
        ConvoyError: a step failed; the message says which.
    """
    display = Display(console)
    _title(console, 1, "real handwritten digits, as a folder of pictures")
    images = folder / NAME
    display.say(f"{write_digits(images)} PNG files in {images}/0 ... {images}/9")
    _title(console, 2, f"convoy train {images} --model lenet5 --repository {folder / 'models'} --name {NAME}")
    try:
        result = run(_experiment(), images, folder / "models", folder / "runs", display)
    except InterruptedRunError as stopped:
        raise KeyboardInterrupt from stopped  # the demo starts from the beginning each time
    display.say(f"exported and checked against PyTorch: {result.version}")
    if train_only:
        return
    _title(console, 3, f"convoy serve --repository {shlex.quote(str(folder / 'models'))}")
    with serving(folder / "models") as address:
        display.say(f"serving {NAME} on {address}")
        _title(console, 4, f"the {len(result.holdout)} held-out digits, over gRPC")
        served = classify(address, result.holdout)
        _show(console, result, served)
    display.say("the server drained and stopped\n")
    _report(console, result, served)
    _farewell(display, folder, result)


@contextmanager
def serving(repository: Path) -> Iterator[str]:
    """A `convoy serve` process on a free port; drained at the end. Yields its address."""
    command = [sys.executable, "-m", "service", "serve", "--repository", str(repository), "--models", NAME]
    with subprocess.Popen(  # noqa: S603  # our own interpreter and our own module
        [*command, "--port", "0", "--http-port", "0", "--log-format", "json"], stderr=subprocess.PIPE, text=True
    ) as process:
        lines: deque[str] = deque(maxlen=20)
        ready = threading.Event()
        address: list[str] = []
        threading.Thread(target=_follow, args=(process, lines, address, ready), daemon=True).start()
        try:
            ready.wait(_READY_TIMEOUT_S)
            if not address:
                raise TrainingError("the server did not start:\n" + "".join(lines))
            yield address[0]
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(_READY_TIMEOUT_S)
    if code:
        raise TrainingError(f"the server ended with {code}:\n" + "".join(lines))


def _follow(process: subprocess.Popen[str], lines: deque[str], address: list[str], ready: threading.Event) -> None:
    """Reads the server's log to its end; notes the address when it says that it is ready."""
    for line in process.stderr or ():
        lines.append(line)
        if '"event": "ready"' in line:
            address.append(json.loads(line)["grpc"])
            ready.set()
    ready.set()


def classify(address: str, files: Sequence[Path]) -> Served:
    """Sends one request for each file, eight at a time."""
    top: list[list[tuple[str, float]]] = []
    latencies_ms: list[float] = []
    requests = [pb.ClassifyRequest(model=NAME, images=[file.read_bytes()], top_k=3) for file in files]
    with Client(address) as client:
        began = time.monotonic()
        for outcome, latency_s in client.classify_all(requests):
            if isinstance(outcome, Exception):
                raise outcome
            found = outcome.results[0].classification.classes
            top.append([(entry.label, entry.score) for entry in found])
            latencies_ms.append(latency_s * 1000)
        return Served(top, latencies_ms, time.monotonic() - began)


def _experiment() -> Experiment:
    return load_experiment(None, {"name": NAME, "model.name": "lenet5"})


def _title(console: Console, number: int, text: str) -> None:
    title = Text.assemble("\n", (str(number), "bold cyan"), "  ", (text, "bold"))
    console.print(title, highlight=False, soft_wrap=True)


def _show(console: Console, result: Result, served: Served) -> None:
    """A few digits as small pictures with their top-3: the mistakes first, then what was sure."""
    wrong = [i for i, file in enumerate(result.holdout) if served.top[i][0][0] != file.parent.name]
    right = np.linspace(0, len(result.holdout) - 1, _SHOWN).astype(int).tolist()
    chosen = list(dict.fromkeys([*wrong[:2], *right]))[:_SHOWN]
    console.print(Columns([_card(console, result.holdout[i], served.top[i]) for i in chosen], padding=(1, 3)))


def _card(console: Console, file: Path, top: list[tuple[str, float]]) -> RenderableType:
    truth = file.parent.name
    lines = [Text(f"a {truth}", style="bold green" if top[0][0] == truth else "bold red")]
    lines += [Text(f"{label}  {score:6.1%}") for label, score in top]
    with Image.open(file) as image:
        picture = drawn(np.asarray(image), colour=console.color_system is not None)
    return Group(picture, *lines)


def drawn(pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], *, colour: bool) -> Text:
    """A grayscale picture, uint8[H, W] with even H, in half-block characters; in shades where there is no colour."""
    text = Text()
    for upper, lower in zip(pixels[::2].tolist(), pixels[1::2].tolist(), strict=True):
        for high, low in zip(upper, lower, strict=True):
            if colour:
                text.append("▀", style=f"rgb({high},{high},{high}) on rgb({low},{low},{low})")
            else:
                text.append(_SHADES[(high + low) * len(_SHADES) // 512] * 2)
        text.append("\n")
    text.rstrip()
    return text


def _report(console: Console, result: Result, served: Served) -> None:
    accuracy = served.accuracy(result.holdout)
    p50, p90, p99 = np.percentile(served.latencies_ms, [50, 90, 99])
    rate = len(result.holdout) / served.seconds
    rows = {
        "accuracy": f"{accuracy:.2%} of {len(result.holdout)} held-out images through the service "
        f"(the trainer measured {result.evaluation.accuracy:.2%})",
        "throughput": f"{rate:,.0f} images/s, one per request, 8 requests in flight",
        "latency": f"p50 {p50:.1f} ms   p90 {p90:.1f} ms   p99 {p99:.1f} ms",
    }
    for name, value in rows.items():
        console.print(Text.assemble((f"{name:<12}", "bold"), value), highlight=False, soft_wrap=True)
    if accuracy != result.evaluation.accuracy:
        raise TrainingError("the service and the trainer disagree on the same images; please report this")


def _farewell(display: Display, folder: Path, result: Result) -> None:
    serve = "make serve" if folder == Path(".demo") else f".venv/bin/convoy serve --repository {folder / 'models'}"
    display.say(
        f"""
Next:
  {serve:<60} keep this model served on localhost:8500
  .venv/bin/convoy classify {shlex.quote(str(result.holdout[0].parent))} --model {NAME}
  .venv/bin/convoy inspect {result.version}
  open {result.version / "card.html"} in a browser: the model card
  .venv/bin/convoy train YOUR_PHOTOS --repository {folder / "models"}      one folder of images for each class"""
    )
