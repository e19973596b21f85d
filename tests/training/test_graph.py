import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from service.artifact import InputSpec
from service.errors import TrainingError
from training.gates import reference
from training.graph import MAX_MODEL_BYTES, Servable, check_size, fold_scale, to_onnx
from training.runtime import Session

PHOTO = InputSpec(height=12, width=10, channels=3)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Pooled(nn.Module):
    def __init__(self, groups=1, padding=2):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 5, padding=padding, groups=groups)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.pool(self.conv(x).relu()).flatten(1))


def exported(net, temperature=1.0, spec=PHOTO):
    servable = Servable(net, MEAN[: spec.channels], STD[: spec.channels], temperature)
    return servable, to_onnx(servable, spec)


def operations(model):
    return [node.op_type for node in model.graph.node]


@pytest.fixture(scope="module")
def pooled():
    torch.manual_seed(0)
    return exported(Pooled().to(memory_format=torch.channels_last), temperature=2.0)


def test_pixels_pass_only_through_cast_transpose_sub_before_the_first_convolution(pooled):
    _, model = pooled

    assert operations(model)[:4] == ["Cast", "Transpose", "Sub", "Conv"]


def test_channels_last_weights_do_not_export_pooling_as_a_chain_of_gathers(pooled):
    _, model = pooled

    assert "Gather" not in operations(model)
    assert len(model.graph.node) <= 12


def test_normalisation_is_exact_along_the_borders_of_a_padded_convolution(pooled):
    servable, model = pooled
    pixels = np.random.default_rng(0).integers(0, 256, (5, *PHOTO.shape), dtype=np.uint8)

    wanted = reference(servable, MEAN, STD, pixels, 4)
    found = Session(model.SerializeToString()).run(pixels)

    np.testing.assert_allclose(found.logits, wanted.logits, atol=1e-5)
    np.testing.assert_allclose(found.probabilities, wanted.probabilities, atol=1e-6)


def test_the_temperature_divides_the_logits(pooled):
    servable, model = pooled
    pixels = np.full((1, *PHOTO.shape), 200, np.uint8)
    x = (torch.full((1, 3, 12, 10), 200 / 255) - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(
        1, 3, 1, 1
    )

    found = Session(model.SerializeToString()).run(pixels)

    np.testing.assert_allclose(found.logits, servable.model(x).detach().numpy() / 2, atol=1e-5)


def test_nothing_of_the_exporting_machine_is_in_the_file(pooled):
    _, model = pooled
    text = model.SerializeToString()

    assert b"site-packages" not in text
    assert b".py" not in text
    assert b"torch.onnx" not in text


def test_the_same_model_gives_the_same_bytes(pooled):
    servable, model = pooled

    assert to_onnx(servable, PHOTO).SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)


def test_the_callers_model_stays_as_it_was():
    net = Pooled().train()

    servable = Servable(net, MEAN, STD, 1.0)

    assert net.training
    assert all(p.requires_grad for p in net.parameters())
    assert not servable.model.training


@pytest.mark.parametrize("groups", [1, 3])
def test_folding_scales_each_input_channel_of_a_convolution(groups):
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(6, 3 // groups, 3, 3)).astype(np.float32)
    model = scaled_convolution(weights, groups)
    x = rng.normal(size=(2, 3, 5, 5)).astype(np.float32)
    before = evaluate(model, x)

    assert fold_scale(model, "factor")

    assert operations(model) == ["Conv"]
    assert [t.name for t in model.graph.initializer] == ["weights"]
    np.testing.assert_allclose(evaluate(model, x), before, rtol=1e-5, atol=1e-5)


def second_user(model):
    model.graph.node.append(onnx.helper.make_node("Relu", ["scaled"], ["other"]))


def also_an_output(model):
    model.graph.output.append(onnx.helper.make_tensor_value_info("scaled", 1, ["n", 3, 5, 5]))


def weights_used_twice(model):
    model.graph.node.append(onnx.helper.make_node("Relu", ["weights"], ["other"]))


def along_the_width(model):
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((1, 1, 1, 5), np.float32), "factor"))


def along_the_last_axis(model):
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones(3, np.float32), "factor"))


@pytest.mark.parametrize(
    "change", [second_user, also_an_output, weights_used_twice, along_the_width, along_the_last_axis]
)
def test_folding_leaves_alone_what_it_would_change(change):
    model = scaled_convolution(np.ones((2, 3, 3, 3), np.float32), 1)
    change(model)

    assert not fold_scale(model, "factor")
    assert operations(model)[:2] == ["Mul", "Conv"]


def test_a_batch_frozen_in_the_code_is_refused():
    class Frozen(nn.Module):
        def forward(self, x):
            return x.reshape(2, 360)[:, :4]

    with pytest.raises(TrainingError, match="batch of any size"):
        exported(Frozen())


def test_a_model_that_fails_is_refused_with_its_own_words():
    class Failing(nn.Module):
        def forward(self, x):
            raise ValueError("needs 99 channels")

    with pytest.raises(TrainingError, match="needs 99 channels"):
        exported(Failing())


def test_a_model_above_two_gibibytes_is_refused_before_it_is_traced():
    with pytest.raises(TrainingError, match=r"2\.00 GiB of weights"):
        check_size(1 << 31)
    check_size(MAX_MODEL_BYTES)


def scaled_convolution(weights, groups):
    out = weights.shape[0]
    nodes = [
        onnx.helper.make_node("Mul", ["x", "factor"], ["scaled"]),
        onnx.helper.make_node("Conv", ["scaled", "weights"], ["y"], group=groups, pads=[1, 1, 1, 1]),
    ]
    factor = np.array([2.0, 0.5, -3.0], np.float32).reshape(1, 3, 1, 1)
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, ["n", 3, 5, 5])],
        [onnx.helper.make_tensor_value_info("y", 1, ["n", out, 5, 5])],
        [numpy_helper.from_array(factor, "factor"), numpy_helper.from_array(weights, "weights")],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)


def evaluate(model, x):
    return onnx.reference.ReferenceEvaluator(model).run(None, {"x": x})[0]
