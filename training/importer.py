"""`convoy import`: any ONNX image classifier as a model version, without training anything.

Nothing is believed: the original graph is run on real pixels that are normalised outside of any graph, and the
version has to give the same answers, in batches of any size, before it appears in the repository.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from PIL import Image

from service import artifact
from service.artifact import MODEL, InputSpec, Variant
from service.errors import ArtifactError, ConfigurationError
from service.providers import CPU
from service.runners import Outputs
from training import adapt, calibrate, conventions, foreign, gates, package, report, speed
from training.conventions import Normalisation, Request, Scores
from training.foreign import ImageInput
from training.graph import check_size
from training.labels import read_labels
from training.runtime import ForeignSession, Session

_ORIGINAL = gates.Original(
    "the original model",
    "the graph has its batch size built in, or was exported in training mode; call eval() before, and export it again "
    "with a dynamic batch",
)
_GENERATED_CANARIES = 4
_SUM_TOLERANCE = 1e-2


def import_version(request: Request, repository: Path) -> Path:
    """Turns a foreign ONNX classifier into the next version of a model.

    Args:
        request: see there.
        repository: the version appears in `<repository>/<name>/<number>/`.

    Returns:
        The version's directory.

    Raises:
        ArtifactError: the model cannot be used, or not with these labels.
        ConfigurationError: a choice has to be made by the user, or contradicts the graph.
        DataError: labels or canary images cannot be read.
        TrainingError: the version does not answer as the original does.
    """
    package.check_name(request.name)
    classes = read_labels(request.labels)
    original = foreign.read(request.model)
    image = foreign.image_input(original, request.layout, request.size, _told_channels(request))
    output = foreign.output_name(original, request.output)
    rule = conventions.normalisation(request, image.channels)
    spec = conventions.input_spec(request, image.height, image.width, image.channels)
    batches = gates.batches_of(spec.height, spec.width)
    pixels = drawn_images(spec.height, spec.width, spec.channels, max(batches))
    answers = _original_answers(original, image, output, rule, pixels)
    if answers.shape[1] != len(classes):
        raise ArtifactError(_miscounted(request.labels, len(classes), answers.shape[1]))
    scores = request.scores or guess_scores(answers)
    if scores == "probabilities" and not _within_bounds(answers):
        raise ConfigurationError("some scores lie below 0 or above 1: they are no probabilities; say --scores logits")
    adapt.free_batch(original, image)
    serialised = adapt.wrap(original, image, output, rule, scores, len(classes)).SerializeToString(deterministic=True)
    check_size(len(serialised))
    session = Session(serialised)
    parity = gates.check_parity(session, _outputs(answers, scores), pixels, batches, _ORIGINAL)
    variant = Variant(
        name="fp32",
        file=MODEL,
        images_per_second=speed.images_per_second(session, pixels),
        note=f"{speed.CONDITIONS} on {CPU}; {parity.describe(_ORIGINAL)}",
    )
    with package.staged(repository, request.name) as staging:
        (staging / MODEL).write_bytes(serialised)
        images = package.read_images(request.canary) or _drawn_canaries(spec)
        canary, _ = package.write_canary(staging, images, session, spec)
        fields = {
            "name": request.name,
            "architecture": f"imported {request.model.stem}",
            "classes": classes,
            "input": spec,
            "variants": (variant,),
            "canary": canary,
            "recipe": _recipe(request, rule, output, scores),
            "weights": request.weights,
        }
        return package.publish(staging, repository, session, fields, report.render_card)


def _within_bounds(answers: NDArray[np.float32]) -> bool:
    return not (answers.min() < -_SUM_TOLERANCE or answers.max() > 1 + _SUM_TOLERANCE)


def guess_scores(answers: NDArray[np.float32]) -> Scores:
    """Whether scores [N, K] are probabilities: between 0 and 1, and of sum 1.

    Raises:
        ConfigurationError: they are neither that nor plainly logits.
    """
    if not _within_bounds(answers):
        return "logits"
    if np.abs(answers.sum(axis=1) - 1).max() <= _SUM_TOLERANCE:
        return "probabilities"
    raise ConfigurationError(
        "the scores lie between 0 and 1 but do not add up to 1, as those of independent yes-or-no outputs; "
        "if they are logits of one choice among the classes, say --scores logits"
    )


def drawn_images(height: int, width: int, channels: int, count: int) -> NDArray[np.uint8]:
    """Soft coloured clouds with some noise, uint8[count, H, W, C]: nothing real, but no two answers are alike."""
    rng = np.random.default_rng(0)
    clouds = []
    for index in range(count):
        coarse = rng.integers(0, 256, (2 + index % 7, 2 + index % 5, 3), dtype=np.uint8)
        cloud = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.int16)
        noise = rng.integers(-20, 21, cloud.shape, dtype=np.int16)
        clouds.append(np.clip(cloud + noise, 0, 255).astype(np.uint8)[:, :, :channels])
    return np.stack(clouds)


def _original_answers(
    model: onnx.ModelProto, image: ImageInput, output: str, rule: Normalisation, pixels: NDArray[np.uint8]
) -> NDArray[np.float32]:
    """Scores float32[N, K] of the graph as it came, in its own batch size."""
    session = ForeignSession(model.SerializeToString(), output)
    step = image.batch or 8
    parts = []
    for start in range(0, len(pixels), step):
        chunk = pixels[start : start + step]
        # One by one: the rule computes in float64, and all images at once would take gigabytes.
        x = np.concatenate([rule.apply(one[None], image.layout, image.dtype) for one in chunk])
        padded = np.concatenate([x, np.repeat(x[-1:], step - len(x), axis=0)])
        parts.append(session.run(padded)[: len(x)])
    answers = np.concatenate(parts)
    flat = answers.reshape(len(answers), -1)
    if len(flat) != len(pixels) or answers.ndim < 2 or flat.shape[1] != answers.shape[1]:  # noqa: PLR2004  [N, K]
        shape = list(parts[0].shape)
        raise ArtifactError(f"output {output} has shape {shape} for {step} images; a classifier gives [N, classes]")
    broken = int((~np.isfinite(flat)).any(axis=1).sum())
    if broken:
        raise ArtifactError(
            f"the model's answers are not finite (NaN or infinite) on {broken} of {len(flat)} images; "
            "are its weights whole, and do --preset, --mean and --std fit it?"
        )
    return flat


def _told_channels(request: Request) -> int | None:
    """How many channels --mean and --std speak of, if they do."""
    longest = max(len(request.mean or ()), len(request.std or ()))
    return longest if longest in {1, 3} else None


def _outputs(answers: NDArray[np.float32], scores: Scores) -> Outputs:
    logits = answers if scores == "logits" else np.log(np.maximum(answers, adapt.SMALLEST_PROBABILITY))
    return Outputs(logits, calibrate.softmax(logits).astype(np.float32))


def _drawn_canaries(spec: InputSpec) -> list[tuple[str, bytes]]:
    """PNG files a little larger than the input, so that they test the resize too."""
    side = round(1.3 * (spec.resize.shorter_side or max(spec.height, spec.width)))
    encoded = []
    for index, pixels in enumerate(drawn_images(side, side + side // 4, 3, _GENERATED_CANARIES)):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        encoded.append((f"drawn-{index}.png", buffer.getvalue()))
    return encoded


def _recipe(request: Request, rule: Normalisation, output: str, scores: Scores) -> dict[str, Any]:
    return {
        "imported_from": request.model.name,
        "sha256": artifact.file_entry(request.model).sha256,
        "preset": request.preset,
        "mean": list(rule.mean),
        "std": list(rule.std),
        "channel_order": rule.order,
        "output": output,
        "scores": scores,
    }


def _miscounted(labels: Path, lines: int, scores: int) -> str:
    hint = ""
    if scores == lines + 1:
        hint = "; models from TensorFlow often begin with a background class: add a line for it"
    return f"{labels} names {lines} classes, but the graph gives {scores} scores{hint}"
