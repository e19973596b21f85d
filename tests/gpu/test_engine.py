"""Real CUDA sessions: graphs, answers, memory, failure."""

import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from structlog.testing import capture_logs
from torch.profiler import ProfilerActivity, profile
from toys import ROOT, environment, grey_outputs, write_version
from variants import CLASSES, huge, levels_image, register, version_with

from service import artifact, engine, providers, resources
from service.artifact import Weights
from service.candidates import Wishes
from service.errors import OutOfMemoryError, OutOfReachError
from service.providers import CUDA, Plan
from service.selection import Selector, this_machine
from training.export import export_version
from training.models import create, describe
from training.quantize import to_fp16
from training.trained import Trained

LEVELS = 256
MIB = 1 << 20


def on_cuda(version, largest, variant=artifact.MODEL, **options):
    (one,) = engine.build(version, Plan(CUDA, 1, gpus=(0,), options=options), largest, variant)
    try:
        engine.warm_up([one])
    except BaseException:
        one.close()
        raise
    return one


@pytest.fixture
def version(tmp_path):
    """With an answer of its own for each grey level."""
    return artifact.load(write_version(tmp_path, classes=LEVELS))


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A ResNet with random weights, in float32 and float16."""
    root = tmp_path_factory.mktemp("network")
    random = np.random.default_rng(0)
    entry = describe("resnet8")
    spec = entry.input
    pixels = random.integers(0, 256, (48, *spec.shape), np.uint8)
    paths = [root / f"{number}.png" for number in range(2)]
    for path, image in zip(paths, pixels, strict=False):
        Image.fromarray(image).save(path)
    torch.manual_seed(0)
    trained = Trained(
        model=create("resnet8", 10, spec.channels).eval(),
        name="network",
        architecture="resnet8",
        classes=tuple(map(str, range(10))),
        input=spec,
        mean=entry.mean,
        std=entry.std,
        temperature=1.0,
        metrics={},
        data={},
        recipe={},
        weights=Weights(source="random"),
        canary=paths,
        calibration=pixels[:16],
        holdout=pixels[16:],
        holdout_labels=np.zeros(32, np.int64),
        history=[],
        holdout_paths=paths * 16,
    )
    path = export_version(trained, root / "models", variants=())
    onnx.save_model(to_fp16(onnx.load(path / artifact.MODEL)), path / "model.fp16.onnx")
    register(path, "fp16", "model.fp16.onnx")  # whether it is faster here or not
    return artifact.load(path), pixels


def ask(one, spec, random, count):
    levels = random.integers(0, LEVELS, count)
    found = one.infer([levels_image(levels, spec)])
    assert found.probabilities == pytest.approx(grey_outputs(levels, LEVELS)[1], abs=1e-3)
    assert (found.probabilities.argmax(1) == levels).all()


@pytest.mark.parametrize("graphs", ["1", "0"])
def test_every_image_gets_its_own_answer_in_every_batch_size(version, graphs):
    one = on_cuda(version, 16, enable_cuda_graph=graphs)
    random = np.random.default_rng(0)
    for _ in range(3):
        for count in (1, 16, 3, 2, 9, 8, 5):
            ask(one, version.manifest.input, random, count)
    assert set(one.measured_s) == {1, 2, 4, 8, 16}
    one.close()


def test_a_batch_is_one_launch(version):
    """Of the captured graph; without graphs every kernel is one."""
    launches = {}
    for graphs in ("1", "0"):
        one = on_cuda(version, 4, enable_cuda_graph=graphs)
        image = levels_image([3] * 4, version.manifest.input)
        one.infer([image])
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            one.infer([image])
        names = Counter(event.name for event in seen.events())
        launches[graphs] = names["cudaGraphLaunch"], names["cudaLaunchKernel"] + names["cudaLaunchKernelExC"]
        one.close()
    assert launches["1"] == (1, 0)
    assert launches["0"][0] == 0
    assert launches["0"][1] > 3


@pytest.mark.parametrize("variant", ["model.onnx", "model.fp16.onnx"])
@pytest.mark.parametrize("options", [{}, {"use_tf32": "0"}, {"prefer_nhwc": "0"}], ids=str)
def test_a_network_answers_as_on_the_cpu(network, variant, options):
    made, pixels = network
    (reference,) = engine.build(made, providers.cpu_plan(1), 32)
    one = on_cuda(made, 32, variant, **options)
    for count in (32, 7, 1):
        expected = reference.infer([pixels[:count]]).probabilities
        found = one.infer([pixels[:count]]).probabilities
        tolerance = 1e-5 if variant == artifact.MODEL and options.get("use_tf32") == "0" else 0.02
        assert found == pytest.approx(expected, abs=tolerance)
    one.close()
    reference.close()


def test_the_choice_is_cuda_and_the_table_says_what_it_chose_from(network, tmp_path):
    made, _ = network
    selector = Selector(this_machine(), tmp_path / "cache")
    table, _ = selector.table(made, Wishes(max_batch_size=8))
    assert {row.variant for row in table.rows if row.provider == CUDA} == {"fp32", "fp16"}
    assert table.chosen.provider == CUDA
    assert set(table.chosen.nodes) == {CUDA}
    assert all(row.images_per_second for row in table.rows if row.provider == CUDA)


def test_a_model_with_a_node_for_the_cpu_runs_without_graphs(tmp_path):
    version = version_with(tmp_path, fp32=with_words)
    with capture_logs() as lines:
        one = on_cuda(version, 4)
    assert without_graphs(lines)
    levels = [0, 200, 90]
    found = one.infer([levels_image(levels, version.manifest.input)]).probabilities
    assert found == pytest.approx(grey_outputs(levels, CLASSES)[1], abs=1e-4)
    one.close()


def test_a_limit_on_memory_is_told_as_a_shortage_and_the_next_model_runs(tmp_path, version):
    greedy = version_with(tmp_path / "greedy", fp32=lambda model: huge(model, 64 * MIB))
    with pytest.raises((OutOfMemoryError, OutOfReachError)):
        on_cuda(greedy, 4, gpu_mem_limit=str(32 * MIB))
    one = on_cuda(version, 4)
    ask(one, version.manifest.input, np.random.default_rng(0), 3)
    one.close()


def test_a_batch_that_does_not_fit_is_run_in_halves(tmp_path):
    greedy = version_with(tmp_path, fp32=lambda model: huge(model, 64 * MIB, work=0))
    plan = Plan(CUDA, 1, gpus=(0,), options={"gpu_mem_limit": str(192 * MIB)})
    (one,) = engine.build(greedy, plan, 4)
    with pytest.raises(OutOfMemoryError):
        engine.warm_up([one])  # runs the largest as a whole
    levels = [0, 200, 90, 30]
    found = one.infer([levels_image(levels, greedy.manifest.input)]).probabilities
    assert found == pytest.approx(grey_outputs(levels, CLASSES)[1], abs=1e-4)
    one.close()


def test_models_are_captured_while_another_one_serves(tmp_path, version):
    """A capture forbids all other threads to copy or allocate."""
    one, stop = on_cuda(version, 8), threading.Event()

    def keep_asking():
        random, asked = np.random.default_rng(2), 0
        while not stop.is_set():
            ask(one, version.manifest.input, random, int(random.integers(1, 9)))
            asked += 1
        return asked

    with ThreadPoolExecutor(1) as pool, capture_logs() as lines:
        asker = pool.submit(keep_asking)
        try:
            for number in range(3):
                other = artifact.load(write_version(tmp_path / f"other{number}", classes=LEVELS))
                loaded = on_cuda(other, 8)
                ask(loaded, other.manifest.input, np.random.default_rng(3), 5)
                loaded.close()
        finally:
            stop.set()
        assert asker.result() > 10
    assert not without_graphs(lines)
    one.close()


def without_graphs(lines):
    return [line for line in lines if line["event"].startswith("no CUDA graphs for this model")]


def test_memory_comes_back_when_a_model_goes(network):
    made, _ = network
    free, resident = [], []
    for _ in range(12):
        on_cuda(made, 32).close()
        free.append(torch.cuda.mem_get_info()[0])
        resident.append(resources.rss_bytes())
    assert max(free[1], free[5]) - free[-1] < 16 * MIB
    assert resident[-1] - resident[5] < 64 * MIB


def with_words(model):
    """The same answers, by way of strings, of which no GPU knows anything."""
    other = onnx.ModelProto()
    other.CopyFrom(model)
    *nodes, softmax = other.graph.node
    softmax.input[0] = "told"
    words = [
        helper.make_node("Cast", ["logits"], ["words"], to=TensorProto.STRING),
        helper.make_node("Cast", ["words"], ["told"], to=TensorProto.FLOAT),
    ]
    made = [*nodes, *words, softmax]
    del other.graph.node[:]
    other.graph.node.extend(made)
    return other


LOST = """
import os, sys
from pathlib import Path
import lost_gpu, numpy as np
from service import artifact, engine
from service.errors import DeviceLostError
from service.providers import CUDA, Plan

version = artifact.load(Path(sys.argv[1]))
engines = [engine.build(version, Plan(CUDA, 1, gpus=(0,)), 2)[0] for _ in range(2)]
image = np.zeros((1, *version.manifest.input.shape), np.uint8)
for one in engines:
    engine.warm_up([one])
lost_gpu.lose()
for one in (*engines, engines[0]):
    try:
        one.infer([image])
        print("an answer")
    except DeviceLostError as error:
        print(error)
for one in engines:
    one.close()
sys.stdout.flush()
os._exit(0 if engine.GPU_LOST.is_set() else 1)  # as the server ends
"""


def test_a_lost_gpu_is_told_by_every_engine_and_nothing_is_freed(version):
    env = environment()
    env["PYTHONPATH"] += f":{ROOT / 'tests' / 'support'}"
    done = subprocess.run(
        [sys.executable, "-c", LOST, version.path], env=env, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = done.stdout.strip().splitlines()
    assert len(told) == 3
    assert all("the device is lost until this process is restarted" in line for line in told), told
