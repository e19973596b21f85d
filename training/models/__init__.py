"""The architectures that Convoy trains, under one roof: `create` builds them, `describe` tells about them."""

from training.models.architecture import Architecture, Classifier, Config, Option, Outputs, PublishedWeights
from training.models.registry import create, describe, names

__all__ = [
    "Architecture",
    "Classifier",
    "Config",
    "Option",
    "Outputs",
    "PublishedWeights",
    "create",
    "describe",
    "names",
]
