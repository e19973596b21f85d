"""The model card: one HTML file that tells what a version is, how it was made and where it errs.

It needs nothing from elsewhere: styles and pictures are inside, so it can be mailed and opened from a disk.
"""

from __future__ import annotations

import jinja2
import numpy as np

from service.artifact import Manifest
from training import metrics
from training.runtime import Outputs
from training.trained import Trained

_TEMPLATE = "card.html.j2"


def render_card(trained: Trained, manifest: Manifest, outputs: Outputs) -> str:
    """The card of a version as HTML.

    Args:
        trained: the model and its images.
        manifest: of the version; its list of files lacks the card itself.
        outputs: what the float model in ONNX Runtime says to the held-out images, in their order.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("training"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    labels = trained.holdout_labels
    predicted = outputs.logits.argmax(axis=1).astype(np.int64)
    scores = metrics.class_scores(metrics.confusion_matrix(predicted, labels, len(trained.classes)))
    return environment.get_template(_TEMPLATE).render(
        manifest=manifest, scores=scores, images=len(labels), macro=scores.macro()
    )
