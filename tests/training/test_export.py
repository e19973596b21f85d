import dataclasses
import json
import shutil
import threading

import numpy as np
import onnx
import pytest
from torch import nn

from service import artifact, publication
from service.artifact import InputSpec
from service.errors import ArtifactError, ConfigurationError, DataError, TrainingError
from service.preprocess import preprocess
from training import gates, package, variants
from training.export import export_version
from training.runtime import Session
from training.variants import Outcome


@pytest.fixture(scope="module")
def exported(digits_trained, tmp_path_factory):
    return export_version(digits_trained, tmp_path_factory.mktemp("repository"))


def files_under(path):
    return [p for p in path.rglob("*") if p.is_file()] if path.exists() else []


def test_the_service_can_load_what_was_exported(exported, digits_trained):
    version = artifact.load(exported)

    assert exported.name == "1"
    assert version.manifest.classes == digits_trained.classes
    assert version.manifest.temperature == 1.3
    assert version.manifest.recipe == {"epochs": 6, "optimiser": "adam"}
    assert set(version.manifest.files) >= {"model.onnx", "card.html", "canary/00.png"}
    assert {"torch", "onnx", "numpy", "python"} <= set(version.manifest.libraries)


def test_the_float_variant_has_its_measured_accuracy_and_speed(exported, digits_trained):
    variant = artifact.load(exported).manifest.variants[0]
    session = Session((exported / variant.file).read_bytes())
    predicted = session.run_all(digits_trained.holdout).logits.argmax(axis=1)

    assert variant.accuracy == np.mean(predicted == digits_trained.holdout_labels)
    assert variant.accuracy > 0.9
    assert variant.images_per_second > 100
    assert "of PyTorch on 64 images" in variant.note


def test_every_variant_is_listed_as_kept_or_rejected_with_its_reason(exported):
    manifest = artifact.load(exported).manifest
    kept = {variant.name for variant in manifest.variants}
    rejected = {variant.name: variant.reason for variant in manifest.rejected_variants}

    assert kept | set(rejected) == {"fp32", "int8", "fp16"}
    assert not kept & set(rejected)
    assert all("fp32" in reason or "points" in reason for reason in rejected.values())


def test_variants_that_are_kept_keep_the_contract(digits_trained, tmp_path):
    version = artifact.load(export_version(digits_trained, tmp_path, variants=["trt-int8"], budget_points=5))
    variant = version.manifest.variants[1]
    session = Session(version.file(variant.file).read_bytes())
    pixels = np.stack([preprocess(data, version.manifest.input) for data in version.canary_images()])

    artifact.check_signature(version.manifest, *session.signature)
    off = np.abs(session.run(pixels).probabilities - np.array(version.manifest.canary.probabilities)).max()
    assert off < version.manifest.tolerance(variant.file)
    assert version.manifest.tolerance("model.onnx") == version.manifest.canary.tolerance


def test_an_unknown_variant_is_refused_at_once(digits_trained, tmp_path):
    with pytest.raises(ConfigurationError, match="unknown variant 'int3'"):
        export_version(digits_trained, tmp_path, variants=["int3"])


def test_the_canary_holds_for_the_bytes_in_the_version(exported):
    version = artifact.load(exported)
    pixels = np.stack([preprocess(data, version.manifest.input) for data in version.canary_images()])

    found = Session(version.file("model.onnx").read_bytes()).run(pixels).probabilities

    np.testing.assert_allclose(found, version.manifest.canary.probabilities, atol=1e-6)


def test_the_graph_keeps_the_contract_and_carries_its_facts(exported):
    version = artifact.load(exported)
    model = onnx.load(exported / "model.onnx")
    facts = {entry.key: entry.value for entry in model.metadata_props}

    artifact.check_signature(version.manifest, *Session(model.SerializeToString()).signature)
    assert model.opset_import[0].version == 18
    assert json.loads(facts["convoy.classes"]) == list(version.manifest.classes)
    assert facts["convoy.temperature"] == "1.3"
    assert not any(tensor.external_data for tensor in model.graph.initializer)


def test_the_next_export_takes_the_next_number(digits_trained, tmp_path):
    (tmp_path / "digits" / "7").mkdir(parents=True)

    assert export_version(digits_trained, tmp_path, batches=(1, 2), variants=()).name == "8"


def test_the_number_of_a_version_that_was_removed_is_not_given_again(digits_trained, tmp_path):
    shutil.rmtree(export_version(digits_trained, tmp_path, variants=()))
    again = export_version(digits_trained, tmp_path, variants=())

    assert again.name == "2"
    assert artifact.versions(again.parent) == [2]


def test_exporters_that_race_get_numbers_of_their_own(tmp_path):
    barrier = threading.Barrier(4, timeout=30)
    published = []

    def publish():
        with package.staged(tmp_path, "m") as staging:
            (staging / "model.onnx").write_bytes(b"model")
            barrier.wait()
            published.append(package.publish_next(staging, tmp_path, "m", manifest_of(staging)))

    threads = [threading.Thread(target=publish) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert sorted(path.name for path in published) == ["1", "2", "3", "4"]
    for path in published:
        assert artifact.load(path).manifest.version == int(path.name)
    assert sorted(p.name for p in (tmp_path / "m").glob("[!.]*")) == ["1", "2", "3", "4"]


def manifest_of(staging):
    def build(version):
        canary = artifact.Canary(images=("model.onnx",), probabilities=((0.5, 0.5),))
        return artifact.Manifest(
            name="m",
            version=version,
            created=publication.now(),
            architecture="a",
            classes=("x", "y"),
            input=InputSpec(height=1, width=1),
            files=publication.list_files(staging),
            variants=(artifact.Variant(name="fp32", file="model.onnx"),),
            canary=canary,
        )

    return build


def test_a_fault_that_is_no_race_is_not_tried_again(tmp_path):
    with package.staged(tmp_path, "m") as staging:
        (staging / "model.onnx").write_bytes(b"model")
        build = manifest_of(staging)

        def elsewhere(version):
            return build(version).model_copy(update={"name": "missing"})

        with pytest.raises(ArtifactError, match="cannot be published"):
            package.publish_next(staging, tmp_path, "m", elsewhere)


def test_an_export_that_differs_leaves_nothing_behind(digits_trained, tmp_path):
    class AlwaysTraining(nn.Module):
        """Frozen in training mode by its own code, whatever `eval` says: the reference differs from run to run."""

        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return nn.functional.dropout(self.net(x), 0.5, training=True)

    broken = dataclasses.replace(digits_trained, model=AlwaysTraining(digits_trained.model))

    with pytest.raises(TrainingError, match="differs from PyTorch on a batch of 1"):
        export_version(broken, tmp_path)
    assert not files_under(tmp_path)


def test_a_canary_that_cannot_be_decoded_is_named_and_leaves_nothing_behind(digits_trained, tmp_path):
    text = tmp_path / "text.png"
    text.write_text("no image")
    repository = tmp_path / "repository"

    with pytest.raises(DataError, match=r"text\.png cannot serve as canary"):
        export_version(dataclasses.replace(digits_trained, canary=[text]), repository, batches=(1,), variants=())
    assert not (repository / "digits").exists()


def test_a_repository_that_is_a_file_is_refused(digits_trained, tmp_path):
    (tmp_path / "repository").write_text("a file")

    with pytest.raises(ConfigurationError, match="cannot be written"):
        export_version(digits_trained, tmp_path / "repository", batches=(1,), variants=())


def test_a_model_that_is_too_large_is_refused_before_anything_else(digits_trained, tmp_path):
    huge = nn.Linear(1 << 16, 1 << 14, bias=False, device="meta")

    with pytest.raises(TrainingError, match=r"4\.00 GiB of weights"):
        export_version(dataclasses.replace(digits_trained, model=huge), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "a/b"}, "'a/b' may hold letters"),
        ({"name": "digits\n"}, r"'digits\\n' may hold letters"),
        ({"classes": ("one",)}, "needs two classes"),
        ({"classes": ("a", "a", *"bcdefghi")}, "classes appear twice: a"),
        ({"mean": (0.1, 0.2, 0.3)}, "mean and std need 1 values"),
        ({"std": (0.0,)}, "std has to be positive"),
        ({"temperature": float("nan")}, "temperature has to be positive"),
        ({"canary": []}, "at least one encoded image"),
        ({"holdout": np.zeros((200, 9, 8, 1), np.uint8)}, r"are \(9, 8, 1\), not \(8, 8, 1\)"),
        ({"holdout_labels": np.zeros(3, np.int64)}, "200 held-out images but 3 labels"),
        ({"holdout_labels": np.full(200, 10)}, "go beyond the 10 classes"),
        ({"holdout_paths": []}, "needs its path"),
        (
            {"holdout": np.zeros((0, 8, 8, 1), np.uint8), "holdout_labels": np.zeros(0, np.int64), "holdout_paths": []},
            "no held-out images",
        ),
    ],
)
def test_contradictions_are_found_before_the_export(digits_trained, tmp_path, change, message):
    with pytest.raises(TrainingError, match=message):
        export_version(dataclasses.replace(digits_trained, **change), tmp_path)


def test_a_model_with_another_number_of_outputs_than_labels_is_refused(digits_trained, tmp_path):
    wrong = dataclasses.replace(digits_trained, classes=("a", "b"), holdout_labels=digits_trained.holdout_labels % 2)

    with pytest.raises(TrainingError, match=r"returns \[1, 10\] for 1 images, not logits of 2 classes"):
        export_version(wrong, tmp_path, batches=(1,), variants=())
    assert not files_under(tmp_path)


def test_variants_are_calibrated_by_training_images_and_judged_by_held_out_ones(digits_trained, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(variants, "build", lambda names, baseline, *_, **__: seen.append(baseline) or Outcome())
    version = export_version(digits_trained, tmp_path, batches=(1, 3))
    (baseline,) = seen
    assert baseline.calibration is digits_trained.calibration
    assert baseline.holdout is digits_trained.holdout
    assert baseline.labels is digits_trained.holdout_labels
    assert baseline.batches == (1, 3)
    files = sorted((version / "canary").iterdir())
    assert len(baseline.canary) == len(files) == len(digits_trained.canary)
    np.testing.assert_array_equal(baseline.canary, digits_trained.holdout[: len(files)])


def test_the_graph_is_compared_at_every_size_that_was_asked_for(digits_trained, tmp_path, monkeypatch):
    asked, plain = [], gates.check_parity

    def check(session, wanted, pixels, batches, *rest):
        asked.append((tuple(batches), len(pixels)))
        return plain(session, wanted, pixels, batches, *rest)

    monkeypatch.setattr(gates, "check_parity", check)
    export_version(digits_trained, tmp_path, variants=(), batches=(1, 2, 5))
    assert asked == [((1, 2, 5), 5)]


def test_a_graph_that_breaks_the_contract_is_not_published(digits_trained, tmp_path, monkeypatch):
    from training.runtime import Session, Signature

    plain = Session.signature.fget
    monkeypatch.setattr(Session, "signature", property(lambda self: Signature(plain(self).inputs, {})))
    with pytest.raises(ArtifactError):
        export_version(digits_trained, tmp_path, variants=())
    assert not list(tmp_path.glob("*/*"))
