"""Every form of network, from PyTorch through export and gates into the service's engine, at the smallest input.

Depth is cut where a network only repeats its blocks: `make architectures` takes all of them as they are.
"""

import dataclasses
import re

import numpy as np
import pytest
import torch
from torch import nn

from service import artifact, canary, engine, providers
from service.artifact import InputSpec, Resize, Variant
from service.preprocess import preprocess
from training import gates, package
from training.graph import Servable, to_onnx
from training.models import describe, names
from training.runtime import Session

CLASSES = 10
LEAST = 16  # pixels; some residual networks would take a single one, in which there is nothing to see
LARGEST_BATCH = 8

ONE_EACH = {"blocks": (1, 1, 1, 1), "convolutions": (1, 1, 1, 1, 1)}
FORMS = {name: (name, {}) for name in names() if not re.search("13|16|19|34|50$|101|152", name)} | {
    "classic lenet5": ("lenet5", {"classic": True}),
    "vgg11 for small images": ("vgg11", {"small_images": True}),
}


def build(name, options):
    """A narrow network of the form, and its description."""
    entry = describe(name)
    cut = {key: value for key, value in ONE_EACH.items() if hasattr(entry.config, key)}
    return entry, entry.build(dataclasses.replace(entry.config, num_classes=CLASSES, width=0.25, **cut, **options))


class Lively(nn.Module):
    """The network with logits of mean 0 and deviation 1, class by class, over images float32[N, C, H, W] in 0..1.

    With random weights alone the answers of deep networks are the same whatever the image, or beyond all numbers, and
    nothing could be told from their agreement.
    """

    def __init__(self, model, entry, images):
        super().__init__()
        self.model = model
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # the statistics become those of the images
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (entry.mean, entry.std))
        with torch.no_grad():
            model.train()((images - mean) / std)
            logits = model.eval()((images - mean) / std)  # [N, K]
        self.register_buffer("mean", logits.mean(0))
        self.register_buffer("deviation", logits.std(0))

    def forward(self, x):
        return (self.model(x) - self.mean) / self.deviation


def publish(entry, servable, pixels, spec, files, repository):
    """What `convoy train` does between training and the model card."""
    model = to_onnx(servable, spec)
    assert not {"Gather", "GatherND", "Where", "Loop", "If", "Dropout"} & {node.op_type for node in model.graph.node}
    content = model.SerializeToString()
    session = Session(content)
    wanted = gates.reference(servable, entry.mean, entry.std, pixels, CLASSES)
    gates.check_parity(session, wanted, pixels)
    with package.staged(repository, entry.name) as staging:
        images, _ = package.write_canary(staging, [(file.name, file.read_bytes()) for file in files], session, spec)
        (staging / artifact.MODEL).write_bytes(content)
        fields = {
            "name": entry.name,
            "architecture": entry.name,
            "classes": tuple(map(str, range(CLASSES))),
            "input": spec,
            "variants": (Variant(name="fp32", file=artifact.MODEL, accuracy=0.1),),
            "canary": images,
            "metrics": {"accuracy": 0.1},
        }
        return package.publish(staging, repository, session, fields, lambda _: "<html></html>"), wanted


@pytest.mark.parametrize(("name", "options"), FORMS.values(), ids=FORMS)
def test_the_services_engine_answers_as_pytorch(name, options, digit_files, tmp_path):
    torch.manual_seed(0)
    entry, model = build(name, options)
    side = max(model.config.min_size, LEAST)
    spec = InputSpec(height=side, width=side, channels=entry.channels, resize=Resize(mode="stretch"))
    pixels = np.stack([preprocess(file.read_bytes(), spec) for file in digit_files])
    lively = Lively(model, entry, torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255)
    servable = Servable(lively, entry.mean, entry.std, 1.0)
    version, wanted = publish(entry, servable, gates.sample(pixels, 64), spec, digit_files[:4], tmp_path)

    loaded = artifact.load(version)
    (runner,) = engine.build(loaded, providers.cpu_plan(1), LARGEST_BATCH)
    runner.warm_up()

    assert canary.check(loaded, runner) < gates.MAX_PROBABILITY_DIFFERENCE
    for batch in np.split(pixels, (1, 3, 8)):
        found = runner.infer([batch]).probabilities
        expected = gates.reference(servable, entry.mean, entry.std, batch, CLASSES).probabilities
        assert np.abs(found - expected).max() < gates.MAX_PROBABILITY_DIFFERENCE
        assert (found.argmax(1) == expected.argmax(1)).all()
    assert np.ptp(wanted.probabilities, axis=0).max() > 0.1
    runner.close()
