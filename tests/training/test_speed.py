import itertools

import numpy as np
import onnx
import pytest

from training import speed
from training.runtime import Session


def repeated_sums(times):
    """A graph whose work grows with `times`."""
    nodes = [onnx.helper.make_node("Cast", ["image"], ["x0"], to=1)]
    nodes += [onnx.helper.make_node("Erf", [f"x{i}"], [f"x{i + 1}"]) for i in range(times)]
    nodes += [
        onnx.helper.make_node("ReduceMean", [f"x{times}", "axes"], ["logits"], keepdims=0),
        onnx.helper.make_node("Softmax", ["logits"], ["probabilities"]),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info("image", onnx.TensorProto.UINT8, ["n", 64, 64, 3])],
        [onnx.helper.make_tensor_value_info(name, 1, ["n", 3]) for name in ("logits", "probabilities")],
        [onnx.numpy_helper.from_array(np.array([1, 2]), "axes")],
    )
    opset = [onnx.helper.make_opsetid("", 18)]
    return Session(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString())


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)


class Paced:
    """A session whose runs take so many seconds of a clock that is not the machine's: in turn, and then all over."""

    def __init__(self, clock, *seconds):
        self._clock, self._seconds = clock, itertools.cycle(seconds)

    def run(self, batch):
        self._clock.now += next(self._seconds)


class Clock:
    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(speed, "time", clock)
    return clock


def test_the_ratio_says_how_many_times_as_fast_the_candidate_is(pixels, clock):
    light, heavy = Paced(clock, 1), Paced(clock, 4)

    assert speed.compare(heavy, light, pixels) == speed.Comparison(4.0, 4.0, speed.BATCH)
    assert speed.compare(light, heavy, pixels) == speed.Comparison(0.25, 0.25, speed.BATCH / 4)


def test_the_cautious_ratio_is_the_lower_quartile_of_the_rounds(pixels, clock):
    candidate = Paced(clock, 1, *[8] * 3, *[1] * 6)  # the first run is not measured

    assert speed.compare(Paced(clock, 4), candidate, pixels) == speed.Comparison(4.0, 0.5, speed.BATCH)


def test_what_slows_one_round_down_slows_both_in_it(pixels, clock):
    baseline, candidate = Paced(clock, 1, 2, 20, 6), Paced(clock, 1, 1, 10, 3)
    found = speed.compare(baseline, candidate, pixels)

    assert 1 <= found.cautious_ratio <= found.ratio == 2


def test_real_sessions_have_speeds(pixels):
    light, heavy = repeated_sums(1), repeated_sums(30)
    found = speed.compare(heavy, light, pixels)

    assert found.ratio > 1
    assert found.images_per_second > 0
    assert speed.images_per_second(light, pixels[:1]) > 0  # fewer images than a batch
