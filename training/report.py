"""The model card: one HTML file that tells what a version is, how it was made and where it errs.

It needs nothing from elsewhere: styles and pictures are inside, so it can be mailed and opened from a disk. What to
report follows Mitchell et al., "Model Cards for Model Reporting", FAT* 2019 (arXiv:1810.03993).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from markupsafe import Markup
from numpy.typing import NDArray
from torch import nn

from service.artifact import MODEL, Manifest
from service.runners import Outputs
from training import calibrate, charts, metrics, pictures
from training.trained import Trained
from training.wording import figure, flattened, percent, reservations, short, size, wilson_interval

_TEMPLATE = "card.html.j2"
# Up to here each cell of the confusion matrix and each class gets a line of its own at once.
_FEW_CLASSES = 30
_WEAKEST = 15
_MISTAKES = 24
_PAIRS = 12
_CHARTS = {"Loss": "loss", "Accuracy": "accuracy", "Learning rate": "learning_rate"}


@dataclass(frozen=True)
class Picture:
    """One held-out image as the card shows it; `confidence` is in the class that was predicted."""

    source: str
    file: str
    true: str
    predicted: str
    confidence: float


@dataclass(frozen=True)
class Pair:
    """Two classes that are taken for each other; `share` is of the true class's images."""

    true: str
    predicted: str
    count: int
    share: float


def render_card(manifest: Manifest, trained: Trained | None = None, outputs: Outputs | None = None,
                model: nn.Module | None = None) -> str:  # fmt: skip
    """The card of a version as HTML.

    Args:
        manifest: of the version; its list of files lacks the card itself.
        trained: how it was made, and on which images it was judged; None for an imported model.
        outputs: what the float model in ONNX Runtime says to the held-out images, in their order.
        model: the network on the CPU in evaluation mode, for its filters and feature maps.
    """
    facts: dict[str, Any] = {
        "manifest": manifest,
        "model_file": manifest.files[MODEL],
        "recipe": list(flattened(manifest.recipe)),
        "data": [(key, value) for key, value in flattened(manifest.data) if not key.startswith("per_class")],
        "class_counts": _class_counts(manifest),
        "train_size": _train_size(manifest),
        "reservations": reservations(manifest.data["images"]) if "images" in manifest.data else "",
    }
    if trained is not None and outputs is not None:
        facts |= _judged(trained, outputs)
        facts["curves"] = _curves(trained.history)
    if trained is not None and model is not None:
        facts |= _insides(trained, model)
    return _environment().get_template(_TEMPLATE).render(facts)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("training"),
        autoescape=True,  # class and file names come from users' folders
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "size": size, "figure": figure, "short": short}
    return environment


def _judged(trained: Trained, outputs: Outputs) -> dict[str, Any]:
    """All that follows from the answers to the held-out images."""
    labels, classes = trained.holdout_labels, trained.classes
    predicted = outputs.logits.argmax(axis=1).astype(np.int64)
    scores = metrics.class_scores(predicted, labels, len(classes))
    uncalibrated = outputs.logits * trained.temperature
    before = calibrate.reliability(calibrate.softmax(uncalibrated), labels)
    after = calibrate.reliability(outputs.probabilities, labels)
    accuracy = metrics.accuracy(predicted, labels)
    few = len(classes) <= _FEW_CLASSES
    confusion = metrics.confusion_matrix(predicted, labels, len(classes), pictures.MOST_CELLS)
    return {
        "images": len(labels),
        "accuracy": accuracy,
        "interval": wilson_interval(accuracy, len(labels)),
        "top5": metrics.top_k_accuracy(outputs.logits, labels, 5) if len(classes) > 5 else None,  # noqa: PLR2004
        "scores": scores,
        "macro": scores.macro(),
        "worst_classes": _weakest(scores, None if few else _WEAKEST),
        "confusion": confusion.tolist() if few else None,
        "confusion_picture": None if few else pictures.confusion_picture(confusion),
        "classes_together": -(-len(classes) // len(confusion)),
        "pairs": _confused_pairs(predicted, labels, classes),
        "calibration": calibrate.calibration(uncalibrated, labels, trained.temperature),
        "reliability": [
            (f"Before (ECE {before.error:.3f})", charts.reliability_diagram(before, "before calibration")),
            (f"After, T = {trained.temperature:.3g} (ECE {after.error:.3f})",
             charts.reliability_diagram(after, "after calibration")),
        ],
        "mistakes": _pictures(trained, outputs, np.flatnonzero(predicted != labels), most_confident=True),
        "doubts": _pictures(trained, outputs, np.flatnonzero(predicted == labels), most_confident=False),
    }  # fmt: skip


def _weakest(scores: metrics.ClassScores, most: int | None) -> list[int]:
    """Classes by their F1, the lowest first; of some only those that have an image to be judged by."""
    ordered: list[int] = np.argsort(scores.f1, kind="stable").tolist()
    return ordered if most is None else [k for k in ordered if scores.support[k]][:most]


def _insides(trained: Trained, model: nn.Module) -> dict[str, Any]:
    pixels = trained.holdout[0]
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (trained.mean, trained.std))
    x = (torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255 - mean) / std  # [1, C, H, W]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "filters": pictures.first_filters(model),
        "feature_image": pictures.thumbnail(pixels),
        "feature_class": trained.classes[int(trained.holdout_labels[0])],
        "feature_maps": pictures.feature_maps(model, x),
    }


def _pictures(
    trained: Trained, outputs: Outputs, candidates: NDArray[np.int64], *, most_confident: bool
) -> list[Picture]:
    """Of the candidate images, those with the highest or the lowest confidence."""
    confidence = outputs.probabilities.max(axis=1)
    order = np.argsort(confidence[candidates], kind="stable")
    chosen = candidates[order[::-1] if most_confident else order][:_MISTAKES]
    predicted = outputs.logits.argmax(axis=1)
    return [
        Picture(
            source=pictures.thumbnail(trained.holdout[i]),
            file=_place(trained.holdout_paths[i]),
            true=trained.classes[int(trained.holdout_labels[i])],
            predicted=trained.classes[int(predicted[i])],
            confidence=float(confidence[i]),
        )
        for i in chosen
    ]


def _confused_pairs(predicted: NDArray[np.int64], labels: NDArray[np.int64], classes: Sequence[str]) -> list[Pair]:
    return [
        Pair(classes[true], classes[other], count, count / int((labels == true).sum()))
        for true, other, count in metrics.confused_pairs(predicted, labels, _PAIRS)
    ]


def _curves(history: Sequence[Mapping[str, float]]) -> list[tuple[str, list[str], Markup]]:
    """Title, names of the series and chart; series are grouped by the end of their name."""
    found = []
    for title, ending in _CHARTS.items():
        keys = sorted({key for entry in history for key in entry if key.endswith(ending)})
        if keys:
            series = {key: [float(entry.get(key, math.nan)) for entry in history] for key in keys}
            found.append((title, [key.replace("_", " ") for key in keys], charts.curves(series)))
    return found


def _class_counts(manifest: Manifest) -> dict[str, Any]:
    """Images per class: a list with bars for few classes, for many one number if it is that of all, else one chart."""
    counts = manifest.data.get("per_class")
    if not isinstance(counts, Mapping) or not counts:
        return {}
    rows = [(name, int(counts.get(name, 0))) for name in manifest.classes]
    most = max(1, *(count for _, count in rows))
    few = len(rows) <= _FEW_CLASSES
    even = not few and len({count for _, count in rows}) == 1
    return {
        "each": most if even else None,
        "rows": [(name, count, count / most) for name, count in rows] if few else None,
        "chart": None if few else charts.sorted_counts([count for _, count in rows]),
    }


def _train_size(manifest: Manifest) -> int | None:
    """Height and width of the training batches, if they are not those of the input."""
    asked = manifest.recipe.get("input")
    return asked.get("train_size") if isinstance(asked, Mapping) else None


def _place(path: Path) -> str:
    """Folder and file: enough to find it, without telling where on which machine it was."""
    return "/".join(path.parts[-2:])
