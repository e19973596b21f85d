"""What data, augmentation, averaging and bookkeeping cost beside forward, backward and step.

    python tests/benchmarks/loop_overhead.py [--model resnet18] [--batch 128] [--steps 12]

Three loops take turns step by step, so that all of them meet the same noise; the medians are compared:
plain      float32, NCHW, inputs ready in memory: the loop of a tutorial
stripped   the precision that `auto` chooses, channels_last, inputs ready: forward, backward, step and nothing else
ours       the whole: batches from uint8, crop, flip, normalisation, label smoothing, average, loss check
Expected: ours at least 0.95 of stripped; with AMX also at least 3 times plain (exit code 1 below 0.95).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import click
import numpy as np
import torch
from torch.nn import functional

from training.batches import Examples, MemorySource
from training.config import Experiment
from training.distributed import Group
from training.models import create, describe
from training.phases import Phase
from training.pixels import Normaliser
from training.precision import autocast, fastest
from training.step import Stepper

CPU = torch.device("cpu")
CLASSES, SIDE = 10, 32
TREE = {
    "augment": {"rotation_degrees": 0, "translation": 0, "scale": 0, "crop_padding": 4, "horizontal_flip": True},
    "optimiser": {"name": "sgd", "learning_rate": 0.05},
    "loop": {"label_smoothing": 0.1, "ema_decay": 0.99},
}


def bare_loop(name: str, options: dict, batch: int, precision: str, *, channels_last: bool) -> Callable[[], None]:
    """One step of forward, backward and update on inputs that are ready."""
    model = create(name, CLASSES, 3, **options).train()
    inputs, labels = torch.randn(batch, 3, SIDE, SIDE), torch.randint(0, CLASSES, (batch,))
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
        inputs = inputs.to(memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, fused=channels_last)

    def step() -> None:
        optimiser.zero_grad()
        with autocast(precision, CPU):
            logits = model(inputs)
        functional.cross_entropy(logits.float(), labels).backward()
        optimiser.step()

    return step


def our_loop(name: str, options: dict, batch: int, steps: int) -> tuple[Callable[[], None], str]:
    """One step of training as `convoy train` does it, and the precision it chose."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (batch * (steps + 4), SIDE, SIDE, 3), dtype=np.uint8)
    labels = random.integers(0, CLASSES, len(images))
    experiment = Experiment.model_validate({**TREE, "model": {"name": name}})
    normalise = Normaliser((0.5,) * 3, (0.25,) * 3)
    model = create(name, CLASSES, 3, **options)
    stepper = Stepper(model, experiment, normalise, class_weights=None, device=CPU, group=Group())
    source = MemorySource(Examples(images, labels, np.arange(len(images))), batch, 0, group=Group())
    stepper.precision = fastest(stepper.trial(next(source.batches(0, 0))), CPU)
    stepper.begin(Phase("all", 1), 0.05, 0, source.steps)
    stepper.train()
    numbered: Iterator = enumerate(source.batches(0, 0))

    def step() -> None:
        number, taken = next(numbered)
        float(stepper(taken, number))

    return step, stepper.precision


def seconds(step: Callable[[], None]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=12)
    chosen = parser.parse_args()
    known = {option.name for option in describe(chosen.model).options}
    options = {"small_images": True} if "small_images" in known else {}
    ours, precision = our_loop(chosen.model, options, chosen.batch, chosen.steps)
    loops = {
        "plain": bare_loop(chosen.model, options, chosen.batch, "float32", channels_last=False),
        "stripped": bare_loop(chosen.model, options, chosen.batch, precision, channels_last=True),
        "ours": ours,
    }
    times: dict[str, list[float]] = {name: [] for name in loops}
    for round_ in range(chosen.steps + 2):
        for name, step in loops.items():
            taken = seconds(step)
            if round_ >= 2:  # the first two rounds warm up
                times[name].append(taken)
    rates = {name: chosen.batch / statistics.median(found) for name, found in times.items()}
    paired = [stripped / mine for stripped, mine in zip(times["stripped"], times["ours"], strict=True)]
    click.echo(f"{chosen.model}, batch {chosen.batch}, {precision}, {torch.get_num_threads()} threads")
    for name, rate in rates.items():
        click.echo(f"{name:<9}{rate:8.1f} images/s")
    ratio = statistics.median(paired)
    click.echo(f"ours / stripped {ratio:.3f} (expected 0.95), ours / plain {rates['ours'] / rates['plain']:.2f}")
    return 0 if ratio >= 0.95 else 1


if __name__ == "__main__":
    sys.exit(main())
