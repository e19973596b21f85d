"""From a trained model to a version that the service can load: export, gates, canary, card, publication.

Nothing appears in the repository unless every gate has passed; then all of it appears at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx

from service.artifact import MODEL, Canary, Variant
from service.providers import CPU
from training import gates, package, report, speed
from training import variants as formats
from training.gates import Parity
from training.graph import Servable, check_size, to_onnx
from training.runtime import Session
from training.trained import Trained
from training.variants import Baseline, Outcome

__all__ = ["Trained", "export_version"]


def export_version(
    trained: Trained,
    repository: Path,
    *,
    variants: Sequence[str] = formats.DEFAULT,
    budget_points: float = 0.5,
    batches: Sequence[int] = gates.BATCHES,
    tell: Callable[[str], None] = lambda _: None,
) -> Path:
    """Exports a model, certifies it against PyTorch and publishes it as the next version.

    Args:
        trained: the model and what belongs to it.
        repository: the version appears in `<repository>/<name>/<number>/`.
        variants: smaller formats to try, of `training.variants.NAMES`; each is kept only if it is good and faster.
        budget_points: top-1 points that a variant may lose on the held-out images.
        batches: batch sizes at which ONNX Runtime has to agree with PyTorch.
        tell: told what is done next, in words for people.

    Returns:
        The version's directory.

    Raises:
        TrainingError: the model cannot be exported, or the export does not do what the model does.
        DataError: an image of the canary cannot be used.
        ConfigurationError: the repository cannot be written, or a variant is unknown.
        ArtifactError: the version cannot be published.
    """
    trained.check()
    names = formats.check_names(variants, budget_points)
    tell("Exporting to ONNX")
    servable = Servable(trained.model, trained.mean, trained.std, trained.temperature)
    pixels = gates.sample(trained.holdout, max(batches))
    wanted = gates.reference(servable, trained.mean, trained.std, pixels, len(trained.classes))
    model = to_onnx(servable, trained.input)
    serialised = serialise(model, trained)
    tell("Comparing ONNX Runtime with PyTorch")
    session = Session(serialised)
    parity = gates.check_parity(session, wanted, pixels, batches)

    outputs = session.run_all(trained.holdout)
    with package.staged(repository, trained.name) as staging:
        images = package.read_images(trained.canary)
        canary, canary_pixels = package.write_canary(staging, images, session, trained.input)
        baseline = Baseline(
            model=model,
            session=session,
            outputs=outputs,
            holdout=trained.holdout,
            labels=trained.holdout_labels,
            canary=canary_pixels,
            calibration=trained.calibration,
            batches=batches,
        )
        outcome = formats.build(names, baseline, budget_points, tell=tell)
        tell("Measuring the speed of the float model")
        outcome.kept.insert(0, (_float_variant(baseline, parity), serialised))
        for variant, content in outcome.kept:
            (staging / variant.file).write_bytes(content)
        tell("Writing the model card and publishing")
        return package.publish(
            staging,
            repository,
            session,
            _manifest_fields(trained, canary, outcome),
            lambda manifest: report.render_card(manifest, trained, outputs, servable.model),
        )


def serialise(model: onnx.ModelProto, trained: Trained) -> bytes:
    """The graph with what it is written into its metadata, checked, as bytes of one file.

    Raises:
        TrainingError: it does not fit one file.
    """
    facts = {
        "name": trained.name,
        "architecture": trained.architecture,
        "classes": json.dumps(trained.classes, ensure_ascii=False),
        "input": trained.input.model_dump_json(),
        "mean": json.dumps(trained.mean),
        "std": json.dumps(trained.std),
        "temperature": repr(trained.temperature),
        "weights": trained.weights.model_dump_json(),
    }
    onnx.helper.set_model_props(model, {f"convoy.{key}": value for key, value in facts.items()})
    check_size(model.ByteSize())
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)


def _manifest_fields(trained: Trained, canary: Canary, outcome: Outcome) -> dict[str, Any]:
    return {
        "name": trained.name,
        "architecture": trained.architecture,
        "classes": trained.classes,
        "input": trained.input,
        "temperature": trained.temperature,
        "variants": tuple(variant for variant, _ in outcome.kept),
        "rejected_variants": tuple(outcome.rejected),
        "canary": canary,
        "metrics": trained.metrics,
        "data": trained.data,
        "recipe": trained.recipe,
        "weights": trained.weights,
    }


def _float_variant(baseline: Baseline, parity: Parity) -> Variant:
    return Variant(
        name="fp32",
        file=MODEL,
        accuracy=baseline.accuracy,
        images_per_second=speed.images_per_second(baseline.session, baseline.holdout),
        note=f"{speed.CONDITIONS} on {CPU}; {parity.describe(gates.PYTORCH)}",
    )
