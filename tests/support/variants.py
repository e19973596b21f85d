"""Further variants of the toy model, and engines and machines for the tests of the choice among them."""

import json

import numpy as np
import onnx
from onnx import helper, numpy_helper
from toys import write_version

from service import artifact
from service.candidates import Machine

CLASSES = 10


def machine(cpus=2, gpus=(), flags=("avx512_vnni", "avx512_bf16"), **versions):
    """A machine that only exists here."""
    known = {"onnxruntime": "1.31.1", "openvino": "", "tensorrt": "", **versions}
    return Machine(cpus=cpus, cpu_name="Toy CPU", cpu_flags=frozenset(flags), gpus=tuple(gpus), versions=known)


def slowed(model, work=40):
    """The same answers after much useless work, which no optimiser can see through."""
    slow = onnx.ModelProto()
    slow.CopyFrom(model)
    graph = slow.graph
    graph.initializer.extend(
        [
            numpy_helper.from_array(np.asarray([1, 1, 40_000], np.int64), "tiles"),
            numpy_helper.from_array(np.asarray([1, 2], np.int64), "slow_axes"),
            numpy_helper.from_array(np.asarray([-1, 1, 1], np.int64), "slow_shape"),
            numpy_helper.from_array(np.asarray(0, np.float32), "nothing"),
        ]
    )
    level = next(node for node in graph.node if "level" in node.output)
    level.output[0] = "fast_level"
    nodes = [
        helper.make_node("Reshape", ["fast_level", "slow_shape"], ["slow_0"]),
        helper.make_node("Expand", ["slow_0", "tiles"], ["erf_0"]),
        *(helper.make_node("Erf", [f"erf_{i}"], [f"erf_{i + 1}"]) for i in range(work)),
        helper.make_node("ReduceMax", [f"erf_{work}", "slow_axes"], ["slow_max"], keepdims=0),
        helper.make_node("Mul", ["slow_max", "nothing"], ["slow_zero"]),
        helper.make_node("Reshape", ["slow_zero", "column"], ["slow_column"]),
        helper.make_node("Add", ["fast_level", "slow_column"], ["level"]),
    ]
    after = list(graph.node).index(level) + 1
    kept = list(graph.node)
    del graph.node[:]
    graph.node.extend([*kept[:after], *nodes, *kept[after:]])
    onnx.checker.check_model(slow)
    return slow


def wrong(model):
    """Every class one too far: the canary has to notice."""
    other = onnx.ModelProto()
    other.CopyFrom(model)
    for index, tensor in enumerate(other.graph.initializer):
        if tensor.name == "centres":
            moved = np.roll(numpy_helper.to_array(tensor), 1, axis=1)
            other.graph.initializer[index].CopyFrom(numpy_helper.from_array(moved, "centres"))
    return other


def huge(model, bytes_per_image, work=1):
    """Wants so much memory for each image on the way; with `work` maybe twice as much."""
    big = slowed(model, work)
    for index, tensor in enumerate(big.graph.initializer):
        if tensor.name == "tiles":
            tiles = np.asarray([1, 1, bytes_per_image // 4], np.int64)
            big.graph.initializer[index].CopyFrom(numpy_helper.from_array(tiles, "tiles"))
    return big


def version_with(root, fp32=None, **variants):
    """A loaded version of the toy model with these graphs: `fp32` in place of the plain one, and further variants."""
    path = write_version(root, classes=CLASSES)
    plain = onnx.load(path / artifact.MODEL)
    for name, make in {"fp32": fp32 or (lambda model: model), **variants}.items():
        file = artifact.MODEL if name == "fp32" else f"model.{name}.onnx"
        onnx.save_model(make(plain), path / file)
        register(path, name, file)
    return artifact.load(path)


def register(path, name, file):
    """Enters a file into the manifest of a version."""
    manifest = path / artifact.MANIFEST
    facts = json.loads(manifest.read_text())
    facts["files"][file] = artifact.file_entry(path / file).model_dump()
    if name not in {variant["name"] for variant in facts["variants"]}:
        facts["variants"].append({"name": name, "file": file})
    manifest.write_text(json.dumps(facts))


def levels_image(levels, spec):
    """Images of one grey level each: uint8[N, H, W, C]."""
    return np.broadcast_to(np.asarray(levels, np.uint8)[:, None, None, None], (len(levels), *spec.shape)).copy()
