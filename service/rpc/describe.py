"""Descriptions of models as messages, for both services of the API."""

from __future__ import annotations

from convoy.v1 import image_classifier_pb2 as pb

from service.errors import ImageFault, InvalidImageError
from service.repository import Repository
from service.serving import ServedModel

# Texts of so many faults and their details fit into the trailers, of which clients accept 8 KB.
NAMED_FAULTS = 8

_REASONS = {fault: pb.ImageError.Reason.Value(fault.name) for fault in ImageFault}


def fault(error: InvalidImageError) -> pb.ImageError:
    """Why an image cannot be used."""
    return pb.ImageError(reason=_REASONS[error.reason], message=str(error))


def summary(repository: Repository, model: ServedModel) -> pb.ModelSummary:
    """A served version in a few words."""
    manifest = model.version.manifest
    return pb.ModelSummary(
        name=manifest.name,
        version=manifest.version,
        state=pb.READY,
        architecture=manifest.architecture,
        num_classes=len(manifest.classes),
        provider=model.engine.provider,
        is_default=repository.default(manifest.name) is model,
    )


def details(repository: Repository, model: ServedModel) -> pb.GetModelResponse:
    """A served version in full."""
    manifest = model.version.manifest
    spec = manifest.input
    running = model.engine.variant
    return pb.GetModelResponse(
        summary=summary(repository, model),
        labels=manifest.classes,
        input=pb.InputSpec(height=spec.height, width=spec.width, channels=spec.channels, resize=spec.describe()),
        metrics=manifest.metrics,
        variants=[
            pb.Variant(
                name=variant.name,
                accuracy=variant.accuracy,
                images_per_second=variant.images_per_second,
                active=variant.file == running,
                precision=model.engine.precision if variant.file == running else "",
            )
            for variant in manifest.variants
        ],
        sha256=manifest.files[running].sha256,
        temperature=manifest.temperature,
        max_batch_size=model.engine.buckets[-1],
    )
