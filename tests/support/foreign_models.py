"""ONNX classifiers as users bring them: a torch export, and graphs made by hand."""

import functools
import logging
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

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
