"""A PyTorch classifier as one ONNX graph that takes pixels: uint8[N, H, W, C] to `logits` and `probabilities`.

The graph begins with Cast, Transpose, Sub(255 * mean) and a scale of 1 / (255 * std). The scale is folded into the
first convolution's weights, which is exact. The mean is not: a convolution pads with zeros *after* the subtraction,
so a mean folded into its bias would be wrong along the borders.

The cast comes first because TensorRT takes uint8 into a cast and into nothing else, not even a transposition
(https://github.com/NVIDIA/TensorRT/issues/3985); on the CPU the order makes no difference.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import onnx
import onnx_ir
import torch
from onnx import numpy_helper
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn

from service.artifact import INPUT_NAME, LOGITS_NAME, PROBABILITIES_NAME, InputSpec
from service.errors import TrainingError
from training.wording import first_line

OPSET = 18
# Protocol buffers, and with them an ONNX file without external data, end here.
MAX_MODEL_BYTES = (1 << 31) - (1 << 20)

_EXAMPLE_BATCH = 2  # torch.export takes a dimension of 1 for a constant


class Servable(nn.Module):
    """A classifier from raw pixels to calibrated probabilities.

    Args:
        model: float32[N, C, H, W], normalised, to logits float32[N, K]. Deep-copied to the CPU as float32, in
            evaluation mode, without gradients.
        mean: per channel, of pixels in 0..1.
        std: per channel, of pixels in 0..1.
        temperature: divides the logits.

    Raises:
        TrainingError: the model is too large for one file.
    """

    offset: Tensor
    scale: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float], temperature: float) -> None:
        super().__init__()
        check_size(sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]))
        # Channels-last weights would export adaptive pooling as a chain of gathers.
        clone = copy.deepcopy(model).to("cpu", torch.float32).requires_grad_(requires_grad=False)
        for tensor in [*clone.parameters(), *clone.buffers()]:
            tensor.data = tensor.data.contiguous()
        self.model = clone
        self.temperature = temperature
        per_channel = (1, -1, 1, 1)
        self.register_buffer("offset", 255 * torch.tensor(mean).view(per_channel))
        self.register_buffer("scale", 1 / (255 * torch.tensor(std).view(per_channel)))
        self.eval()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels uint8[N, H, W, C] to logits and probabilities, float32[N, K] each."""
        x = image.float().permute(0, 3, 1, 2).contiguous()  # [N, C, H, W]
        x = (x - self.offset) * self.scale  # [N, C, H, W]
        logits = self.model(x) / self.temperature  # [N, K]
        return logits, logits.softmax(dim=1)  # [N, K], [N, K]


def to_onnx(servable: Servable, spec: InputSpec) -> onnx.ModelProto:
    """Exports with a dynamic batch, opset 18, weights inside, and without names of source files or stack traces.

    Raises:
        TrainingError: the model cannot be expressed for a batch of any size.
    """
    example = torch.zeros(_EXAMPLE_BATCH, *spec.shape, dtype=torch.uint8)
    try:
        with _quiet_exporter():
            program = torch.onnx.export(
                servable,
                (example,),
                dynamo=True,
                dynamic_shapes=({0: "batch"},),
                external_data=False,
                opset_version=OPSET,
                optimize=True,
                input_names=[INPUT_NAME],
                output_names=[LOGITS_NAME, PROBABILITIES_NAME],
                verbose=False,
            )
    except Exception as error:  # whatever the model's own code raises while it is traced, and torch's many classes
        raise TrainingError(
            f"the model cannot be exported to ONNX with a batch of any size: {_cause(error)}; "
            "its forward may not depend on the batch size or on values of tensors"
        ) from error
    if program is None:  # only with dynamo=False
        raise TrainingError("the exporter returned nothing")
    ClearMetadataAndDocStringPass()(program.model)
    model = onnx_ir.to_proto(program.model)
    _strip_values(model.graph)
    fold_scale(model, "scale")
    return model


def check_size(size_bytes: int) -> None:
    """Refuses what does not fit one ONNX file.

    Raises:
        TrainingError: above `MAX_MODEL_BYTES`.
    """
    if size_bytes > MAX_MODEL_BYTES:
        raise TrainingError(
            f"the model has {size_bytes / (1 << 30):.2f} GiB of weights, and a model file without external data "
            "ends at 2 GiB; choose a smaller one"
        )


def fold_scale(model: onnx.ModelProto, scale: str) -> bool:
    """Folds a per-channel Mul by a constant into the weights of the convolution that alone consumes it.

    Args:
        model: changed in place.
        scale: name of the constant, [1, C, 1, 1] or one number. Another Mul of the graph may broadcast channels.

    Returns:
        Whether the graph had that form; otherwise it stays as it is, correct and one operation longer.
    """
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    mul = _only_user(graph, scale)
    if mul is None or mul.op_type != "Mul" or scale not in constants or not _is_per_channel(constants[scale]):
        return False
    conv = _only_user(graph, mul.output[0])
    if conv is None or conv.op_type != "Conv" or conv.input[0] != mul.output[0]:
        return False
    weights = constants.get(conv.input[1])
    if weights is None or _only_user(graph, weights.name) is None:
        return False
    weights.CopyFrom(_scaled(weights, numpy_helper.to_array(constants[scale]), _group(conv)))
    conv.input[0] = next(name for name in mul.input if name != scale)
    graph.node.remove(mul)
    graph.initializer.remove(constants[scale])
    return True


def _only_user(graph: onnx.GraphProto, name: str) -> onnx.NodeProto | None:
    """The node that alone reads a value; None if there are more, or if the value is an output of the graph."""
    users = [node for node in graph.node if name in node.input]
    return users[0] if len(users) == 1 and all(output.name != name for output in graph.output) else None


def _is_per_channel(factor: onnx.TensorProto) -> bool:
    """Whether a float constant is one number, or broadcasts along the channels of [N, C, H, W] and nothing else."""
    shape = list(factor.dims)
    along_channels = len(shape) in {3, 4} and shape[-2:] == [1, 1] and int(np.prod(shape)) == shape[-3]
    return factor.data_type == onnx.TensorProto.FLOAT and (int(np.prod(shape)) == 1 or along_channels)


def _scaled(weights: onnx.TensorProto, factor: np.ndarray, group: int) -> onnx.TensorProto:
    """Convolution weights [O, C / group, kh, kw] for an input [N, C, H, W] that lost its factor [1, C or 1, 1, 1]."""
    kernel = numpy_helper.to_array(weights).astype(np.float64)
    outputs, inputs = kernel.shape[:2]
    grouped = kernel.reshape(group, outputs // group, inputs, *kernel.shape[2:])
    per_input = np.broadcast_to(factor.astype(np.float64).reshape(-1), group * inputs)
    folded = (grouped * per_input.reshape(group, 1, inputs, *[1] * len(kernel.shape[2:]))).reshape(kernel.shape)
    return numpy_helper.from_array(folded.astype(np.float32), weights.name)


def _group(conv: onnx.NodeProto) -> int:
    return next((attribute.i for attribute in conv.attribute if attribute.name == "group"), 1)


def _strip_values(graph: onnx.GraphProto) -> None:
    """Drops what the exporter says about its own origin of inputs, outputs and intermediate values."""
    for value in [*graph.input, *graph.output]:
        value.ClearField("metadata_props")
    graph.ClearField("value_info")
    graph.ClearField("metadata_props")


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silences what torch.onnx says about itself on every export and nobody can act on."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)  # "torchvision is not installed": its operators are not used
    try:
        with warnings.catch_warnings():
            # torch 2.13 calls its own deprecated tree functions when it copies an exported program.
            warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
            yield
    finally:
        registration.setLevel(level)


def _cause(error: BaseException) -> str:
    """The first line of the innermost error: torch wraps it in pages of advice about its own internals."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)
