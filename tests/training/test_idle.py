"""What is told of settings that change nothing."""

from types import SimpleNamespace

import pytest

from service.artifact import InputSpec, Resize
from training.config import Experiment, find_experiment, load_experiment
from training.idle import idle
from training.models import create

WEIGHTS = {"transfer.weights": "some.pth"}


def told(overrides, channels=3, shards=None, base=None):
    """Keys of the settings that are told of, and the sentences."""
    experiment = load_experiment(base, overrides)
    spec = InputSpec(height=32, width=32, channels=channels, resize=Resize(mode="stretch"))
    model = create(experiment.model.name, 10, channels, **experiment.model.options)
    sentences = idle(experiment, model, SimpleNamespace(spec=spec, shards=shards))
    return {sentence.split()[0]: sentence for sentence in sentences}


@pytest.mark.parametrize(
    ("chosen", "around", "why"),
    [
        ({"transfer.strategy": "gradual"}, {}, "no weights"),
        ({"transfer.licence": "MIT"}, {}, "no weights"),
        ({"transfer.probe": 0.5}, {**WEIGHTS, "transfer.strategy": "gradual"}, "lp-ft"),
        ({"transfer.spread": 10}, {**WEIGHTS, "transfer.strategy": "linear-probe"}, "the head alone"),
        ({"transfer.freeze_norm": True}, {**WEIGHTS, "model.name": "convnet"}, "convnet has no BatchNorm"),
        (
            {"augment.fill": "zeros"},
            {"augment.rotation_degrees": 0, "augment.translation": 0, "augment.scale": 0},
            "nothing moves",
        ),
        ({"schedule.final": 0.1}, {"schedule.name": "constant"}, "does not fall"),
        ({"export.accuracy_budget_points": 2}, {"export.variants": []}, "no variants"),
        ({"export.calibration_images": 64}, {"export.variants": ["fp16"]}, "no int8 variant"),
        ({"data.shuffle_buffer": 64}, {}, "no tar shards"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) and value else "",
)
def test_a_setting_without_effect_is_told_with_the_reason(chosen, around, why):
    (key,) = chosen
    found = told({**around, **chosen})

    assert why in found.pop(key)
    assert key not in told(around)  # that nobody chose
    assert not found.keys() & around.keys()


def test_what_the_images_decide():
    assert "gray" in told({"augment.saturation": 0.2}, channels=1)["augment.saturation"]
    assert not told({"augment.saturation": 0.2})
    assert "anew" in told({"data.cache": "disk"}, shards=object())["data.cache"]
    assert not told({"data.cache": "disk"})
    assert not told({"data.shuffle_buffer": 64}, shards=object())


def test_a_default_that_is_written_down_is_not_told():
    defaults = Experiment().model_dump(mode="json")
    experiment = Experiment.model_validate(defaults)
    assert "spread" in experiment.transfer.model_fields_set
    spec = InputSpec(height=32, width=32, channels=1, resize=Resize(mode="stretch"))

    assert idle(experiment, create("lenet5", 10, 1), SimpleNamespace(spec=spec, shards=None)) == []


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("digits-lenet", 1),
        ("mnist-lenet5", 1),
        ("mnist-convnet", 1),
        ("cifar10-resnet", 3),
        ("photos-transfer", 3),
    ],
)
def test_the_experiments_that_come_along_have_none(name, channels):
    assert told({}, channels, base=find_experiment(name)) == {}
