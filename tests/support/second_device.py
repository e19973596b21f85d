"""A device beside the CPU, for machines without a GPU: what is on it does not mix with what is on the CPU.

    python tests/support/second_device.py DATA FOLDER '{"one recipe": {...experiment...}, ...}'

trains each recipe once on the CPU and once on this device, and prints a JSON object: for each recipe the names of the
weights that differ. On a GPU a tensor that was left on the CPU ends a run; here as well, and nowhere else: that is all
that this device is for. It computes on the CPU, with the same kernels, so the weights have to be identical.

Registered as PyTorch's private-use backend (https://docs.pytorch.org/tutorials/advanced/privateuseone.html), in a
process of its own, because that cannot be undone.
"""

# ruff: noqa: SLF001 - PyTorch has no public names for tensors of a backend that is written in Python

import io
import json
import sys
from pathlib import Path

import click
import torch
from rich.console import Console
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
CPU = torch.device("cpu")
NAME = "second"
# What moves values from one device to the other, and what makes tensors without having seen one.
COPIES = {aten._to_copy, aten.copy_}
WITHOUT_PYTHON_KEY = ("_to_copy", "copy_", "empty.memory_format", "empty_strided")


class OnDevice(torch.Tensor):
    """A tensor of the second device; `held` has its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})

    # With these two, `Module.to` swaps whole tensors, `held` included.
    def __tensor_flatten__(self):
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return OnDevice(inner["held"])

    def __reduce_ex__(self, protocol):
        """In files as `map_location="cpu"` would read a GPU's tensor."""
        return self.held.__reduce_ex__(protocol)


def compute(operation, args, kwargs):
    """Runs an operation on what the tensors hold; refuses tensors of both devices, as a GPU does (but for scalars)."""
    flat, form = pytree.tree_flatten((args, kwargs))
    here = [value for value in flat if isinstance(value, OnDevice)]
    there = [value for value in flat if isinstance(value, torch.Tensor) and not isinstance(value, OnDevice)]
    packet = operation.overloadpacket
    if here and packet not in COPIES and any(tensor.dim() for tensor in there):
        raise RuntimeError(f"{operation} got tensors of the CPU and of the second device")
    wanted = [value for value in flat if isinstance(value, torch.device)]
    to_device = wanted[0].type == NAME if wanted else bool(here)
    if packet is aten.copy_:
        to_device = isinstance(args[0], OnDevice)
    args, kwargs = pytree.tree_unflatten([_inside(value) for value in flat], form)
    owners = {id(tensor.held): tensor for tensor in here}

    def outside(value):
        if not isinstance(value, torch.Tensor) or not to_device:
            return value
        changed_in_place = owners.get(id(value))
        return OnDevice(value) if changed_in_place is None else changed_in_place

    return pytree.tree_map(outside, operation(*args, **kwargs))


def _inside(value):
    if isinstance(value, OnDevice):
        return value.held
    return CPU if isinstance(value, torch.device) and value.type == NAME else value


def register():
    """Makes the device known to PyTorch; gives what has to stay alive."""
    _setup_privateuseone_for_python_backend(NAME)
    fallback, kernels = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    fallback.fallback(lambda operation, *args, **kwargs: compute(operation, args, kwargs), "PrivateUse1")
    for name in WITHOUT_PYTHON_KEY:
        packet, _, overload = name.partition(".")
        operation = getattr(getattr(aten, packet), overload or "default")
        kernels.impl(name, lambda *args, _op=operation, **kwargs: compute(_op, args, kwargs), "PrivateUse1")
    return fallback, kernels


class NoInference(torch.no_grad):
    """In place of `torch.inference_mode`, whose tensors cannot be wrapped."""

    def __new__(cls, mode=True):
        return torch.no_grad() if mode else torch.enable_grad()


def weights(experiment, device, source, folder):
    """The last weights of a run on a device, by name."""
    from training import assemble, checkpoint, run
    from training.display import Display
    from training.folders import LAST

    assemble.device = run.device = lambda: device
    console = Console(file=io.StringIO(), width=120)
    result = run.run(experiment, source, folder / "models", folder / "runs", Display(console))
    return checkpoint.load(result.folder / LAST)["stepper"]["model"]


def main(source, folder, recipes):
    keep = register()
    torch.inference_mode = NoInference
    from training.config import Experiment

    differing = {}
    for name, tree in json.loads(recipes).items():
        experiment = Experiment.model_validate(tree)
        pairs = [
            weights(experiment, device, Path(source), Path(folder) / device.type)
            for device in (CPU, torch.device(NAME))
        ]
        differing[name] = [key for key, tensor in pairs[0].items() if not torch.equal(tensor, pairs[1][key])]
    click.echo(json.dumps(differing))
    del keep


if __name__ == "__main__":
    main(*sys.argv[1:])
