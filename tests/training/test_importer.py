import dataclasses
import functools
import logging
import os
import tempfile
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from google.protobuf.message import EncodeError
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch import nn

from service import artifact
from service.artifact import Weights
from service.errors import ArtifactError, ConfigurationError, TrainingError
from service.preprocess import preprocess
from training import gates, import_cli
from training.conventions import PRESETS, Request
from training.importer import guess_scores, import_version
from training.runtime import Session

CLASSES = ["cat", "dog", "bird", "fish", "crane"]


class Net(nn.Module):
    def __init__(self, softmax=False, channels=3):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(channels, 8, 3, padding=1)
        self.head = nn.Linear(8 * 16, len(CLASSES))
        self.softmax = softmax

    def forward(self, x):
        x = nn.functional.adaptive_avg_pool2d(self.conv(x).relu(), (4, 4))
        x = self.head(x.flatten(1))
        return x.softmax(1) if self.softmax else x


def exported(path, *, softmax=False, batch=None, external=False, channels=3):
    """A torch export as users have it: input NCHW 24x32, a dynamic or a fixed batch, with or without external data."""
    net, files = torch_export(softmax, batch, external, channels)
    for suffix, content in files.items():
        path.with_name(path.name + suffix).write_bytes(content)
    return net


@functools.cache
def torch_export(softmax, batch, external, channels):
    """The network and its files by suffix; several tests start from the same ones."""
    net = Net(softmax, channels).eval()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch says while it exports is not what is tested here
        logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
        program = torch.onnx.export(
            net,
            (torch.zeros(batch or 2, channels, 24, 32),),
            dynamo=True,
            dynamic_shapes=None if batch else ({0: "n"},),
            external_data=external,
            verbose=False,
        )
        program.save(Path(folder, "net.onnx"), external_data=external)
        return net, {p.name.removeprefix("net.onnx"): p.read_bytes() for p in Path(folder).iterdir()}


@pytest.fixture
def labels(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("\n".join(CLASSES) + "\n")
    return path


@pytest.fixture
def request_for(tmp_path, labels):
    def build(**changes):
        fields = {"model": tmp_path / "net.onnx", "labels": labels, "name": "imported", "resize": "stretch"}
        return Request(**{**fields, **changes})

    return build


@pytest.fixture
def repository(tmp_path):
    return tmp_path / "repository"


def hand_made(path, *, shape, body, output, opset=13, initializers=(), elem_type=TensorProto.FLOAT, **meta):
    """A graph from nodes; `x` is its input."""
    graph = helper.make_graph(
        body,
        "hand-made",
        [helper.make_tensor_value_info("x", elem_type, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in output.items()],
        [numpy_helper.from_array(array, name) for name, array in initializers],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8, **meta)
    onnx.save(model, path)
    return path


def pooled(classes=5, channels=3, layout="nchw"):
    """Mean over the pixels, then one matrix: weights [C, K] of seeded numbers."""
    weights = np.random.default_rng(0).normal(size=(channels, classes)).astype(np.float32)
    axes = [2, 3] if layout == "nchw" else [1, 2]
    body = [
        helper.make_node("ReduceMean", ["x"], ["pooled"], axes=axes, keepdims=0),
        helper.make_node("MatMul", ["pooled", "weights"], ["y"]),
    ]
    return body, weights


def ask(version, pixels):
    return Session((version / "model.onnx").read_bytes()).run(pixels)


def random_pixels(count, height, width, channels=3):
    return np.random.default_rng(1).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def test_a_torch_export_gives_torchs_own_probabilities(tmp_path, request_for, repository):
    net = exported(tmp_path / "net.onnx")

    version = import_version(request_for(), repository)

    pixels = random_pixels(3, 24, 32)
    rule = PRESETS["imagenet-torchvision"].rule
    x = torch.from_numpy(rule.apply(pixels, "nchw", np.dtype(np.float32)))
    found = ask(version, pixels)
    np.testing.assert_allclose(found.probabilities, net(x).softmax(1).detach(), atol=1e-5)
    np.testing.assert_allclose(found.logits, net(x).detach(), atol=1e-4)


def test_the_version_is_whole_and_proves_itself(tmp_path, request_for, repository):
    exported(tmp_path / "net.onnx")
    weights = Weights(source="https://example.org/net", licence="MIT")

    version = artifact.load(import_version(request_for(weights=weights), repository))

    manifest = version.manifest
    assert manifest.classes == tuple(CLASSES)
    assert (manifest.input.height, manifest.input.width, manifest.input.channels) == (24, 32, 3)
    assert manifest.weights == weights
    assert manifest.variants[0].accuracy is None
    assert manifest.recipe["imported_from"] == "net.onnx"
    assert "It was imported" in version.file("card.html").read_text()
    artifact.check_signature(manifest, *Session(version.file("model.onnx").read_bytes()).signature)
    pixels = np.stack([preprocess(data, manifest.input) for data in version.canary_images()])
    np.testing.assert_allclose(ask(version.path, pixels).probabilities, manifest.canary.probabilities, atol=1e-6)


def test_the_scale_goes_into_the_first_convolution(tmp_path, request_for, repository):
    exported(tmp_path / "net.onnx")

    version = import_version(request_for(), repository)

    operations = [node.op_type for node in onnx.load(version / "model.onnx").graph.node]
    assert operations[:4] == ["Cast", "Transpose", "Sub", "Conv"]


def test_external_data_is_merged_into_the_file(tmp_path, request_for, repository):
    exported(tmp_path / "net.onnx", external=True)
    assert (tmp_path / "net.onnx.data").exists()

    version = import_version(request_for(), repository)

    assert sorted(p.name for p in version.iterdir()) == ["canary", "card.html", "manifest.json", "model.onnx"]
    assert not any(t.external_data for t in onnx.load(version / "model.onnx").graph.initializer)


def test_missing_external_data_is_named(tmp_path, request_for, repository):
    exported(tmp_path / "net.onnx", external=True)
    (tmp_path / "net.onnx.data").unlink()

    with pytest.raises(ArtifactError, match=r"net\.onnx\.data"):
        import_version(request_for(), repository)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_fixed_batch_becomes_dynamic(tmp_path, request_for, repository, batch):
    net = exported(tmp_path / "net.onnx", batch=batch)
    assert "Reshape" in {node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node}

    version = import_version(request_for(), repository)

    pixels = random_pixels(5, 24, 32)
    x = torch.from_numpy(PRESETS["imagenet-torchvision"].rule.apply(pixels, "nchw", np.dtype(np.float32)))
    np.testing.assert_allclose(ask(version, pixels).logits, net(x).detach(), atol=1e-4)


@pytest.mark.parametrize("allow_zero", [0, 1])
def test_a_batch_written_into_a_constant_node_is_freed(tmp_path, request_for, repository, allow_zero):
    weights = np.random.default_rng(0).normal(size=(192, 5)).astype(np.float32)
    target = numpy_helper.from_array(np.array([4, 192]))
    body = [
        helper.make_node("Constant", [], ["target"], value=target),
        helper.make_node("Reshape", ["x", "target"], ["flat"], allowzero=allow_zero),
        helper.make_node("MatMul", ["flat", "weights"], ["y"]),
    ]
    path, constants = tmp_path / "net.onnx", [("weights", weights)]
    hand_made(path, shape=[4, 3, 8, 8], body=body, output={"y": [4, 5]}, initializers=constants, opset=14)

    version = import_version(request_for(preset="zero-one"), repository)

    pixels = random_pixels(5, 8, 8)
    flat = (pixels / 255).transpose(0, 3, 1, 2).reshape(5, -1)
    np.testing.assert_allclose(ask(version, pixels).logits, flat @ weights, atol=1e-4)


def test_a_batch_written_as_a_list_of_integers_is_freed(tmp_path, request_for, repository):
    weights = np.random.default_rng(0).normal(size=(192, 5)).astype(np.float32)
    body = [
        helper.make_node("Constant", [], ["target"], value_ints=[1, 192]),
        helper.make_node("Reshape", ["x", "target"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["y"]),
    ]
    path, constants = tmp_path / "net.onnx", [("weights", weights)]
    hand_made(path, shape=[1, 3, 8, 8], body=body, output={"y": [1, 5]}, initializers=constants)

    version = import_version(request_for(preset="zero-one"), repository)

    pixels = random_pixels(5, 8, 8)
    flat = (pixels / 255).transpose(0, 3, 1, 2).reshape(5, -1)
    np.testing.assert_allclose(ask(version, pixels).logits, flat @ weights, atol=1e-4)


@pytest.mark.parametrize("kind", ["initializer", "node", "computed"])
def test_a_bias_that_the_graph_reshapes_is_not_taken_for_a_batch(tmp_path, request_for, repository, kind):
    body, weights = pooled()
    bias = np.array([0.1, 0.2, 0.3], np.float32)
    constants = [("weights", weights), ("target", np.array([1, 3, 1, 1]))]
    if kind == "node":
        body.insert(0, helper.make_node("Constant", [], ["bias"], value=numpy_helper.from_array(bias)))
    else:
        constants.append(("bias", bias))
    source = "bias"
    if kind == "computed":
        body.insert(0, helper.make_node("Neg", ["bias"], ["negative"]))
        body.insert(1, helper.make_node("Neg", ["negative"], ["positive"]))
        source = "positive"
    body[-2:-2] = [
        helper.make_node("Reshape", [source, "target"], ["per_channel"]),
        helper.make_node("Add", ["x", "per_channel"], ["moved"]),
    ]
    body[-2].input[0] = "moved"
    path = tmp_path / "net.onnx"
    hand_made(path, shape=[1, 3, 8, 8], body=body, output={"y": [1, 5]}, initializers=constants)

    version = import_version(request_for(preset="zero-one"), repository)

    pixels = random_pixels(5, 8, 8)
    wanted = ((pixels / 255).mean((1, 2)) + bias) @ weights
    np.testing.assert_allclose(ask(version, pixels).logits, wanted, atol=1e-4)


def test_weights_that_branches_read_stay_what_they_are(tmp_path, request_for, repository):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(5, 3, 1, 1)).astype(np.float32)

    def branch(operation):
        output = helper.make_tensor_value_info(operation, TensorProto.FLOAT, None)
        body = [
            helper.make_node("ReduceSum", ["kernel"], ["sum"], keepdims=0),
            helper.make_node(operation, ["pooled", "sum"], [operation]),
        ]
        return helper.make_graph(body, operation, [], [output])

    body = [
        helper.make_node("Conv", ["x", "kernel"], ["maps"]),
        helper.make_node("ReduceMean", ["maps"], ["pooled"], axes=[2, 3], keepdims=0),
        helper.make_node("If", ["condition"], ["y"], then_branch=branch("Mul"), else_branch=branch("Add")),
    ]
    path, constants = tmp_path / "net.onnx", [("kernel", kernel), ("condition", np.array(True))]
    hand_made(path, shape=["n", 3, 8, 8], body=body, output={"y": ["n", 5]}, initializers=constants)

    version = import_version(request_for(preset="zero-one"), repository)

    pixels = random_pixels(5, 8, 8)
    wanted = (pixels / 255).mean((1, 2)) @ kernel[:, :, 0, 0].T * kernel.sum()
    np.testing.assert_allclose(ask(version, pixels).logits, wanted, atol=1e-4)


def test_operations_that_onnx_runtime_does_not_know_are_named(tmp_path, request_for, repository):
    path = tmp_path / "net.onnx"
    body = [helper.make_node("Unheard", ["x"], ["y"], domain="com.example")]
    hand_made(path, shape=["n", 3, 8, 8], body=body, output={"y": ["n", 5]})
    model = onnx.load(path)
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    onnx.save(model, path)

    with pytest.raises(ArtifactError, match=r"ONNX Runtime cannot load the model.*com\.example"):
        import_version(request_for(), repository)


def test_a_batch_that_cannot_be_freed_is_refused(tmp_path, request_for, repository):
    body, weights = pooled()
    body.insert(0, helper.make_node("Expand", ["x", "two"], ["doubled"]))
    body[1].input[0] = "doubled"
    constants = [("weights", weights), ("two", np.array([2, 3, 8, 8]))]
    hand_made(tmp_path / "net.onnx", shape=[2, 3, 8, 8], body=body, output={"y": [2, 5]}, initializers=constants)

    with pytest.raises(TrainingError, match="export it again with a dynamic batch"):
        import_version(request_for(), repository)
    assert not repository.joinpath("imported").exists()


def test_nhwc_is_recognised_and_normalised_along_its_last_axis(tmp_path, request_for, repository):
    body, weights = pooled(layout="nhwc")
    path = tmp_path / "net.onnx"
    hand_made(
        path, shape=["n", 8, 9, 3], body=body, output={"y": ["n", 5]}, initializers=[("weights", weights)], opset=13
    )

    version = import_version(request_for(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)), repository)

    pixels = random_pixels(2, 8, 9)
    x = (pixels / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
    np.testing.assert_allclose(ask(version, pixels).logits, x.mean((1, 2)) @ weights, atol=1e-4)


def test_bgr_models_get_blue_first_and_the_means_stay_with_their_colours(tmp_path, request_for, repository):
    body, weights = pooled()
    path = tmp_path / "net.onnx"
    weights /= 50
    hand_made(
        path, shape=["n", 3, 8, 9], body=body, output={"y": ["n", 5]}, initializers=[("weights", weights)], opset=13
    )

    version = import_version(request_for(preset="imagenet-caffe-bgr"), repository)

    pixels = random_pixels(2, 8, 9)
    x = pixels[..., ::-1] - np.array([103.939, 116.779, 123.68])
    np.testing.assert_allclose(ask(version, pixels).logits, x.mean((1, 2)) @ weights, atol=1e-4)


def test_probabilities_stay_what_they_are_and_get_logits(tmp_path, request_for, repository):
    net = exported(tmp_path / "net.onnx", softmax=True)

    version = import_version(request_for(), repository)

    pixels = random_pixels(2, 24, 32)
    x = torch.from_numpy(PRESETS["imagenet-torchvision"].rule.apply(pixels, "nchw", np.dtype(np.float32)))
    found = ask(version, pixels)
    np.testing.assert_allclose(found.probabilities, net(x).detach(), atol=1e-5)
    np.testing.assert_allclose(found.logits, net(x).log().detach(), atol=1e-3)


def test_names_of_the_contract_inside_the_graph_do_not_collide(tmp_path, request_for, repository):
    weights = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    body = [
        helper.make_node("ReduceMean", ["x"], ["image"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["image", "weights"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    output = {"probabilities": ["n", 5], "logits": ["n", 5]}
    path = tmp_path / "net.onnx"
    hand_made(path, shape=["n", 3, 8, 8], body=body, output=output, initializers=[("weights", weights)])

    version = import_version(request_for(output="logits", preset="zero-one"), repository)

    pixels = random_pixels(2, 8, 8)
    np.testing.assert_allclose(ask(version, pixels).logits, (pixels / 255).mean((1, 2)) @ weights, atol=1e-5)


def test_an_old_operator_set_with_weights_among_the_inputs_is_brought_up_to_date(tmp_path, request_for, repository):
    weights = np.random.default_rng(0).normal(size=(192, 5)).astype(np.float32)
    body = [
        helper.make_node("Flatten", ["x"], ["flat"], axis=1),
        helper.make_node("Gemm", ["flat", "weights", "bias"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["y"], axis=1),
    ]
    constants = [("weights", weights), ("bias", np.zeros(5, np.float32))]
    path = tmp_path / "net.onnx"
    hand_made(path, shape=["n", 3, 8, 8], body=body, output={"y": ["n", 5]}, initializers=constants, opset=9)
    model = onnx.load(path)
    model.graph.input.append(helper.make_tensor_value_info("weights", 1, [192, 5]))  # as files of that time do
    onnx.save(model, path)

    version = import_version(request_for(preset="zero-one"), repository)

    imported = onnx.load(version / "model.onnx")
    pixels = random_pixels(2, 8, 8)
    flat = (pixels / 255).transpose(0, 3, 1, 2).reshape(2, -1)
    scores = flat @ weights
    wanted = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    assert imported.opset_import[0].version == 18
    np.testing.assert_allclose(ask(version, pixels).probabilities, wanted, atol=1e-5)


@pytest.mark.parametrize("opset", [9, 13])
def test_weights_among_the_inputs_are_weights_all_the_same(tmp_path, request_for, repository, opset):
    """Left there they could be given anew with each call: ONNX Runtime would fuse nothing into them."""
    kernel = np.random.default_rng(0).normal(size=(5, 3, 8, 8)).astype(np.float32)
    path = tmp_path / "net.onnx"
    hand_made(
        path,
        shape=["n", 3, 8, 8],
        body=[
            helper.make_node("Mul", ["x", "d"], ["scaled"]),
            helper.make_node("Conv", ["scaled", "w"], ["scores"]),
            helper.make_node("Flatten", ["scores"], ["y"], axis=1),
        ],
        output={"y": ["n", 5]},
        initializers=[("d", np.full((1, 3, 1, 1), 2, np.float32)), ("w", kernel)],
        opset=opset,
    )
    model = onnx.load(path)
    model.ir_version = 3
    model.graph.input.append(helper.make_tensor_value_info("w", 1, list(kernel.shape)))
    model.graph.input.append(helper.make_tensor_value_info("d", 1, [1, 3, 1, 1]))
    onnx.save(model, path)
    version = import_version(request_for(preset="zero-one", scores="logits"), repository)

    imported = onnx.load(version / "model.onnx")
    onnx.checker.check_model(imported, full_check=True)
    pixels = random_pixels(2, 8, 8)
    wanted = np.einsum("nhwc,kchw->nk", pixels / 255 * 2, kernel)
    assert [value.name for value in imported.graph.input] == ["image"]
    np.testing.assert_allclose(ask(version, pixels).logits, wanted, atol=1e-3)


def test_half_precision_graphs_get_half_precision_images(tmp_path, request_for, repository):
    body, weights = pooled()
    path = tmp_path / "net.onnx"
    constants = [("weights", weights.astype(np.float16))]
    hand_made(
        path,
        shape=["n", 3, 8, 8],
        body=body,
        output={},
        initializers=constants,
        opset=13,
        elem_type=TensorProto.FLOAT16,
    )
    model = onnx.load(path)
    model.graph.output.append(helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["n", 5]))
    onnx.save(model, path)

    version = import_version(request_for(), repository)

    assert ask(version, random_pixels(2, 8, 8)).logits.dtype == np.float32


def test_scores_with_trailing_ones_are_flattened(tmp_path, request_for, repository):
    weights = np.random.default_rng(0).normal(size=(5, 3, 1, 1)).astype(np.float32)
    body = [
        helper.make_node("GlobalAveragePool", ["x"], ["pooled"]),
        helper.make_node("Conv", ["pooled", "weights"], ["y"]),
    ]
    path = tmp_path / "net.onnx"
    hand_made(path, shape=["n", 3, 8, 8], body=body, output={"y": ["n", 5, 1, 1]}, initializers=[("weights", weights)])

    version = import_version(request_for(), repository)

    assert ask(version, random_pixels(7, 8, 8)).logits.shape == (7, 5)


def test_grayscale_models_take_one_value_for_all(tmp_path, request_for, repository):
    net = exported(tmp_path / "net.onnx", channels=1)

    version = import_version(request_for(mean=(0.13,), std=(0.31,)), repository)

    pixels = random_pixels(2, 24, 32, 1)
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    np.testing.assert_allclose(ask(version, pixels).logits, net((x - 0.13) / 0.31).detach(), atol=1e-4)


def test_given_canary_images_go_into_the_version(tmp_path, request_for, repository):
    exported(tmp_path / "net.onnx")
    photo = tmp_path / "photo.JPG"
    Image.fromarray(random_pixels(1, 60, 80)[0]).save(photo, "JPEG")

    version = import_version(request_for(canary=(photo,)), repository)

    assert [p.name for p in (version / "canary").iterdir()] == ["00.jpg"]
    assert (version / "canary" / "00.jpg").read_bytes() == photo.read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "imagenet"}, "unknown preset 'imagenet'; choose among imagenet-torchvision"),
        ({"resize": "crop", "shorter_side": 20}, "--shorter-side 20 is smaller than the input of 24x32"),
        ({"resize": "stretch", "shorter_side": 40}, "belongs to --resize crop"),
        ({"mean": (0.1, 0.2)}, "do not fit images of 3 channels"),
        ({"std": (0.0,)}, "std .* above 0"),
        ({"size": (25, 32)}, "contradicts"),
        ({"output": "nothing"}, "has no output nothing"),
        ({"name": "a/b"}, "letters, digits"),
        ({"name": "net\n"}, "letters, digits"),
        ({"resize": "crop", "shorter_side": 100_000}, "shorter side of 100000 cannot be"),
        ({"scores": "probabilities"}, "are no probabilities; say --scores logits"),
    ],
)
def test_choices_that_cannot_be_are_refused(tmp_path, request_for, repository, changes, message):
    body, weights = pooled()
    path = tmp_path / "net.onnx"
    hand_made(
        path, shape=["n", 3, 24, 32], body=body, output={"y": ["n", 5]}, initializers=[("weights", weights)], opset=13
    )

    with pytest.raises(ConfigurationError, match=message):
        import_version(request_for(**changes), repository)
    assert not repository.exists()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (["n", "c", 8, 8], "does not tell where the channels are"),
        (["n", 3, 8, 3], "does not tell where the channels are"),
        (["n", 3, "h", "w"], "say with --size"),
    ],
)
def test_what_the_shape_leaves_open_has_to_be_said(tmp_path, request_for, repository, shape, message):
    body, weights = pooled()
    path = tmp_path / "net.onnx"
    hand_made(path, shape=shape, body=body, output={"y": ["n", 5]}, initializers=[("weights", weights)])

    with pytest.raises(ConfigurationError, match=message):
        import_version(request_for(), repository)


def test_open_channels_have_to_be_said(tmp_path, request_for, repository):
    body, weights = pooled()
    path = tmp_path / "net.onnx"
    hand_made(path, shape=["n", "c", 8, 8], body=body, output={"y": ["n", 5]}, initializers=[("weights", weights)])

    with pytest.raises(ConfigurationError, match="give --mean and --std with three values for colour, or one for grey"):
        import_version(request_for(layout="nchw"), repository)


@pytest.mark.parametrize(
    ("channels", "mean", "std"),
    [(1, (0.1,), (0.5,)), (3, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)), (3, (0.1, 0.2, 0.3), (0.5,))],
)
def test_the_mean_and_std_tell_open_channels(tmp_path, request_for, repository, channels, mean, std):
    body, weights = pooled(channels=channels)
    path = tmp_path / "net.onnx"
    hand_made(path, shape=["n", "c", 8, 8], body=body, output={"y": ["n", 5]}, initializers=[("weights", weights)])

    version = import_version(request_for(layout="nchw", mean=mean, std=std), repository)

    pixels = random_pixels(2, 8, 8, channels)
    x = (pixels / 255 - mean) / std
    np.testing.assert_allclose(ask(version, pixels).logits, x.mean((1, 2)) @ weights, atol=1e-4)


@pytest.mark.parametrize("shape", [["n", 3, "h", "w"], [None, 3, None, None], [-1, 3, -1, -1]])
def test_a_graph_for_any_size_is_fixed_to_the_one_that_was_asked_for(tmp_path, request_for, repository, shape):
    body, weights = pooled()
    path = tmp_path / "net.onnx"
    hand_made(path, shape=shape, body=body, output={"y": ["n", 5]}, initializers=[("weights", weights)])

    version = import_version(request_for(size=(10, 12)), repository)

    assert artifact.load(version).manifest.input.shape == (10, 12, 3)


@pytest.mark.parametrize(
    ("shape", "elem_type", "message"),
    [
        (["n", 4, 8, 8], TensorProto.FLOAT, "does not tell|needs 1 or 3 channels"),
        (["n", 3, 8], TensorProto.FLOAT, "a batch of images has four dimensions"),
        (["n", 3, 8, 8], TensorProto.DOUBLE, "is DOUBLE; float32 and float16"),
    ],
)
def test_graphs_that_take_no_images_are_refused(tmp_path, request_for, repository, shape, elem_type, message):
    body = [helper.make_node("Flatten", ["x"], ["flat"]), helper.make_node("Cast", ["flat"], ["y"], to=1)]
    hand_made(tmp_path / "net.onnx", shape=shape, body=body, output={"y": ["n", "k"]}, elem_type=elem_type)

    with pytest.raises((ArtifactError, ConfigurationError), match=message):
        import_version(request_for(), repository)


def test_an_output_that_is_no_list_of_scores_is_refused(tmp_path, request_for, repository):
    body = [helper.make_node("Relu", ["x"], ["y"])]
    hand_made(tmp_path / "net.onnx", shape=["n", 3, 8, 8], body=body, output={"y": ["n", 3, 8, 8]})

    with pytest.raises(ArtifactError, match=r"a classifier gives \[N, classes\]"):
        import_version(request_for(), repository)


def test_an_output_of_text_is_refused(tmp_path, request_for, repository):
    body, weights = pooled()
    body += [
        helper.make_node("ArgMax", ["y"], ["best"], axis=1, keepdims=0),
        helper.make_node("Gather", ["names", "best"], ["label"]),
    ]
    constants = [("weights", weights), ("names", np.array(CLASSES, object))]
    path = tmp_path / "net.onnx"
    hand_made(path, shape=["n", 3, 8, 8], body=body, output={"y": ["n", 5]}, initializers=constants)
    model = onnx.load(path)
    model.graph.output.append(helper.make_tensor_value_info("label", TensorProto.STRING, ["n"]))
    onnx.save(model, path)

    with pytest.raises(ArtifactError, match="output label is no tensor of numbers; choose the scores with --output"):
        import_version(request_for(output="label"), repository)
    assert import_version(request_for(output="y"), repository).name == "1"


@pytest.mark.parametrize("scores", [None, "logits", "probabilities"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_answers_that_are_not_finite_are_called_that(tmp_path, request_for, repository, scores, value):
    body, weights = pooled()
    weights[0, 1] = value
    path = tmp_path / "net.onnx"
    hand_made(path, shape=["n", 3, 8, 8], body=body, output={"y": ["n", 5]}, initializers=[("weights", weights)])

    with pytest.raises(ArtifactError, match=r"answers are not finite \(NaN or infinite\) on 64 of 64 images"):
        import_version(request_for(scores=scores), repository)


def test_independent_yes_or_no_scores_are_not_taken_for_a_classifier(tmp_path, request_for, repository):
    body, weights = pooled()
    body[-1].output[0] = "z"
    body.append(helper.make_node("Sigmoid", ["z"], ["y"]))
    path = tmp_path / "net.onnx"
    hand_made(
        path, shape=["n", 3, 8, 8], body=body, output={"y": ["n", 5]}, initializers=[("weights", weights)], opset=13
    )

    with pytest.raises(ConfigurationError, match="do not add up to 1"):
        import_version(request_for(), repository)
    assert import_version(request_for(scores="logits"), repository).name == "1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\nb\nc", "names 3 classes, but the graph gives 5 scores"),
        ("a\nb\nc\nd", "background class"),
    ],
)
def test_labels_are_counted_against_the_graph(tmp_path, request_for, repository, labels, text, message):
    exported(tmp_path / "net.onnx")
    labels.write_text(text)

    with pytest.raises(ArtifactError, match=message):
        import_version(request_for(), repository)


@pytest.mark.parametrize("content", [b"", b"no model", b"\x08\x07"])
def test_files_that_are_no_models_are_refused(tmp_path, request_for, repository, content):
    (tmp_path / "net.onnx").write_bytes(content)

    with pytest.raises(ArtifactError, match=r"net\.onnx is not"):
        import_version(request_for(), repository)


@pytest.mark.filterwarnings("ignore:The onnxtxt format is experimental")
@pytest.mark.parametrize("suffix", ["pbtxt", "json", "onnxtxt"])
def test_text_that_is_no_model_is_refused(tmp_path, request_for, repository, suffix):
    path = tmp_path / f"net.{suffix}"
    path.write_text('{"a": 1}')

    with pytest.raises(ArtifactError, match=rf"net\.{suffix} is not an ONNX model that can be read"):
        import_version(request_for(model=path), repository)


def test_a_file_above_two_gibibytes_is_refused_before_it_is_read(tmp_path, request_for, repository):
    (tmp_path / "net.onnx").touch()
    os.truncate(tmp_path / "net.onnx", 1 << 31)  # takes no room on the disk

    with pytest.raises(TrainingError, match=r"2\.00 GiB of weights, and a model file without external data ends"):
        import_version(request_for(), repository)


def test_external_data_above_two_gibibytes_is_refused_before_it_is_read(tmp_path, request_for, repository):
    body, weights = pooled()
    path = tmp_path / "net.onnx"
    hand_made(path, shape=["n", 3, 8, 8], body=body, output={"y": ["n", 5]}, initializers=[("weights", weights)])
    model, length = onnx.load(path), 1 << 31
    huge = TensorProto(name="huge", data_type=TensorProto.FLOAT, dims=[length // 4], data_location="EXTERNAL")
    for key, value in (("location", "net.data"), ("length", str(length))):
        huge.external_data.add(key=key, value=value)
    model.graph.initializer.append(huge)
    path.write_bytes(model.SerializeToString())
    (tmp_path / "net.data").touch()
    os.truncate(tmp_path / "net.data", length)

    with pytest.raises(TrainingError, match=r"2\.00 GiB of weights"):
        import_version(request_for(), repository)


def test_what_protocol_buffers_cannot_count_is_too_large(tmp_path, request_for, repository, monkeypatch):
    class Huge:
        """A model that has grown beyond 2 GiB, without the memory for it."""

        graph = helper.make_graph(pooled()[0], "huge", [], [helper.make_tensor_value_info("y", 1, ["n", 5])])

        def ByteSize(self):  # noqa: N802  protocol buffers name it so
            raise EncodeError("Failed to serialize proto")

    (tmp_path / "net.onnx").touch()
    monkeypatch.setattr(onnx, "load", lambda *_, **__: Huge())
    monkeypatch.setattr(onnx, "load_external_data_for_model", lambda *_: None)

    with pytest.raises(TrainingError, match=r"2\.00 GiB of weights"):
        import_version(request_for(), repository)


def test_normalising_the_images_takes_less_memory_than_all_of_them_as_floats(tmp_path, request_for, repository):
    body, weights = pooled()
    path, side = tmp_path / "net.onnx", 128
    hand_made(path, shape=["n", 3, side, side], body=body, output={"y": ["n", 5]}, initializers=[("weights", weights)])

    tracemalloc.start()
    try:
        import_version(request_for(), repository)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < 64 * side * side * 3 * np.dtype(np.float64).itemsize


def test_a_missing_model_is_named(request_for, repository):
    with pytest.raises(ArtifactError, match=r"net\.onnx does not exist"):
        import_version(request_for(), repository)


def test_a_graph_with_two_inputs_is_refused(tmp_path, request_for, repository):
    path = tmp_path / "net.onnx"
    hand_made(
        path, shape=["n", 3, 8, 8], body=[helper.make_node("Add", ["x", "z"], ["y"])], output={"y": ["n", 3, 8, 8]}
    )
    model = onnx.load(path)
    model.graph.input.append(helper.make_tensor_value_info("z", 1, ["n", 3, 8, 8]))
    onnx.save(model, path)

    with pytest.raises(ArtifactError, match="has 2: x, z"):
        import_version(request_for(), repository)


def test_the_command_imports_and_says_what_comes_next(tmp_path, labels):
    exported(tmp_path / "net.onnx")

    result = CliRunner().invoke(
        import_cli.import_model,
        [str(tmp_path / "net.onnx"), "--labels", str(labels), "--repository", str(tmp_path / "r"),
         "--mean", "0.5", "--std", "0.2,0.3,0.4", "--order", "bgr", "--resize", "crop", "--shorter-side", "40",
         "--licence", "MIT"],
        catch_exceptions=False,
    )  # fmt: skip

    manifest = artifact.load(tmp_path / "r" / "net" / "1").manifest
    assert result.exit_code == 0
    assert "convoy classify IMAGE --server localhost:8500 --model net" in result.output
    assert manifest.recipe["mean"] == [0.5, 0.5, 0.5]
    assert manifest.recipe["std"] == [0.2, 0.3, 0.4]
    assert manifest.recipe["channel_order"] == "bgr"
    assert manifest.input.resize.shorter_side == 40
    assert manifest.weights.licence == "MIT"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mean", "a,b"], "is not a number or a list"),
        (["--size", "0x12"], "is not a size"),
        (["--size", "12x"], "is not a size"),
        (["--preset", "imagenet"], "imagenet-torchvision"),
        ([], "Missing option '--labels'"),
    ],
)
def test_the_command_explains_wrong_flags(tmp_path, flags, message):
    given = ["--labels", "missing.txt"] if flags else []

    result = CliRunner().invoke(import_cli.import_model, ["net.onnx", *given, *flags])

    assert result.exit_code == 2
    assert message in result.output


def test_the_command_reads_sizes_of_one_number_or_two(tmp_path, labels):
    body, weights = pooled()
    path = tmp_path / "net.onnx"
    hand_made(path, shape=["n", 3, "h", "w"], body=body, output={"y": ["n", 5]}, initializers=[("weights", weights)])

    for size in ("12", "12x16"):
        flags = ["--labels", str(labels), "--size", size, "--repository", str(tmp_path / "r"), "--preset", "none"]
        CliRunner().invoke(import_cli.import_model, [str(path), *flags], catch_exceptions=False)

    shapes = [artifact.load(tmp_path / "r" / "net" / number).manifest.input.shape for number in ("1", "2")]
    assert shapes == [(12, 12, 3), (12, 16, 3)]


def test_the_command_knows_every_preset():
    choices = next(p.type.choices for p in import_cli.import_model.params if p.name == "preset")

    assert tuple(choices) == tuple(PRESETS)


def test_every_choice_of_the_command_is_a_field_of_the_request():
    fields = {field.name for field in dataclasses.fields(Request)}
    flags = {p.name for p in import_cli.import_model.params} - {"repository", "source", "licence"}

    assert flags == fields - {"weights"}


def test_what_is_imported_is_compared_at_every_batch_size(tmp_path, request_for, repository, monkeypatch):
    exported(tmp_path / "net.onnx")
    asked, plain = [], gates.check_parity

    def check(session, wanted, pixels, batches, *rest):
        asked.append(tuple(batches))
        return plain(session, wanted, pixels, batches, *rest)

    monkeypatch.setattr(gates, "check_parity", check)
    import_version(request_for(), repository)
    assert asked == [gates.BATCHES]


@pytest.mark.parametrize(("total", "known"), [(1.009, True), (1.05, False), (0.95, False)])
def test_probabilities_add_up_to_one_within_a_hundredth(total, known):
    answers = np.array([[0.7, 0.2, total - 0.9], [0.5, 0.3, total - 0.8]], np.float32)
    if known:
        assert guess_scores(answers) == "probabilities"
    else:
        with pytest.raises(ConfigurationError, match="do not add up to 1"):
            guess_scores(answers)
