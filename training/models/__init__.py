"""The architectures that Convoy trains, under one roof.

`create` builds a model, `describe` tells about an architecture, `load_weights` reads checkpoints, torchvision's among
them.
"""

from training.models.architecture import (
    Architecture,
    Classifier,
    Config,
    Option,
    PublishedWeights,
    TrainingOutputs,
    within,
)
from training.models.registry import WEIGHTS_URL, create, describe, names, published
from training.models.weights import (
    LoadReport,
    WeightsMismatchError,
    adapt_input_channels,
    load_weights,
)
from training.models.weights_file import WeightsFile, read_weights

__all__ = [
    "WEIGHTS_URL",
    "Architecture",
    "Classifier",
    "Config",
    "LoadReport",
    "Option",
    "PublishedWeights",
    "TrainingOutputs",
    "WeightsFile",
    "WeightsMismatchError",
    "adapt_input_channels",
    "create",
    "describe",
    "load_weights",
    "names",
    "published",
    "read_weights",
    "within",
]
