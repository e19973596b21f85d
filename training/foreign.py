"""Somebody else's ONNX classifier: reads it, and finds where its images go in and its scores come out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from google.protobuf.message import EncodeError
from onnx import TensorProto, version_converter

from service.errors import ArtifactError, ConfigurationError, TrainingError
from training.conventions import Layout
from training.graph import OPSET, check_size
from training.wording import first_line

# What protocol buffers refuse to count, let alone to write.
_TOO_LARGE_BYTES = 1 << 31
# Softmax and the axes of reductions have their present meaning from here on.
_OLDEST_OPSET = 13
_FLOATS: dict[int, np.dtype[np.floating]] = {
    TensorProto.FLOAT: np.dtype(np.float32),
    TensorProto.FLOAT16: np.dtype(np.float16),
}


@dataclass(frozen=True)
class ImageInput:
    """The input of a foreign graph. `batch` is None if it may be any."""

    name: str
    dtype: np.dtype[np.floating]
    layout: Layout
    batch: int | None
    height: int
    width: int
    channels: Literal[1, 3]


def read(path: Path) -> onnx.ModelProto:
    """Reads a model with its external data, and brings it to a current operator set.

    Raises:
        ArtifactError: it is missing, no ONNX, or broken.
        TrainingError: it does not fit one file.
    """
    try:
        check_size(path.stat().st_size)
        model = onnx.load(path, load_external_data=False)
        check_size(_external_bytes(model))  # before so much is read
        onnx.load_external_data_for_model(model, str(path.parent))
    except FileNotFoundError as error:
        raise ArtifactError(f"{error.filename or path} does not exist; external data has to lie beside it") from error
    except TrainingError:
        raise
    except Exception as error:  # by the file's suffix onnx takes one of four parsers, each with errors of its own
        raise ArtifactError(f"{path} is not an ONNX model that can be read: {first_line(error)}") from error
    if not model.graph.node or not model.graph.output:
        raise ArtifactError(f"{path} is not an ONNX model: it holds no graph")
    check_size(_size_bytes(model))
    opset = next((entry.version for entry in model.opset_import if entry.domain in {"", "ai.onnx"}), 0)
    try:
        if opset < _OLDEST_OPSET:
            model = version_converter.convert_version(model, OPSET)
        onnx.checker.check_model(model)
    except Exception as error:  # the converter raises what its C++ throws
        raise ArtifactError(f"{path} is not a valid model (operator set {opset}): {first_line(error)}") from error
    return model


def image_input(
    model: onnx.ModelProto, layout: Layout | None, size: tuple[int, int] | None, told_channels: int | None = None
) -> ImageInput:
    """Finds the images' input.

    Args:
        model: the foreign graph.
        layout: where the channels are; None takes the axis of 1 or 3, if only one can be meant.
        size: height and width in pixels, for graphs that leave them open.
        told_channels: the same for the channels; what the graph says comes first.

    Raises:
        ArtifactError: the graph takes something other than one batch of images of 1 or 3 channels.
        ConfigurationError: layout, size or channels have to be given, or contradict the graph.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs) or "none"
        raise ArtifactError(f"an image classifier has one input, this graph has {len(inputs)}: {names}")
    tensor = inputs[0].type.tensor_type
    dtype = _FLOATS.get(tensor.elem_type)
    if dtype is None:
        kind = TensorProto.DataType.Name(tensor.elem_type)
        raise ArtifactError(f"input {inputs[0].name} is {kind}; float32 and float16 images can be imported")
    # Open dimensions have a name, nothing, or with some converters (paddle2onnx) the value -1.
    shape = [dim.dim_value if dim.dim_value > 0 else None for dim in tensor.shape.dim]
    if len(shape) != 4:  # noqa: PLR2004  N, C, H and W
        raise ArtifactError(f"input {inputs[0].name} has shape {_shown(shape)}; a batch of images has four dimensions")
    found = layout or _layout(inputs[0].name, shape)
    channel_axis, spatial = (1, shape[2:]) if found == "nchw" else (3, shape[1:3])
    channels = shape[channel_axis] or told_channels
    if channels is None:
        raise ConfigurationError(
            f"input {inputs[0].name} has shape {_shown(shape)}, which as {found} leaves the channels open; "
            "give --mean and --std with three values for colour, or one for grey"
        )
    if channels not in {1, 3}:
        raise ArtifactError(f"input {inputs[0].name} has shape {_shown(shape)}; as {found} it needs 1 or 3 channels")
    height, width = _size(spatial, size)
    return ImageInput(
        inputs[0].name, dtype, found, shape[0], height, width, 1 if channels == 1 else 3
    )  # fmt: skip


def output_name(model: onnx.ModelProto, wanted: str | None) -> str:
    """The output that holds the classes' scores.

    Raises:
        ConfigurationError: it has to be named, or the name is not one of the graph's.
    """
    names = [value.name for value in model.graph.output]
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted not in names:
        what = f"has no output {wanted}" if wanted else f"has {len(names)} outputs"
        raise ConfigurationError(f"the graph {what}; choose with --output among: {', '.join(names)}")
    return str(wanted)


def _external_bytes(model: onnx.ModelProto) -> int:
    """What the graph says of the weights beside it; those that give no length are met by `_size_bytes`."""
    entries = [entry for tensor in model.graph.initializer for entry in tensor.external_data]
    return sum(int(entry.value) for entry in entries if entry.key == "length")


def _size_bytes(model: onnx.ModelProto) -> int:
    try:
        return model.ByteSize()
    except EncodeError:
        return _TOO_LARGE_BYTES


def _layout(name: str, shape: Sequence[int | None]) -> Layout:
    first, last = shape[1] in {1, 3}, shape[3] in {1, 3}
    if first == last:
        raise ConfigurationError(
            f"input {name} has shape {_shown(shape)}, which does not tell where the channels are; "
            "say --layout nchw or --layout nhwc"
        )
    return "nchw" if first else "nhwc"


def _size(spatial: Sequence[int | None], wanted: tuple[int, int] | None) -> tuple[int, int]:
    sizes = []
    for found, asked in zip(spatial, wanted or (None, None), strict=True):
        if found and asked and found != asked:
            raise ConfigurationError(f"the graph takes images of {_shown(spatial)}, which --size {asked} contradicts")
        if not (found or asked):
            raise ConfigurationError("the graph takes images of any size; say with --size which one to serve")
        sizes.append(found or asked or 0)
    return sizes[0], sizes[1]


def _shown(shape: Sequence[int | None]) -> str:
    return "[" + ", ".join("?" if dim is None else str(dim) for dim in shape) + "]"
