"""Reloads under traffic: what they cost another model, whether every answer is right, and what they leave in memory.

    python tests/benchmarks/reloads.py                       # about seven minutes on 2 cores, the first time ten
    python tests/benchmarks/reloads.py --rounds 8 --neighbour resnet34

A `convoy serve` in a process of its own serves ResNet-18, in two versions with weights of their own, and a neighbour.
Both get open-loop load (Poisson, latencies from the time at which a request was to be sent), together at 0.3 of what
the machine can do, with the load generator on the same cores. Then, through the admin API,

1. rounds of 5 seconds without and 5 seconds with a reload of ResNet-18 every second, a minute of each, in turn, so that
   the noise of the machine meets both: the p99 of the neighbour may grow to 1.5 times its value without reloads, in the
   median of the rounds;
2. 200 more reloads, one a second under the same load, with the resident memory read after each: from the 50th on
   a line through the readings may not rise.

Reloads are by turns a swap to the other version (`SetRouting`) and the same version once more (`LoadModel`). Every
answer is held against the probabilities that the version it names gives in this process; one that was sent after a swap
was confirmed has to come from the new version. Exits with 1 if anything expected does not hold.
"""

import asyncio
import itertools
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import bench_models
import click
import numpy as np
import serving
import uvloop
from convoy.v1 import admin_pb2, admin_pb2_grpc
from convoy.v1 import image_classifier_pb2 as pb
from convoy.v1 import image_classifier_pb2_grpc as pb_grpc
from grpc import aio
from rich.console import Console
from rich.table import Table

from service import artifact, engine, providers
from service.bench import load
from service.preprocess import preprocess

RELOADED = "resnet18"
VERSIONS = (1, 2)
EVERY_S = 1.0
# Of what closed loops reach: both models together.
SHARE = 0.3
DEADLINE_S = 10.0
WARMUP_S = 1.0
TOP_K = 5
# Take thumbnails, which are decoded and classified on the event loop.
SMALL = ("lenet5",)

# What is expected.
P99_RATIO = 1.5
SETTLED = 50
# A reload of ResNet-18 reads 57 MiB of files and holds 12 MiB of weights: this is 1 part in 2000 of the latter.
SLOPE_KIB = 6.0
ON_TIME = 0.95
# A score may differ by so much from what it was here: batches of another size add up in another order.
TOLERANCE = 1e-4


# --- the server


@contextmanager
def served(folder, names):
    """A `convoy serve` with the admin port open; yields the fields of its "ready" line, and its process id."""
    command = [sys.executable, "-m", "service", "serve", "--repository", folder / "models", "--models", ",".join(names)]
    ports = ["--port", "0", "--http-port", "0", "--admin-port", "0"]
    more = ["--cache-dir", folder / "cache", "--repository-poll-s", "0", "--log-format", "json"]
    with tempfile.TemporaryFile("w+") as trash:
        process = subprocess.Popen(
            [*map(str, [*command, *ports, *more])], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            ready = next(json.loads(line) for line in process.stdout if '"event": "ready"' in line)
            threading.Thread(target=lambda: trash.writelines(process.stdout), daemon=True).start()
            yield ready, process.pid
        finally:
            process.terminate()
            process.wait(60)


def resident_kib(pid):
    """Resident memory of a process, as Linux counts it."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1])


# --- answers


def probabilities(path, runs, images):
    """What a version answers, computed in this process as the server `runs` it: float32[N, K]."""
    version = artifact.load(path)
    plan = providers.cpu_plan(1, provider=runs.provider, executors=1, precision=runs.precision)
    [one] = engine.build(version, plan, 1, runs.file)
    spec = version.manifest.input
    found = np.concatenate([one.infer([preprocess(data, spec)[None]]).probabilities for data in images])
    one.close()
    return found


@dataclass
class Answers:
    """What a model may answer, and what it did.

    `expected`: by version, float32[N, K] for N images. `allowed`: which versions may have answered, in the order of the
    swaps; a request may see all from the one that was in force when it was sent.
    """

    model: str
    images: list[bytes]
    expected: dict[int, np.ndarray]
    allowed: list[set[int]]
    outcomes: Counter = field(default_factory=Counter)

    def judge(self, reply, image, since):
        """Counts an answer under what it is."""
        found = reply.results[0].classification.classes
        if reply.version not in set.union(*self.allowed[since:]):
            self.outcomes["of a version that was not in service"] += 1
            return
        scores = self.expected[reply.version][image]
        best = np.sort(scores)[-TOP_K:][::-1]
        right = len(found) == TOP_K and all(
            max(abs(one.score - scores[one.index]), abs(one.score - score)) <= TOLERANCE * best[0]
            for one, score in zip(found, best, strict=True)
        )
        self.outcomes["right" if right else "wrong"] += 1


def distinguishable(answers):
    """Smallest difference of two versions' scores of the same image, in tolerances."""
    one, two = answers.expected.values()
    return float(np.min(np.max(np.abs(one - two), axis=1) / np.max(one, axis=1))) / TOLERANCE


def sending(stub, answers):
    """A `Send` of the load generator that looks at what comes back."""
    requests = [pb.ClassifyRequest(model=answers.model, images=[image], top_k=TOP_K) for image in answers.images]
    numbers = itertools.cycle(range(len(requests)))

    async def send(intended_s):
        image, since, sent_s = next(numbers), len(answers.allowed) - 1, time.monotonic()
        try:
            reply = await stub.Classify(requests[image], timeout=DEADLINE_S)
        except aio.AioRpcError as error:
            answers.outcomes[error.code().name] += 1
            return load.Sample(intended_s, sent_s, time.monotonic(), error.code().name)
        ended_s = time.monotonic()
        answers.judge(reply, image, since)
        return load.Sample(intended_s, sent_s, ended_s, load.OK, 1)

    return send


# --- reloads


@dataclass
class Reloads:
    """Reloads of one model, and how long each took."""

    admin: admin_pb2_grpc.AdminStub
    answers: Answers
    seconds: list[float] = field(default_factory=list)

    async def one(self):
        """By turns a swap to the other version, and the same version again."""
        began = time.monotonic()
        if len(self.seconds) % 2:
            await self.admin.LoadModel(admin_pb2.LoadModelRequest(model=self.answers.model))
        else:
            [old] = self.answers.allowed[-1]
            new = next(number for number in VERSIONS if number != old)
            await self.to(new, {old, new})
        self.seconds.append(time.monotonic() - began)

    async def to(self, version, meanwhile):
        """Swaps to a version."""
        self.answers.allowed.append(meanwhile)
        routing = admin_pb2.Routing(versions=str(version))
        await self.admin.SetRouting(admin_pb2.SetRoutingRequest(model=self.answers.model, routing=routing))
        self.answers.allowed.append({version})

    async def while_(self, goes_on, after=lambda: None):
        """Begins one a second, later if the last one is not done; calls `after` just before the next is due."""
        due = time.monotonic()
        while goes_on():
            await self.one()
            due = max(due + EVERY_S, time.monotonic())
            await asyncio.sleep(due - time.monotonic())
            after()


# --- what is measured


@dataclass
class Bench:
    """Everything that a measurement needs. `senders`: of the model that is reloaded, and of the other; `rates`: their
    requests per second; `pid`: of the server.
    """

    senders: list
    rates: list[float]
    reloads: Reloads
    pid: int
    lags_s: list[float] = field(default_factory=list)

    async def latencies(self, seconds, seed, stopped=None):
        """Milliseconds of every request of each sender."""
        plan = load.Plan(DEADLINE_S, WARMUP_S, seconds, seed=seed)
        stopped = stopped or asyncio.Event()
        runs = [
            load.measure(send, load.Level("open", rate), plan, stopped)
            for send, rate in zip(self.senders, self.rates, strict=True)
        ]
        measured = await asyncio.gather(*runs)
        self.lags_s += measured[0].lag_s
        return [
            [(s.ended_s - s.intended_s) * 1e3 for s in one.samples if s.intended_s >= one.window_s[0]]
            for one in measured
        ]

    async def with_reloads(self, seconds, seed):
        """The same, with reloads."""
        measuring = asyncio.create_task(self.latencies(seconds, seed))
        await self.reloads.while_(lambda: not measuring.done())
        return await measuring

    async def rounds(self, count, seconds):
        """Latencies of each round, without and with reloads; which goes first changes from round to round."""
        quiet, busy = [], []
        for number in range(count):
            kinds = [(quiet, self.latencies), (busy, self.with_reloads)]
            for half, (found, measure) in enumerate(kinds if number % 2 else kinds[::-1]):
                found.append(await measure(seconds, 2 * number + half))
        return quiet, busy

    async def memory(self, count):
        """Resident KiB of the server after each of so many reloads under load."""
        readings = []
        stopped = asyncio.Event()
        traffic = asyncio.create_task(self.latencies(1e6, 1000, stopped))
        await self.reloads.while_(lambda: len(readings) < count, lambda: readings.append(resident_kib(self.pid)))
        stopped.set()
        await traffic
        return readings


async def capacity(send):
    """Requests per second of a closed loop."""
    plan = load.Plan(DEADLINE_S, WARMUP_S, 4.0)
    measured = await load.measure(send, load.Level("closed", 16), plan, asyncio.Event())
    began, ended = measured.window_s
    return sum(sample.ended_s >= began for sample in measured.samples) / (ended - began)


def rise(readings, block=10):
    """Slope of a line through the readings, and its standard error, in their unit per reload.

    Through the least of each block: a reading between a swap and the end of the old version's last request holds both,
    and what a leak has taken is missing from the least, too.
    """
    blocks = len(readings) // block
    least = np.reshape(readings[-blocks * block :], (blocks, block)).min(axis=1)
    at = (np.arange(blocks) - (blocks - 1) / 2) * block
    slope = (at @ least) / (at @ at)
    rest = least - least.mean() - slope * at
    return slope, np.sqrt(rest @ rest / (blocks - 2) / (at @ at))


async def known(api, folder, name, images, versions):
    """A model's answers, from each of its versions."""
    model = await api.GetModel(pb.GetModelRequest(model=name))
    runs = serving.runs_of(model)
    expected = {number: probabilities(folder / "models" / name / str(number), runs, images) for number in versions}
    return Answers(name, images, expected, [{model.summary.version}])


async def everything(folder, neighbour, rounds, seconds, reloads, console):
    """All that is measured, as a dictionary."""
    photos = [file.read_bytes() for file in sorted(bench_models.photo_folder(folder).glob("*.jpg"))]
    small = [file.read_bytes() for file in sorted(serving.small_images(folder).glob("*.png"))]
    models = {RELOADED: (photos, VERSIONS), neighbour: (small if neighbour in SMALL else photos, (1,))}
    with served(folder, models) as (ready, pid):
        async with aio.insecure_channel(ready["grpc"]) as channel, aio.insecure_channel(ready["admin"]) as port:
            api = pb_grpc.ImageClassifierStub(channel)
            answers = [await known(api, folder, name, *given) for name, given in models.items()]
            admin = Reloads(admin_pb2_grpc.AdminStub(port), answers[0])
            for number in VERSIONS:  # the first load of a version measures its variants; the outcome is remembered
                await admin.to(number, set(VERSIONS))
            senders = [sending(api, each) for each in answers]
            rates = [SHARE / 2 * await capacity(send) for send in senders]
            console.print(f"{RELOADED}: {rates[0]:.1f} requests/s, {neighbour}: {rates[1]:.1f} requests/s")
            bench = Bench(senders, rates, admin, pid)
            found = in_turn(list(models), *await bench.rounds(rounds, seconds))
            found["on time"] = len(admin.seconds) * EVERY_S / (rounds * (WARMUP_S + seconds))
            found["generator_lag_ms"] = float(np.percentile(bench.lags_s, 99)) * 1e3
            found["reload_s"] = list(admin.seconds)
            show(console, found)
            readings = await bench.memory(reloads)
    return found | {
        "rates": rates,
        "answers": [dict(each.outcomes) for each in answers],
        "not right": sum(each.outcomes.total() - each.outcomes["right"] for each in answers),
        "apart": distinguishable(answers[0]),
        "rss_kib": readings,
        "rise_kib": rise(readings[SETTLED:]),
    }


def in_turn(models, quiet, busy):
    """Latencies of each round and of all of them, for each model."""
    return {
        "models": models,
        "rounds": [[latency(*pair) for pair in zip(*both, strict=True)] for both in zip(quiet, busy, strict=True)],
        "all": [latency(joined(quiet, which), joined(busy, which)) for which in range(len(models))],
    }


def latency(quiet, busy):
    """p50 and p99 without and with reloads in milliseconds, and how much the p99 grows."""
    (p50, p99), (with_p50, with_p99) = (np.percentile(each, (50, 99)).tolist() for each in (quiet, busy))
    return {"quiet": [p50, p99], "busy": [with_p50, with_p99], "ratio": with_p99 / p99, "requests": len(busy)}


def joined(rounds, which):
    """The latencies of one sender in all rounds."""
    return [ms for one in rounds for ms in one[which]]


# --- what is told


def show(console, found):
    """Latencies of each round, and how long reloads took."""
    table = Table("p50, p99 in ms", "requests", "no reloads", "a reload a second", "p99 ratio")
    for name, total, *each in zip(found["models"], found["all"], *found["rounds"], strict=True):
        for title, row in [*((f"{name}, round {number}", one) for number, one in enumerate(each, 1)), (name, total)]:
            quiet, busy = ("{:.2f}, {:.2f}".format(*row[kind]) for kind in ("quiet", "busy"))
            table.add_row(title, str(row["requests"]), quiet, busy, f"{row['ratio']:.2f}")
        table.add_section()
    console.print(table)
    reload_s = np.percentile(found["reload_s"], (50, 99))
    console.print(
        f"a reload took {reload_s[0]:.2f} s (median), {reload_s[1]:.2f} s (p99); timers of the load generator were "
        f"late by {found['generator_lag_ms']:.1f} ms (p99)"
    )


def judge(console, found):
    """What is expected against what was found; whether all of it holds."""
    slope, error = found["rise_kib"]
    neighbour, ratio = found["models"][1], statistics.median(each[1]["ratio"] for each in found["rounds"])
    rows = [
        ("requests without the right answer", "0", f"{found['not right']} {found['answers']}", not found["not right"]),
        ("answers of the versions apart, tolerances", ">= 100", f"{found['apart']:.0f}", found["apart"] >= 100),
        ("reloads a second", f">= {ON_TIME}", f"{found['on time']:.2f}", found["on time"] >= ON_TIME),
        (f"p99 of {neighbour}, with reloads / without", f"<= {P99_RATIO}", f"{ratio:.2f}", ratio <= P99_RATIO),
        (
            "resident memory, KiB for each reload",
            f"<= {SLOPE_KIB:g} within 2 standard errors",
            f"{slope:.1f} ± {error:.1f}",
            slope - 2 * error <= SLOPE_KIB,
        ),
    ]
    table = Table("", "expected", "found", "")
    for what, expected, value, holds in rows:
        table.add_row(what, expected, value, "holds" if holds else "[bold red]does not hold[/]")
    console.print(table)
    return all(holds for *_, holds in rows)


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("build/reloads"), show_default=True)
@click.option("--neighbour", default="lenet5", show_default=True, help="The model that is not reloaded.")
@click.option("--rounds", default=12, show_default=True, type=click.IntRange(min=1))
@click.option("--seconds", default=5.0, show_default=True, help="Of each half of a round.")
@click.option("--reloads", default=200, show_default=True, type=click.IntRange(min=SETTLED + 40))
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write everything measured here.")
def main(folder, neighbour, rounds, seconds, reloads, file):
    """Reload a model every second under load, and look at its neighbour, the answers and the memory."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the server ends, too
    console = Console(width=120)
    for name, number in [*((RELOADED, number) for number in VERSIONS), (neighbour, 1)]:
        bench_models.benchmark_model(folder, name, number)
    found = uvloop.run(everything(folder, neighbour, rounds, seconds, reloads, console))
    holds = judge(console, found)
    if file:
        file.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(not holds)


if __name__ == "__main__":
    main()
