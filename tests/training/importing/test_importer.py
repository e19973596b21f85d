import tracemalloc

import numpy as np
import onnx
import pytest
import torch
from foreign_models import CLASSES, exported, hand_made, pooled
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from service import artifact
from service.artifact import Weights
from service.preprocess import preprocess
from training import gates
from training.conventions import PRESETS
from training.importer import import_version
from training.runtime import Session


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


def test_a_gray_image_that_the_graph_itself_makes_rgb_of_stays_gray_until_then(tmp_path, request_for, repository):
    """Its own multiplication has the form of the one that is folded into the first convolution."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(4, 3, 3, 3)).astype(np.float32)
    factor = np.array([1.0, 2.0, 3.0], np.float32).reshape(1, 3, 1, 1)
    matrix = rng.normal(size=(4, 5)).astype(np.float32)
    body = [
        helper.make_node("Mul", ["x", "factor"], ["rgb"]),
        helper.make_node("Conv", ["rgb", "weights"], ["features"]),
        helper.make_node("ReduceMean", ["features"], ["pooled"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["pooled", "matrix"], ["y"]),
    ]
    constants = [("factor", factor), ("weights", weights), ("matrix", matrix)]
    hand_made(tmp_path / "net.onnx", shape=["n", 1, 8, 8], body=body, output={"y": ["n", 5]}, initializers=constants)

    pixels = random_pixels(2, 8, 8, 1)
    found = ask(import_version(request_for(preset="zero-one"), repository), pixels)

    x = torch.from_numpy(pixels.transpose(0, 3, 1, 2) / 255 * factor).float()
    expected = torch.nn.functional.conv2d(x, torch.from_numpy(weights)).mean((2, 3)).numpy() @ matrix
    np.testing.assert_allclose(found.logits, expected, rtol=1e-4, atol=1e-4)


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


def test_what_is_imported_is_compared_at_every_batch_size(tmp_path, request_for, repository, monkeypatch):
    exported(tmp_path / "net.onnx")
    asked, plain = [], gates.check_parity

    def check(session, wanted, pixels, batches, *rest):
        asked.append(tuple(batches))
        return plain(session, wanted, pixels, batches, *rest)

    monkeypatch.setattr(gates, "check_parity", check)
    import_version(request_for(), repository)
    assert asked == [gates.BATCHES]
