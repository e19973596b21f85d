"""Smaller number formats of an exported graph: int8 for CPUs, int8 for TensorRT, fp16.

Nothing here judges them: `training.variants` measures accuracy and speed and decides what is kept. The preprocessing
nodes in front of the first layer and the Softmax at the end stay in float.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import platform
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers import float16

from service import resources
from service.artifact import INPUT_NAME
from service.errors import TrainingError

_LAYERS = ("Conv", "Gemm", "MatMul")
_VNNI_FLAGS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})
# TensorRT's entropy calibration keeps every activation of a step in memory, and gains nothing from more images.
_TENSORRT_IMAGES = 128
_STEP_BYTES = 2_000_000


@dataclass(frozen=True)
class Int8Form:
    """One dialect of int8: what a runtime's kernels understand best.

    `operations` are quantised, `options` go to ONNX Runtime's quantiser as they are. `images`: the most to calibrate
    with; None takes all.
    """

    activations: QuantType
    method: CalibrationMethod
    operations: tuple[str, ...]
    images: int | None
    reduce_range: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def cpu_form(*, reduce_range: bool) -> Int8Form:
    """U8 activations and S8 weights per channel, and every operation between two layers in int8 too.

    Args:
        reduce_range: weights of 7 bits, for x86 CPUs without VNNI, whose 16-bit sums of two products overflow.
    """
    return Int8Form(
        activations=QuantType.QUInt8,
        method=CalibrationMethod.MinMax,
        operations=(
            *_LAYERS, "Relu", "Clip", "LeakyRelu", "Add", "Concat", "MaxPool", "AveragePool", "GlobalAveragePool",
            "Reshape", "Flatten",
        ),
        images=None,
        reduce_range=reduce_range,
        # The last layer's sums are int32 anyway; rounding the logits to 8 bits would only lose.
        options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
    )  # fmt: skip


def tensorrt_form() -> Int8Form:
    """Symmetric S8 everywhere, biases in float, a Q/DQ pair per consumer: what TensorRT fuses into its kernels."""
    return Int8Form(
        activations=QuantType.QInt8,
        method=CalibrationMethod.Entropy,
        operations=_LAYERS,
        images=_TENSORRT_IMAGES,
        options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "DedicatedQDQPair": True,
            # TensorRT fuses a layer with the Add and Relu behind it when nothing stands between them.
            "OpTypesToExcludeOutputQuantization": list(_LAYERS),
        },
    )


class Int8:
    """Quantises one graph, calibrated once however often it is tried with other layers left in float.

    Args:
        model: the float graph.
        calibration: uint8[M, H, W, C], training images as the model sees them.
        form: the dialect.
        folder: for intermediate files; the caller removes it.

    Raises:
        TrainingError: there are no calibration images, or the graph has no layer to quantise.
    """

    def __init__(self, model: onnx.ModelProto, calibration: NDArray[np.uint8], form: Int8Form, folder: Path) -> None:
        if not len(calibration):
            raise TrainingError("int8 needs training images to calibrate with, and there are none")
        self._form, self._folder = form, folder
        self._pixels = calibration[: form.images]
        source, self._prepared = folder / "float.onnx", folder / "prepared.onnx"
        _name_nodes(model)
        onnx.save_model(model, source)
        with _quiet():
            # Symbolic shapes need sympy and matter for transformers only.
            quant_pre_process(source, self._prepared, skip_symbolic_shape=True)
        self._graph = onnx.load(self._prepared)
        self._layers = [node.name for node in self._graph.graph.node if node.op_type in _LAYERS]
        if not self._layers:
            raise TrainingError("the graph has no convolution and no matrix product that int8 could speed up")

    @property
    def ends(self) -> tuple[str, str]:
        """Names of the first and the last layer, the ones that suffer most from 8 bits."""
        return self._layers[0], self._layers[-1]

    def quantize(self, keep_float: Sequence[str] = ()) -> onnx.ModelProto:
        """The int8 graph; the layers in `keep_float` stay as they are.

        Raises:
            TrainingError: ONNX Runtime's quantiser cannot handle the graph.
        """
        target = self._folder / "int8.onnx"
        form = self._form
        try:
            with _quiet():
                quantize_static(
                    self._prepared,
                    target,
                    _Reader(self._pixels),
                    quant_format=QuantFormat.QDQ,
                    op_types_to_quantize=list(form.operations),
                    nodes_to_exclude=[*self._before_first_layer(), *keep_float],
                    per_channel=True,
                    reduce_range=form.reduce_range,
                    activation_type=form.activations,
                    weight_type=QuantType.QInt8,
                    calibrate_method=form.method,
                    # Step by step, so that the activations of one step are in memory and not those of all images.
                    extra_options={**form.options, "CalibStridedMinMax": 1},
                    calibration_cache_path=self._folder / "ranges.json",
                )
        except Exception as error:  # the quantiser raises whatever its parts do
            raise TrainingError(f"ONNX Runtime cannot quantise the graph: {error}") from error
        return _tidied(onnx.load(target))

    def _before_first_layer(self) -> list[str]:
        names = [node.name for node in self._graph.graph.node]
        return names[: names.index(self._layers[0])]


def to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Half precision inside, float32 outside; preprocessing and Softmax stay in float32.

    Raises:
        TrainingError: the graph cannot be converted.
    """
    source = copy.deepcopy(model)
    _name_nodes(source)
    nodes = list(source.graph.node)
    first = next((i for i, node in enumerate(nodes) if node.op_type in _LAYERS), 0)
    # Pixels are whole numbers that half precision holds exactly; around each node that is kept the converter casts.
    exact = {"Cast", "Transpose"}
    try:
        with _quiet():
            converted: onnx.ModelProto = float16.convert_float_to_float16(
                source,
                keep_io_types=True,
                op_block_list=[*float16.DEFAULT_OP_BLOCK_LIST, "Softmax"],
                node_block_list=[node.name for node in nodes[:first] if node.op_type not in exact],
            )
    except Exception as error:  # the converter raises whatever its parts do
        raise TrainingError(f"the graph cannot be converted to fp16: {error}") from error
    _cast_once(converted)
    return _tidied(converted)


def needs_reduced_range(machine: str | None = None, cpu_flags: Collection[str] | None = None) -> bool:
    """Whether this CPU multiplies int8 without VNNI, so that 8-bit weights could overflow.

    Args:
        machine: architecture as `platform.machine` names it; None asks.
        cpu_flags: instruction sets as Linux spells them; None asks. Where they cannot be read, none are assumed.
    """
    if (machine or platform.machine()).lower() not in {"x86_64", "amd64", "i686", "i386"}:
        return False  # ARM has no such overflow
    if cpu_flags is None:
        _, cpu_flags = resources.cpu_model()
    return _VNNI_FLAGS.isdisjoint(cpu_flags)


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # the base has no type information
    """Hands out uint8[M, H, W, C] in steps of about `_STEP_BYTES`, in the protocol of ONNX Runtime's calibrators."""

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        step = int(np.clip(_STEP_BYTES // max(1, pixels[0].nbytes), 1, 64))
        self._steps = [pixels[start : start + step] for start in range(0, len(pixels), step)]
        self._next, self._end = 0, len(self._steps)

    def __len__(self) -> int:
        return len(self._steps)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._next, self._end = start_index, end_index

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        if self._next >= self._end:
            return None
        self._next += 1
        return {INPUT_NAME: self._steps[self._next - 1]}


def _name_nodes(model: onnx.ModelProto) -> None:
    """Gives every node a name of its own: exclusions go by name, and foreign graphs may lack them."""
    taken: set[str] = set()
    for index, node in enumerate(model.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{index}_unnamed"
        taken.add(node.name)


def _cast_once(model: onnx.ModelProto) -> None:
    """Drops casts that are there already: the converter writes one for each kept node that takes a value."""
    made: set[str] = set()
    for node in list(model.graph.node):
        if node.op_type == "Cast" and node.output[0] in made:
            model.graph.node.remove(node)
        made.update(node.output)


def _tidied(model: onnx.ModelProto) -> onnx.ModelProto:
    """Drops what the tools leave in a file: their own marks, and imports of operator sets that no node uses."""
    used = {node.domain for node in model.graph.node}
    imports = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:], model.metadata_props[:]
    model.opset_import.extend(imports)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the tools: advice to run what has just been run, notes on tiny numbers, progress by `print`."""
    root = logging.getLogger()  # ONNX Runtime's quantiser logs to the root logger
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.filterwarnings("ignore", module=r"onnxruntime\..*")
            yield
    finally:
        root.setLevel(level)
