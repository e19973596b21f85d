"""The surgery that makes a foreign graph keep the artifact contract.

In front comes what turns uint8[N, H, W, C] in RGB into the images that the graph wants, behind it what turns its
scores into `logits` and `probabilities`, and its batch becomes any. What the graph computes stays as it is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from service.artifact import INPUT_NAME, LOGITS_NAME, PROBABILITIES_NAME
from training.conventions import Normalisation, Scores
from training.foreign import ImageInput
from training.graph import fold_scale

# A smaller probability counts as this one when it becomes a logit, so that its logarithm is finite.
SMALLEST_PROBABILITY = 1e-12

_BATCH = "batch"
_IR_VERSION = 8  # of ONNX 1.10; from 4 on weights need not be inputs
_PREFIX = "imported/"


def free_batch(model: onnx.ModelProto, image: ImageInput) -> None:
    """Makes a fixed batch dynamic: in the inputs and outputs, and where a Reshape has written it down.

    What else may depend on it is left to the parity gate, which tries other sizes.
    """
    for value in [*model.graph.input, *model.graph.output]:
        dims = value.type.tensor_type.shape.dim
        if len(dims) and (value.name == image.name or dims[0].dim_value == image.batch):
            dims[0].dim_param = _BATCH
    model.graph.ClearField("value_info")  # shapes in it are of the old batch
    if image.batch is not None:
        depending = _depending(model.graph, image.name)
        for node in [node for node in model.graph.node if node.op_type == "Reshape" and node.input[0] in depending]:
            _free_reshape(model.graph, node, image.batch)


def wrap(model: onnx.ModelProto, image: ImageInput, output: str, rule: Normalisation, scores: Scores,
         classes: int) -> onnx.ModelProto:  # fmt: skip
    """The graph between pixels and probabilities; see the module.

    Args:
        model: the foreign graph, whose batch is free.
        image: its input.
        output: its output [N, K], or [N, K, 1, 1].
        rule: what its pixels have to look like.
        scores: what the output means.
        classes: K.
    """
    wrapped = onnx.ModelProto()
    wrapped.CopyFrom(model)
    graph = wrapped.graph
    # onnx renames a graph's weights after the branches of its If nodes, which read them too, unless it is told before.
    weights = {tensor.name: _PREFIX + tensor.name for tensor in graph.initializer}
    onnx.compose.add_prefix_graph(graph, _PREFIX, inplace=True, name_map=weights)
    front, constants = _front(image, rule)
    end = _end(_PREFIX + output, scores, classes)
    body = list(graph.node)
    del graph.node[:], graph.output[:]
    del graph.input[:]
    # Without the weights that old files list as inputs, too: those could be given anew with each call, so that ONNX
    # Runtime works nothing out beforehand. Their format knows no others.
    wrapped.ir_version = max(wrapped.ir_version, _IR_VERSION)
    graph.input.append(
        helper.make_tensor_value_info(
            INPUT_NAME, TensorProto.UINT8, [_BATCH, image.height, image.width, image.channels]
        )
    )
    graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [_BATCH, classes])
        for name in (LOGITS_NAME, PROBABILITIES_NAME)
    )
    graph.node.extend([*front, *body, *end[0]])
    graph.initializer.extend([*constants, *end[1]])
    wrapped.ClearField("metadata_props")
    if not any(_has_branches(node) for node in body):  # they may read the weights that the scale would go into
        fold_scale(wrapped, constants[-1].name)
    return wrapped


def _front(image: ImageInput, rule: Normalisation) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Nodes from uint8[N, H, W, C] to what the graph takes, and their constants, of which the scale is the last."""
    nodes, constants, value = [], [], INPUT_NAME

    def then(operation: str, *others: str, **attributes: Any) -> None:
        nonlocal value
        result = f"front/{operation.lower()}"
        nodes.append(helper.make_node(operation, [value, *others], [result], name=result, **attributes))
        value = result

    def constant(name: str, array: NDArray[np.generic]) -> str:
        constants.append(numpy_helper.from_array(array, f"front/{name}"))
        return constants[-1].name

    broadcast = (1, -1, 1, 1) if image.layout == "nchw" else (1, 1, 1, -1)
    then("Cast", to=TensorProto.FLOAT)  # first: see training.graph
    if rule.order == "bgr":
        then("Gather", constant("order", np.array([2, 1, 0])), axis=3)
    if image.layout == "nchw":
        then("Transpose", perm=[0, 3, 1, 2])
    offset, scale = 255 * rule.ordered(rule.mean), 1 / (255 * rule.ordered(rule.std))
    then("Sub", constant("offset", offset.reshape(broadcast).astype(np.float32)))
    then("Mul", constant("scale", scale.reshape(broadcast).astype(np.float32)))
    if image.dtype == np.float16:
        nodes.append(helper.make_node("Cast", [value], [_PREFIX + image.name], "front/half", to=TensorProto.FLOAT16))
    else:
        nodes[-1].output[0] = _PREFIX + image.name
    return nodes, constants


def _end(output: str, scores: Scores, classes: int) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Nodes from the graph's output to logits and probabilities, float32[N, K], and their constants."""
    constants = [numpy_helper.from_array(np.array([0, classes]), "end/shape")]
    nodes = [
        helper.make_node("Cast", [output], ["end/float"], "end/float", to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["end/float", "end/shape"], ["end/flat"], "end/flat"),
    ]
    if scores == "logits":
        nodes.append(helper.make_node("Identity", ["end/flat"], [LOGITS_NAME], "end/logits"))
    else:  # logarithms of probabilities are logits: softmax gives the probabilities back
        constants.append(numpy_helper.from_array(np.array(SMALLEST_PROBABILITY, np.float32), "end/smallest"))
        nodes += [
            helper.make_node("Max", ["end/flat", "end/smallest"], ["end/positive"], "end/positive"),
            helper.make_node("Log", ["end/positive"], [LOGITS_NAME], "end/logits"),
        ]
    nodes.append(helper.make_node("Softmax", [LOGITS_NAME], [PROBABILITIES_NAME], "end/probabilities", axis=1))
    return nodes, constants


def _depending(graph: onnx.GraphProto, image: str) -> set[str]:
    """Names of the values that depend on the images; a bias that is reshaped to [1, C, 1, 1] does not."""
    names = {image}
    for node in graph.node:  # an ONNX graph is in the order of its computation
        if names.intersection(node.input) or _has_branches(node):
            names.update(node.output)
    return names


def _has_branches(node: onnx.NodeProto) -> bool:
    """Whether a node holds graphs of its own, as If and Loop do: they read values that its inputs do not name."""
    return any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)


def _free_reshape(graph: onnx.GraphProto, node: onnx.NodeProto, batch: int) -> None:
    """Replaces a written-down batch in a Reshape's target by "as it comes"."""
    target = _constant(graph, node.input[1])
    if target is None or target.ndim != 1 or not len(target) or target[0] != batch or 0 in target[1:]:
        return
    name = f"{node.input[1]}/{node.output[0]}/any_batch"  # its own: other nodes may read the same constant
    graph.initializer.append(numpy_helper.from_array(np.array([0, *target[1:]], np.int64), name))
    node.input[1] = name
    kept = [attribute for attribute in node.attribute if attribute.name != "allowzero"]  # 0 now means "copy"
    del node.attribute[:]
    node.attribute.extend(kept)


def _constant(graph: onnx.GraphProto, name: str) -> NDArray[np.int64] | None:
    tensor = next((entry for entry in graph.initializer if entry.name == name), None)
    if tensor is None:
        node = next((entry for entry in graph.node if entry.op_type == "Constant" and name in entry.output), None)
        fields = {attribute.name: attribute for attribute in node.attribute} if node else {}
        if "value_ints" in fields:
            return np.array(fields["value_ints"].ints, np.int64)
        tensor = fields["value"].t if "value" in fields else None
    return None if tensor is None else numpy_helper.to_array(tensor)
