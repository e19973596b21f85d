"""Settings that change nothing in a run: whoever sets one expects something of it, and is told."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from training.config import Experiment
from training.prepared import Prepared


def idle(experiment: Experiment, model: nn.Module, data: Prepared) -> list[str]:
    """A sentence for each setting that was chosen, is not its default, and has no effect.

    Args:
        experiment: every choice.
        model: as it was built.
        data: as they were read.
    """
    whys: dict[str, str] = {}
    for rests, why, *keys in _rules(experiment, model, data):
        for key in keys if rests else ():
            whys.setdefault(key, why)
    return [f"{key} changes nothing here: {why}." for key, why in whys.items() if _is_chosen(experiment, key)]


def _rules(experiment: Experiment, model: nn.Module, data: Prepared) -> Iterator[tuple[bool, str, *tuple[str, ...]]]:
    """Whether it is so, why settings rest then, and which. The first reason of a setting is told."""
    augment, transfer, variants = experiment.augment, experiment.transfer, experiment.export.variants
    moves = augment.rotation_degrees or augment.translation or augment.scale or augment.crop_padding
    normalises = any(isinstance(module, _BatchNorm) for module in model.modules())
    learns_by = ("transfer.strategy", "transfer.probe", "transfer.spread", "transfer.freeze_norm", "transfer.licence")
    yield transfer.weights is None, "there are no weights to start from (transfer.weights)", *learns_by
    yield transfer.strategy != "lp-ft", "only the strategy lp-ft has such a phase", "transfer.probe"
    yield transfer.strategy == "linear-probe", "the head alone learns", "transfer.spread"
    yield not normalises, f"{experiment.model.name} has no BatchNorm", "transfer.freeze_norm"
    yield data.spec.channels == 1, "the images are gray", "augment.saturation"
    yield not moves, "nothing moves or turns the images, so that nothing beside them shows", "augment.fill"
    yield experiment.schedule.name == "constant", "the learning rate does not fall", "schedule.final"
    yield not variants, "there are no variants", "export.accuracy_budget_points"
    no_int8 = not {"int8", "trt-int8"} & set(variants)
    yield no_int8, "there is no int8 variant to calibrate", "export.calibration_images"
    yield data.shards is None, "the images are no tar shards", "data.shuffle_buffer"
    yield data.shards is not None, "tar shards are read anew in each epoch", "data.cache"


def _is_chosen(experiment: Experiment, key: str) -> bool:
    name, _, field = key.partition(".")
    section = getattr(experiment, name)
    return field in section.model_fields_set and getattr(section, field) != type(section).model_fields[field].default
