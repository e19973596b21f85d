import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from service import resources
from service.artifact import InputSpec
from service.errors import TrainingError
from training.graph import Servable, to_onnx
from training.models import create
from training.quantize import Int8, cpu_form, needs_reduced_range, tensorrt_form, to_fp16
from training.runtime import Session

SPEC = InputSpec(height=16, width=16, channels=3)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (x + self.body(x)).relu()
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return to_onnx(Servable(Residual(), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), 0.2), SPEC)


@pytest.fixture(scope="module")
def pixels():
    blocks = np.random.default_rng(0).integers(0, 256, (48, 4, 4, 3), dtype=np.uint8)
    return blocks.repeat(4, axis=1).repeat(4, axis=2)


@pytest.fixture(scope="module")
def cpu_int8(model, pixels, tmp_path_factory):
    return Int8(model, pixels, cpu_form(reduce_range=False), tmp_path_factory.mktemp("int8"))


def weights_of(model, dtype):
    return [t for t in model.graph.initializer if t.data_type == dtype and t.dims[2:] == [3, 3]]


def difference(model, other, pixels):
    a, b = (Session(m.SerializeToString()).run(pixels).probabilities for m in (model, other))
    return np.abs(a - b).max()


def feeds(model, operation):
    """Operation types that produce the data input of each node of a type."""
    producers = {out: node.op_type for node in model.graph.node for out in node.output}
    return {producers.get(node.input[0], "input") for node in model.graph.node if node.op_type == operation}


def test_cpu_int8_answers_like_the_float_model(model, cpu_int8, pixels):
    assert 0 < difference(cpu_int8.quantize(), model, pixels) < 0.05


def test_cpu_int8_has_u8_activations_and_s8_weights_per_channel(cpu_int8):
    model = cpu_int8.quantize()

    weights = weights_of(model, onnx.TensorProto.INT8)
    scales = {t.name: t for t in model.graph.initializer}
    weight_scales = [scales[n.input[1]] for n in model.graph.node if n.input[0] in {w.name for w in weights}]
    zero_points = [scales[n.input[2]] for n in model.graph.node if n.op_type == "QuantizeLinear"]
    assert len(weights) == 2
    assert all(list(s.dims) == [16] for s in weight_scales)
    assert {z.data_type for z in zero_points} == {onnx.TensorProto.UINT8}


def test_preprocessing_and_softmax_stay_in_float(cpu_int8):
    model = cpu_int8.quantize()

    assert feeds(model, "Cast") == {"input"}
    assert feeds(model, "Transpose") == {"Cast"}
    assert feeds(model, "Sub") == {"Transpose"}
    assert feeds(model, "Softmax") == {"Div"}
    assert feeds(model, "Div") == {"Gemm"}


def test_a_reduced_range_keeps_weights_within_seven_bits(model, pixels, tmp_path):
    quantized = Int8(model, pixels, cpu_form(reduce_range=True), tmp_path).quantize()

    for tensor in weights_of(quantized, onnx.TensorProto.INT8):
        assert np.abs(numpy_helper.to_array(tensor).astype(int)).max() <= 64


def test_layers_can_be_kept_in_float(cpu_int8):
    first, last = cpu_int8.ends

    kept = cpu_int8.quantize([first])

    assert first != last
    assert len(weights_of(kept, onnx.TensorProto.FLOAT)) == 1
    assert len(weights_of(cpu_int8.quantize(), onnx.TensorProto.FLOAT)) == 0
    assert feeds(cpu_int8.quantize([last]), "Gemm") == {"ReduceMean"}


def test_tensorrt_int8_is_symmetric_and_keeps_biases_in_float(model, pixels, tmp_path):
    quantized = Int8(model, pixels, tensorrt_form(), tmp_path).quantize()

    constants = {t.name: numpy_helper.to_array(t) for t in quantized.graph.initializer}
    zero_points = [constants[n.input[2]] for n in quantized.graph.node if n.op_type == "QuantizeLinear"]
    assert {z.dtype for z in zero_points} == {np.dtype(np.int8)}
    assert not any(z.any() for z in zero_points)
    assert not any(array.dtype == np.int32 for array in constants.values())
    assert feeds(quantized, "Relu") <= {"Conv", "Add"}  # nothing stands between a layer and what is fused with it
    assert difference(quantized, model, pixels) < 0.1


def test_fp16_computes_in_half_precision_between_float_ends(model, pixels):
    half = to_fp16(model)

    assert len(weights_of(half, onnx.TensorProto.FLOAT16)) == 2
    assert feeds(half, "Sub") == {"Cast"}
    (turned,) = [node for node in half.graph.node if node.op_type == "Transpose"]
    (cast,) = [node for node in half.graph.node if node.output[0] == turned.input[0]]
    assert list(cast.input) == ["image"]  # pixels are exact in half precision: nothing casts them to and fro
    assert {o.type.tensor_type.elem_type for o in half.graph.output} == {onnx.TensorProto.FLOAT}
    assert 0 < difference(half, model, pixels) < 0.01


def test_fp16_leaves_the_float_graph_as_it_was(model):
    before = model.SerializeToString(deterministic=True)

    to_fp16(model)

    assert model.SerializeToString(deterministic=True) == before


def test_tools_leave_no_marks_in_the_file(cpu_int8, model):
    for built in (cpu_int8.quantize(), to_fp16(model)):
        assert [entry.domain for entry in built.opset_import] == [""]
        assert not built.metadata_props


def test_without_calibration_images_there_is_no_int8(model, pixels, tmp_path):
    with pytest.raises(TrainingError, match="needs training images"):
        Int8(model, pixels[:0], cpu_form(reduce_range=False), tmp_path)


def test_a_graph_without_layers_has_nothing_to_gain(pixels, tmp_path):
    model = to_onnx(Servable(nn.Flatten(), (0.5,) * 3, (0.5,) * 3, 1.0), SPEC)

    with pytest.raises(TrainingError, match="no convolution"):
        Int8(model, pixels, cpu_form(reduce_range=False), tmp_path)


@pytest.mark.parametrize(
    ("machine", "flags", "reduced"),
    [
        ("x86_64", {"fpu", "avx2", "avx512f"}, True),
        ("x86_64", {"fpu", "avx2", "avx512_vnni"}, False),
        ("AMD64", {"avx_vnni"}, False),
        ("x86_64", {"amx_int8"}, False),
        ("x86_64", {"not_avx_vnni_but_longer"}, True),
        ("x86_64", (), True),
        ("aarch64", {"asimd"}, False),
        ("arm64", (), False),
    ],
)
def test_only_x86_without_vnni_needs_a_reduced_range(machine, flags, reduced):
    assert needs_reduced_range(machine, flags) is reduced


@pytest.mark.parametrize(("flags", "reduced"), [({"avx512_vnni"}, False), (set(), True)])
def test_without_being_told_it_is_the_cpu_that_says_whether_it_has_vnni(monkeypatch, flags, reduced):
    monkeypatch.setattr(resources, "cpu_model", lambda: ("a CPU", frozenset(flags)))
    assert needs_reduced_range("x86_64") is reduced


def test_what_two_exact_nodes_take_is_cast_for_each_and_the_file_still_loads():
    """Both halves of a mirrored network are added in float32; ONNX Runtime refuses nodes of one name."""
    torch.manual_seed(0)
    net = create("resnet8", 10, 3, mirror=True, width=0.25).eval()
    model = to_onnx(Servable(net, (0.5,) * 3, (0.25,) * 3, 0.65), InputSpec(height=32, width=32, channels=3))
    half = to_fp16(model)
    names = [node.name for node in half.graph.node]
    assert len(set(names)) == len(names)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    expected, found = (Session(each.SerializeToString()).run(pixels) for each in (model, half))
    assert found.probabilities == pytest.approx(expected.probabilities, abs=0.01)
