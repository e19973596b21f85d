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


def test_a_graph_with_much_less_work_is_faster_by_a_ratio_that_inverts(pixels):
    light, heavy = repeated_sums(1), repeated_sums(30)

    found = speed.compare(heavy, light, pixels)
    inverse = speed.compare(light, heavy, pixels)

    assert found.ratio > 2  # of the lower quartile a busy machine may make anything
    assert found.ratio >= found.cautious_ratio
    assert inverse.ratio < 1 / 2
    assert found.images_per_second > 2 * inverse.images_per_second


class Paced:
    """A session whose runs take so many seconds of a clock that is not the machine's."""

    def __init__(self, clock, seconds):
        self._clock, self._seconds = clock, iter(seconds)

    def run(self, batch):
        self._clock.now += next(self._seconds)


class Clock:
    now = 0.0

    def perf_counter(self):
        return self.now


def test_the_cautious_ratio_is_the_lower_quartile_of_the_rounds(pixels, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(speed, "time", clock)
    baseline = Paced(clock, [4] * 10)
    candidate = Paced(clock, [1, *[8] * 3, *[1] * 6])  # the first run is not measured

    assert speed.compare(baseline, candidate, pixels) == speed.Comparison(4.0, 0.5, 8.0)


def test_images_per_second_is_positive_with_fewer_images_than_a_batch(pixels):
    assert speed.images_per_second(repeated_sums(1), pixels[:1]) > 0
