"""Files laid out as torchvision publishes them, one for each family and age: names, containers, hashes.

`test_architectures` holds names and shapes against torchvision's; here the models are narrow, so that files are small.
"""

import hashlib
from collections import OrderedDict

import pytest
import torch
from torch import nn

from training.config import TransferConfig
from training.models import create, describe, load_weights
from training.transfer import start_from

NARROW = {"width": 0.125}

# Architecture, counters of batches in the file or not, PyTorch's old container or zip, parameters or plain tensors.
# The oldest files come from before 0.4.1; Inception's was converted from TensorFlow.
LAYOUTS = {
    "alexnet": ("alexnet", False, True, True),
    "vgg16_bn": ("vgg16_bn", False, True, True),
    "resnet18": ("resnet18", False, False, False),
    "resnet50 of the first recipe": ("resnet50", False, True, True),
    "resnet50 of the second recipe": ("resnet50", True, False, False),
    "resnext50_32x4d": ("resnext50_32x4d", True, True, False),
    "googlenet": ("googlenet", True, True, False),
    "inception_v3": ("inception_v3", False, True, True),
}


def build(name, classes=1000, **options):
    """A model of zeros."""
    with torch.device("meta"):
        model = create(name, classes, **NARROW, **options)
    model = model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.zero_()
    return model


def content(name, *, counters, parameters):
    """A state dict in which every tensor has a value of its own, auxiliary heads included."""
    model = build(name, **({"aux": True} if describe(name).aux_heads else {}))
    state = OrderedDict()
    for number, (key, tensor) in enumerate(model.state_dict(keep_vars=True).items(), 1):
        if tensor.is_floating_point():
            value = torch.full(tensor.shape, number / 64)
            state[key] = nn.Parameter(value) if parameters and isinstance(tensor, nn.Parameter) else value
        elif counters:
            state[key] = torch.tensor(number)
    return state


@pytest.fixture(scope="module", params=LAYOUTS.values(), ids=LAYOUTS)
def published(request, tmp_path_factory):
    """Architecture, file and content."""
    name, counters, legacy, parameters = request.param
    state = content(name, counters=counters, parameters=parameters)
    path, digest = tmp_path_factory.mktemp("published") / "weights.pth", "0"
    while digest.isdecimal():  # digits alone would be taken for a date, except in torchvision's own names
        torch.save(state, path, _use_new_zipfile_serialization=not legacy)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
        next(iter(state.values())).data += 1
    written = torch.load(path, weights_only=True)
    return name, path.rename(path.with_name(f"{name}-{digest}.pth")), written


def unlike(model, state):
    """Entries of the model that do not have the file's values."""
    return {
        key for key, tensor in model.state_dict().items() if key not in state or not torch.equal(tensor, state[key])
    }


def counters_of(model):
    return {key for key in model.state_dict() if key.endswith(".num_batches_tracked")}


def test_it_loads_whole_into_the_same_architecture(published):
    name, path, state = published
    aux = bool(describe(name).aux_heads)
    model = build(name, aux=True) if aux else build(name)

    report = load_weights(model, path)

    absent = counters_of(model) - state.keys()
    assert report.verified
    assert set(report.loaded) == state.keys()
    assert (set(report.replaced), report.skipped) == (absent, ())
    assert unlike(model, state) <= absent


def test_it_starts_a_model_for_other_classes_without_auxiliary_heads(published):
    name, path, state = published
    entry, model = describe(name), build(name, 7)

    report = start_from(model, entry, TransferConfig(weights=path))

    head = {f"{entry.head}.weight", f"{entry.head}.bias"}
    modules = {prefix.partition(".")[0] for prefix in entry.aux_heads}
    auxiliary = {key for key in state if key.partition(".")[0] in modules}
    assert set(report.skipped) == head | auxiliary
    assert bool(auxiliary) == (name in {"googlenet", "inception_v3"})
    assert unlike(model, state) <= head | (counters_of(model) - state.keys())
    assert not any(model.state_dict()[key].any() for key in head)
