"""What one executor on a GPU does, batch size by batch size, beside a plain session of ONNX Runtime.

    python tests/benchmarks/gpu.py [resnet50 ...] [--largest 64] [--rounds 5]

Each batch comes from memory as uint8 pixels and ends as probabilities in memory, copies included. Of each model file:
plain      a session with the CUDA provider's default options, `session.run` on arrays
no graph   the service's executor with `enable_cuda_graph: 0`: bound buffers, page-locked pixels, a session each size
graph      the service's executor as it is
All take turns; what is reported is the median over the rounds of each one's median batch. Load times include the
warm-up. Needs an NVIDIA GPU with CUDA and cuDNN.
"""

import json
import statistics
import time
from pathlib import Path

import bench_models
import click
import numpy as np
import onnxruntime as ort
import torch
from rich.console import Console
from rich.table import Table

from service import artifact, cuda, engine
from service.providers import CUDA, Plan
from training.runtime import Session

TURN_S = 0.15


def executor(version, file, largest, **options):
    """What runs pixels on the service's executor."""
    (one,) = engine.build(version, Plan(CUDA, 1, gpus=(0,), options=options), largest, file)
    engine.warm_up([one])
    return lambda pixels: one.infer([pixels])


def batch_ms(run, pixels):
    """Median milliseconds of a batch."""
    for _ in range(3):
        run(pixels)
    took, began = [], time.perf_counter()
    while time.perf_counter() - began < TURN_S or len(took) < 5:
        start = time.perf_counter()
        run(pixels)
        took.append(time.perf_counter() - start)
    return 1e3 * statistics.median(took)


def measured(version, file, largest, rounds, console):
    """Milliseconds of a batch by kind of session and batch size; seconds to load; MiB on the GPU."""
    path = version.file(file)
    makers = {
        "plain": lambda: Session(path.read_bytes(), CUDA).run,
        "no graph": lambda: executor(version, file, largest, enable_cuda_graph="0"),
        "graph": lambda: executor(version, file, largest),
    }
    sizes = Plan(CUDA, 1, gpus=(0,)).buckets(largest)
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (largest, *version.manifest.input.shape), np.uint8)
    running, load_s, mib = {}, {}, {}
    for name, make in makers.items():
        before, began = torch.cuda.mem_get_info()[0], time.perf_counter()
        running[name] = make()
        for size in sizes:
            running[name](pixels[:size])
        load_s[name] = time.perf_counter() - began
        mib[name] = (before - torch.cuda.mem_get_info()[0]) / 2**20
    found = {name: {size: [] for size in sizes} for name in makers}
    for _ in range(rounds):
        for size in sizes:
            for name, run in running.items():
                found[name][size].append(batch_ms(run, pixels[:size]))
    table = Table("batch", *(f"{name}, ms" for name in makers), "images/s", "plain / graph", title=str(path))
    for size in sizes:
        times = [statistics.median(found[name][size]) for name in makers]
        table.add_row(
            str(size),
            *(f"{value:.3f}" for value in times),
            f"{1e3 * size / times[-1]:.0f}",
            f"{times[0] / times[-1]:.2f}",
        )
    table.add_section()
    table.add_row("loaded in, s", *(f"{value:.1f}" for value in load_s.values()))
    table.add_row("on the GPU, MiB", *(f"{value:.0f}" for value in mib.values()))
    console.print(table)
    return {"ms": found, "load_s": load_s, "mib": mib}


@click.command()
@click.argument("models", nargs=-1)
@click.option("--folder", type=click.Path(path_type=Path), default=Path("build/bench-gpu"), show_default=True)
@click.option("--largest", default=64, show_default=True, help="Batch size.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write everything measured here.")
def main(models, folder, largest, rounds, file):
    """Measure executors on a GPU."""
    console, found = Console(width=110), {}
    if not cuda.visible():
        raise click.ClickException("the NVIDIA driver shows no GPU to this process")
    console.print(f"{cuda.visible()[0].name}, ONNX Runtime {ort.__version__}")
    ort.preload_dlls()
    for name in models or ("resnet50",):
        version = artifact.load(bench_models.benchmark_model(folder, name, variants=("fp16",)))
        for variant in version.manifest.variants:
            found[f"{name} {variant.name}"] = measured(version, variant.file, largest, rounds, console)
        for refused in version.manifest.rejected_variants:
            console.print(f"{refused.name} was not kept: {refused.reason}")
    if file:
        file.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
