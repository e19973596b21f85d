"""Graphs, labels and choices that cannot be imported, each with its reason."""

import os

import numpy as np
import onnx
import pytest
from foreign_models import CLASSES, exported, hand_made, pooled
from google.protobuf.message import EncodeError
from onnx import TensorProto, helper

from service.errors import ArtifactError, ConfigurationError, TrainingError
from training.importer import guess_scores, import_version


def test_missing_external_data_is_named(tmp_path, request_for, repository):
    exported(tmp_path / "net.onnx", external=True)
    (tmp_path / "net.onnx.data").unlink()

    with pytest.raises(ArtifactError, match=r"net\.onnx\.data"):
        import_version(request_for(), repository)


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


@pytest.mark.parametrize(("total", "known"), [(1.009, True), (1.05, False), (0.95, False)])
def test_probabilities_add_up_to_one_within_a_hundredth(total, known):
    answers = np.array([[0.7, 0.2, total - 0.9], [0.5, 0.3, total - 0.8]], np.float32)
    if known:
        assert guess_scores(answers) == "probabilities"
    else:
        with pytest.raises(ConfigurationError, match="do not add up to 1"):
            guess_scores(answers)
