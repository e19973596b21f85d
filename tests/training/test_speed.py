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

    assert found.ratio > found.cautious_ratio > 2
    assert inverse.ratio < 1 / 2
    assert found.images_per_second > 2 * inverse.images_per_second


def test_images_per_second_is_positive_with_fewer_images_than_a_batch(pixels):
    assert speed.images_per_second(repeated_sums(1), pixels[:1]) > 0
