"""What data, augmentation, averaging and bookkeeping cost beside forward, backward and step.

    python tests/benchmarks/loop_overhead.py [--model resnet18] [--batch 128] [--turns 12]

Three loops, each in a process of its own, take turns of at least half a second in changing order, so that all meet the
same noise; medians count:
plain      float32, NCHW, inputs ready in memory: the loop of a tutorial
stripped   the precision that `auto` chooses, channels_last, inputs ready: forward, backward, step and nothing else
ours       the whole: batches from uint8, crop, flip, normalisation, label smoothing, average, loss check
The latter two keep their memory from step to step (training/memory.py), as `convoy train` does. With a GPU all three
run there, with the inputs of the first two in its memory; give it larger batches (`--batch 1024`).
Expected: ours at least 0.95 of stripped; with AMX also at least 3 times plain (exit code 1 below 0.95).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection

import click
import numpy as np
import torch
from torch.nn import functional

from training.batches import Examples, MemorySource
from training.config import Experiment
from training.distributed import Group, device
from training.memory import kept_memory
from training.models import create, describe
from training.phases import Phase
from training.pixels import Normaliser
from training.precision import autocast, fastest
from training.step import Stepper

DEVICE = device()
CLASSES, SIDE = 10, 32
WARM_UP = 3
TURN_S = 0.5
EPOCH_STEPS = 64
PHASE_STEPS = 1_000_000
TREE = {
    "augment": {"rotation_degrees": 0, "translation": 0, "scale": 0, "crop_padding": 4, "horizontal_flip": True},
    "optimiser": {"name": "sgd", "learning_rate": 0.05},
    "loop": {"label_smoothing": 0.1, "ema_decay": 0.99},
}


def bare_loop(name: str, options: dict, batch: int, precision: str, *, channels_last: bool) -> Callable[[], None]:
    """One step of forward, backward and update on inputs that are ready."""
    model = create(name, CLASSES, 3, **options).train().to(DEVICE)
    inputs = torch.randn(batch, 3, SIDE, SIDE, device=DEVICE)
    labels = torch.randint(0, CLASSES, (batch,), device=DEVICE)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
        inputs = inputs.to(memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, fused=channels_last)

    def step() -> None:
        optimiser.zero_grad()
        with autocast(precision, DEVICE):
            logits = model(inputs)
        functional.cross_entropy(logits.float(), labels).backward()
        optimiser.step()

    return step


def our_loop(name: str, options: dict, batch: int) -> tuple[str, Callable[[], None]]:
    """The precision that `convoy train` chooses, and one step as it does it."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (batch * EPOCH_STEPS, SIDE, SIDE, 3), dtype=np.uint8)
    labels = random.integers(0, CLASSES, len(images))
    experiment = Experiment.model_validate({**TREE, "model": {"name": name}})
    normalise = Normaliser((0.5,) * 3, (0.25,) * 3).on(DEVICE)
    model = create(name, CLASSES, 3, **options)
    stepper = Stepper(model, experiment, normalise, class_weights=None, device=DEVICE, group=Group())
    source = MemorySource(Examples(images, labels, np.arange(len(images))), batch, 0, group=Group())
    stepper.precision = fastest(stepper.trial(next(source.batches(0, 0))), DEVICE)
    stepper.begin(Phase("all", 1), 0.05, 0, PHASE_STEPS)
    stepper.train()
    epochs = (source.batches(epoch, 0) for epoch in itertools.count())
    numbered = enumerate(itertools.chain.from_iterable(epochs))

    def step() -> None:
        number, taken = next(numbered)
        loss = stepper(taken, number)
        if DEVICE.type == "cpu":  # a GPU is asked after many steps at once
            float(loss)

    return stepper.precision, step


def synchronise() -> None:
    """Waits for what a GPU still computes."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def worker(pipe: Connection, loop: str, name: str, batch: int, precision: str) -> None:
    """Tells its precision and threads, then how many seconds each step of a turn took, for each turn asked for."""
    known = {option.name for option in describe(name).options}
    options = {"small_images": True} if "small_images" in known else {}
    with contextlib.nullcontext() if loop == "plain" else kept_memory():
        if loop == "ours":
            precision, step = our_loop(name, options, batch)
        else:
            step = bare_loop(name, options, batch, precision, channels_last=loop == "stripped")
        torch.backends.cudnn.benchmark = loop != "plain"  # as training/run.py sets it
        pipe.send((precision, torch.get_num_threads()))
        steps = 1
        while pipe.recv():
            step()  # finds the caches as the others left them
            synchronise()
            began = time.perf_counter()
            for _ in range(steps):
                step()
            synchronise()
            step_s = (time.perf_counter() - began) / steps
            pipe.send(step_s)
            steps = max(1, math.ceil(TURN_S / step_s))


@contextlib.contextmanager
def running(loop: str, name: str, batch: int, precision: str) -> Iterator[Connection]:
    """The pipe to a loop's process."""
    ours, theirs = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=worker, args=(theirs, loop, name, batch, precision))
    process.start()
    theirs.close()
    try:
        yield ours
        ours.send(False)
    finally:
        ours.close()
        process.join()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--turns", type=int, default=12)
    chosen = parser.parse_args()
    rounds = chosen.turns + WARM_UP
    times: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        pipes: dict[str, Connection] = {}

        def begin(loop: str, precision: str) -> tuple[str, int]:
            pipes[loop] = stack.enter_context(running(loop, chosen.model, chosen.batch, precision))
            return pipes[loop].recv()

        precision, threads = begin("ours", "auto")  # alone, or it would choose by how fast the others let it be
        begin("stripped", precision)
        begin("plain", "float32")
        for round_ in range(rounds):
            order = list(pipes)
            for loop in order[round_ % len(order) :] + order[: round_ % len(order)]:
                pipes[loop].send(True)
                taken = pipes[loop].recv()
                if round_ >= WARM_UP:
                    times.setdefault(loop, []).append(taken)
    rates = {loop: chosen.batch / statistics.median(found) for loop, found in times.items()}
    paired = [stripped / mine for stripped, mine in zip(times["stripped"], times["ours"], strict=True)]
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{threads} threads"
    click.echo(f"{chosen.model}, batch {chosen.batch}, {precision}, {where}")
    for loop, rate in rates.items():
        click.echo(f"{loop:<9}{rate:8.1f} images/s")
    ratio = statistics.median(paired)
    click.echo(f"ours / stripped {ratio:.3f} (expected 0.95), ours / plain {rates['ours'] / rates['plain']:.2f}")
    return 0 if ratio >= 0.95 else 1


if __name__ == "__main__":
    sys.exit(main())
