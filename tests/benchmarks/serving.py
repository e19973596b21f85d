"""The service against the floor of this machine, and against the server that everyone writes first.

    python tests/benchmarks/serving.py                        # resnet18: about nine minutes on 2 cores
    python tests/benchmarks/serving.py resnet50 --rounds 5
    python tests/benchmarks/serving.py --small                # a tiny model, where the transport is all

Everything is measured in turn, round after round, and compared within the round; what is reported is the median of the
rounds' ratios, with the smallest and the largest. The load generator runs on the same cores.

The floor is the best in-process pipeline found (decode, resize, infer; threads, batch sizes and executors searched in
the first round), plus the measured time of an empty call of the same size through the same gRPC stack.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import deque
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import bench_models
import click
import numpy as np
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

from service import artifact, engine, providers, resources
from service.preprocess import preprocess

HERE = Path(__file__).resolve().parent
IN_FLIGHT = 32
FLOOR_S = 6.0
# Threads that decode and infer, executors they share, threads within a batch, images in a batch.
PIPELINES = [
    (threads, executors, intra, batch)
    for threads, executors, intra in ((2, 2, 1), (3, 3, 1), (2, 2, 2), (3, 3, 2))
    for batch in (1, 4, 8)
]
# With a GPU: one executor, whose turn the threads wait for.
GPU_PIPELINES = [(threads, 1, 1, batch) for threads in (4, 8, 12, 16) for batch in (8, 32)]


# --- the floor


class Runs(NamedTuple):
    """What a server runs: provider, model file, and precision if it was told one."""

    provider: str
    file: str
    precision: str


class Pipeline:
    """Decode, resize and infer in one process: threads that each decode a batch and run it."""

    def __init__(self, version, runs, setting):
        self.threads, executors, intra, self.batch = setting
        if runs.provider in providers.GPU_PROVIDERS:
            plan = providers.Plan(runs.provider, 1, 1, runs.precision, gpus=(0,))
        else:
            plan = providers.cpu_plan(
                resources.cpu_count(),
                provider=runs.provider,
                executors=executors,
                intra_op_threads=intra,
                precision=runs.precision,
            )
        self.engines = engine.build(version, plan, max(self.batch, 2), runs.file)
        engine.warm_up(self.engines)
        self.turns = [threading.Lock() for _ in self.engines]
        self.spec = version.manifest.input

    def rate(self, images, seconds):
        """Images per second."""
        done = [0] * self.threads
        began = time.monotonic()

        def work(number):
            pixels = np.empty((self.batch, *self.spec.shape), np.uint8)
            position = number * 17
            while time.monotonic() - began < seconds:
                for row in pixels:
                    preprocess(images[position % len(images)], self.spec, out=row)
                    position += 1
                place = number % len(self.engines)
                with self.turns[place]:
                    self.engines[place].infer([pixels])
                done[number] += self.batch

        threads = [threading.Thread(target=work, args=(number,)) for number in range(self.threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(done) / (time.monotonic() - began)

    def close(self):
        for each in self.engines:
            each.close()


def best_pipeline(version, runs, images, console):
    """The fastest of `PIPELINES` with what the service `runs`, tried briefly."""
    rates = {}
    for setting in GPU_PIPELINES if runs.provider in providers.GPU_PROVIDERS else PIPELINES:
        pipeline = Pipeline(version, runs, setting)
        rates[setting] = pipeline.rate(images, 2.0)
        pipeline.close()
    best = max(rates, key=rates.get)
    console.print(
        f"floor: {best[0]} threads, {best[1]} executors of {best[2]} threads, batches of {best[3]}: "
        f"{rates[best]:.1f} images/s when tried"
    )
    return Pipeline(version, runs, best)


# --- servers and load


@contextmanager
def running(command, port_of):
    """A server process; yields where it listens, once `port_of` finds that in a line of its output."""
    with tempfile.TemporaryFile("w+") as trash:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            address = _address(process.stdout, port_of)
            threading.Thread(target=lambda: trash.writelines(process.stdout), daemon=True).start()
            yield address
        finally:
            process.terminate()
            process.wait(60)


def _address(lines, port_of):
    said = deque(maxlen=5)
    for line in lines:
        said.append(line)
        if found := port_of(line):
            return found
    raise click.ClickException(f"the server ended before it was ready:\n{''.join(said)}")


class Places(NamedTuple):
    """Where a server listens."""

    grpc: str
    http: str


def convoy(repository, *flags):
    """A `convoy serve` on free ports; yields its `Places`."""
    command = ["-m", "service", "serve", "--repository", repository, "--port", "0", "--http-port", "0"]
    return running([*command, "--log-format", "json", *flags], _ready)


def _ready(line):
    if '"event": "ready"' not in line:
        return None
    said = json.loads(line)
    return Places(said["grpc"], said["http"])


def script(name, *arguments):
    """One of the servers beside this file."""
    return running(
        [HERE / name, *arguments], lambda line: f"127.0.0.1:{line.strip()}" if line.strip().isdecimal() else None
    )


def load(address, images, *, seconds, model="", **flags):
    """Runs `convoy bench` in a process of its own; its one level as a dictionary."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        arguments = ["--server", address, "--duration", seconds, "--warmup", 1, "--json", file.name]
        if model:
            arguments += ["--model", model]
        for name, value in flags.items():
            arguments += [f"--{name.replace('_', '-')}", value]
        subprocess.run(
            [sys.executable, "-m", "service", "bench", str(images), *map(str, arguments)],
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=600,
        )
        return json.loads(Path(file.name).read_text())["levels"][0]


def closed(address, images, *, seconds, in_flight=IN_FLIGHT, **flags):
    """Images per second with so many callers."""
    level = load(address, images, seconds=seconds, concurrency=in_flight, deadline_ms=20_000, **flags)
    return level["images"]


# --- what is measured


def photos_on(model, folder, rounds, seconds, variant, in_flight, console):
    """Floor, service, echo and textbook server on 500x375 photos; rates of each round."""
    path = bench_models.benchmark_model(folder, model)
    version = artifact.load(path)
    photo_folder = bench_models.photo_folder(folder)
    images = [file.read_bytes() for file in sorted(photo_folder.glob("*.jpg"))]
    spec = version.manifest.input
    flags = ["--models", model, *(["--variant", variant] if variant else [])]
    rates = {"pipeline": [], "service": [], "echo": [], "textbook": []}
    with (
        convoy(folder / "models", *flags) as service,
        script("echo_server.py") as echo,
        script("textbook_server.py", version.file(artifact.MODEL), spec.height, spec.resize.shorter_side) as textbook,
    ):
        runs = served_by(service.grpc)
        console.print(f"{model}: the service runs {runs.file} on {runs.provider} {runs.precision}")
        pipeline = best_pipeline(version, runs, images, console)
        overloads = []
        for _ in range(rounds):
            rates["pipeline"].append(pipeline.rate(images, FLOOR_S))
            rates["service"].append(closed(service.grpc, photo_folder, seconds=seconds, in_flight=in_flight))
            overloads.append(overloaded(service, photo_folder, rates["service"][-1], seconds))
            rates["echo"].append(closed(echo, photo_folder, seconds=min(seconds, 3), in_flight=in_flight))
            rates["textbook"].append(closed(textbook, photo_folder, seconds=seconds, in_flight=in_flight))
        pipeline.close()
    rates["floor"] = [1 / (1 / one + 1 / two) for one, two in zip(rates["pipeline"], rates["echo"], strict=True)]
    return rates, overloads


def served_by(address):
    """What a server runs."""
    from service.client import Client

    with Client(address) as client:
        return runs_of(client.model())


def runs_of(model):
    """The same, of a model that `GetModel` describes."""
    active = next(variant for variant in model.variants if variant.active)
    file = artifact.MODEL if active.name == "fp32" else f"model.{active.name}.onnx"
    return Runs(model.summary.provider, file, active.precision)


def overloaded(service, images, capacity, seconds, deadline_ms=200):
    """Open loop at 3 and 0.7 times the capacity, and unloaded; what the server counted during the first of them."""
    address = service.grpc
    found = {
        "capacity": capacity,
        "unloaded": load(address, images, seconds=seconds, concurrency=1, deadline_ms=20_000),
        "mild": load(address, images, seconds=seconds, rate=0.7 * capacity, deadline_ms=5000),
    }
    before = counted(service.http)
    found["heavy"] = load(address, images, seconds=seconds, rate=3 * capacity, deadline_ms=deadline_ms)
    after = counted(service.http)
    found["server"] = {name: after[name] - before[name] for name in after} | {"rss": [before["rss"], after["rss"]]}
    return found


def counted(address):
    """What a server has run, run too late and refused so far, and its memory in bytes."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    samples = [sample for family in families for sample in family.samples]

    def total(name, **labels):
        return sum(each.value for each in samples if each.name == name and labels.items() <= each.labels.items())

    return {
        "ran": total("convoy_batch_size_sum"),
        "late": total("convoy_late_total", stage="infer"),
        "refused on arrival": total("convoy_shed_total"),
        "dropped from a queue": total("convoy_dropped_total"),
        "rss": total("process_resident_memory_bytes"),
    }


def small_images(folder):
    """Digits as 28x28 PNG, made once."""
    target = folder / "small"
    if not target.is_dir():
        target.mkdir(parents=True)
        for number, pixels in enumerate(load_digits().images[:300]):
            image = Image.fromarray((pixels * 15.9).astype(np.uint8)).resize((28, 28), Image.Resampling.BICUBIC)
            image.save(target / f"{number:03d}.png")
    return target


def small_model(folder, rounds, seconds):
    """LeNet on 28x28 PNG: the service against an empty echo, and 64 images in a request against one."""
    bench_models.benchmark_model(folder, "lenet5")
    images = small_images(folder)
    rates = {"service": [], "echo": [], "service, 64 per request": []}
    with convoy(folder / "models", "--models", "lenet5") as service, script("echo_server.py") as echo:
        for _ in range(rounds):
            rates["echo"].append(closed(echo, images, seconds=seconds))
            rates["service"].append(closed(service.grpc, images, seconds=seconds))
            rates["service, 64 per request"].append(
                closed(service.grpc, images, seconds=seconds, images_per_request=64, in_flight=8)
            )
    return rates


# --- what is told


def ratios(rates, one, other):
    return [a / b for a, b in zip(rates[one], rates[other], strict=True)]


def show(console, title, rates, pairs):
    table = Table("images/s", "median", "min", "max", title=title)
    for name, values in rates.items():
        table.add_row(name, *(f"{value:.1f}" for value in (statistics.median(values), min(values), max(values))))
    table.add_section()
    for one, other in pairs:
        values = ratios(rates, one, other)
        table.add_row(f"{one} / {other}", *(f"{v:.2f}" for v in (statistics.median(values), min(values), max(values))))
    console.print(table)


def show_overload(console, title, overloads):
    """One row for each figure: the median of the rounds, the least and the most."""
    table = Table("", "median", "min", "max", title=f"{title}, under load")
    for name, figure in OVERLOAD.items():
        values = [figure(**level) for level in overloads]
        table.add_row(name, *(f"{value:.4g}" for value in (statistics.median(values), min(values), max(values))))
    console.print(table)


def _p99(level):
    return level["percentiles_ms"]["p99"]


# What is told of each round; `heavy` is the open loop at three times the capacity, `server` what the server counted
# meanwhile.
OVERLOAD = {
    "p99 unloaded, ms": lambda unloaded, **_: _p99(unloaded),
    "p99 at 0.7 of capacity, ms": lambda mild, **_: _p99(mild),
    "ratio": lambda unloaded, mild, **_: _p99(mild) / _p99(unloaded),
    "answers in time at 3 times capacity, /s": lambda heavy, **_: heavy["goodput"],
    "of capacity": lambda heavy, capacity, **_: heavy["goodput"] / capacity,
    "p99 of the answered, ms": lambda heavy, **_: _p99(heavy),
    "ran too late, %": lambda server, **_: 100 * server["late"] / max(1, server["ran"]),
    "refused, median ms": lambda heavy, **_: heavy["failures"].get("UNAVAILABLE", {"p50_ms": 0.0})["p50_ms"],
    "memory before, MiB": lambda server, **_: server["rss"][0] / 2**20,
    "memory after, MiB": lambda server, **_: server["rss"][1] / 2**20,
}


@click.command()
@click.argument("models", nargs=-1)
@click.option("--folder", type=click.Path(path_type=Path), default=Path("build/bench"), show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--seconds", default=8.0, show_default=True, help="Of each measurement.")
@click.option("--variant", help="Pin the variant: fp32 or int8.  [default: what the service chooses]")
@click.option("--in-flight", default=IN_FLIGHT, show_default=True, help="Callers, of photos.")
@click.option("--small", is_flag=True, help="Only the tiny model.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write everything measured here.")
def main(models, folder, rounds, seconds, variant, in_flight, small, file):
    """Measure the service against the floor of this machine."""
    console = Console()
    found = {}
    if not small:
        for model in models or ("resnet18",):
            rates, overloads = photos_on(model, folder, rounds, seconds, variant, in_flight, console)
            pairs = [("service", "floor"), ("service", "pipeline"), ("service", "textbook")]
            show(console, f"{model}, photos of 500x375, {in_flight} in flight", rates, pairs)
            show_overload(console, model, overloads)
            found[model] = {"rates": rates, "overloads": overloads}
    if small or not models:
        rates = small_model(folder, rounds, min(seconds, 5.0))
        pairs = [("service", "echo"), ("service, 64 per request", "service")]
        show(console, f"lenet5, PNG of 28x28, {IN_FLIGHT} in flight", rates, pairs)
        found["lenet5"] = {"rates": rates}
    if file:
        file.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
