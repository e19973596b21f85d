import csv
import io
import os
import re
import shutil

import numpy as np
import pytest
import torch
from rich.console import Console
from runs import TREE, display

import training.run
from service import artifact
from service.errors import ConfigurationError, DataError
from training import checkpoint
from training.calibrate import calibration, fit_temperature
from training.config import Experiment
from training.display import Display
from training.distributed import Group
from training.evaluate import Evaluation, evaluate
from training.finder import sweep
from training.folders import LAST, latest_run
from training.models import WeightsMismatchError, create, describe
from training.prepare import prepare
from training.run import repeatable, run, search_learning_rate, without_skill
from training.transfer import plan


def test_ends_in_a_valid_model_version(finished, digit_folder):
    result, _ = finished
    version = artifact.load(result.version)
    manifest = version.manifest
    assert manifest.classes == tuple(map(str, range(10)))
    assert manifest.input.shape == (16, 16, 1)
    assert manifest.metrics["accuracy"] == result.evaluation.accuracy
    logits, labels = result.evaluation.logits, result.evaluation.labels
    found = calibration(logits, labels, manifest.temperature)
    assert {key: manifest.metrics[key] for key in found.metrics()} == pytest.approx(found.metrics())
    assert manifest.recipe["loop"]["epochs"] == 4
    assert manifest.data["images"] == {"train": 240, "validation": 30, "test": 30}
    assert len(manifest.data["sha256"]) == 64
    assert len(result.holdout) == 30
    assert all(file.is_relative_to(digit_folder) for file in result.holdout)


def test_says_what_it_does(finished):
    result, text = finished
    assert "300 images" in text
    assert "240 images to train, 30 to validate, 30 to test; lenet5 on 16x16x1" in text
    assert text.count("epoch ") >= 4
    assert f"accuracy {result.evaluation.accuracy:.2%}" in text
    assert "expected calibration error" in text
    assert "negative log-likelihood" in text


def test_the_recipe_has_what_was_chosen(finished):
    recipe = artifact.load(finished[0].version).manifest.recipe
    assert recipe["optimiser"]["learning_rate"] == 4e-3
    assert recipe["precision"] == "float32"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"test": 0}, "The same images chose the epoch and the temperature"),
        ({"validation": 0}, "The temperature was fitted to the same images"),
    ],
)
def test_held_out_images_that_serve_twice_are_told_in_terminal_and_card(digit_folder, tmp_path, data, words):
    tree = {**TREE, "loop": {**TREE["loop"], "epochs": 1}, "data": data, "export": {"variants": []}}
    shown = display()
    result = run(Experiment.model_validate(tree), digit_folder, tmp_path / "models", tmp_path / "runs", shown)
    assert f"Note: {words}" in " ".join(shown.console.file.getvalue().split())
    assert words in " ".join((result.version / "card.html").read_text().split())


def folders_of(digit_folder, root, train, validation):
    """Digits in train and val folders: how many of each class."""
    for part, counts in (("train", train), ("val", validation)):
        for label, count in counts.items():
            (root / part / label).mkdir(parents=True)
            skip = 0 if part == "train" else 20
            for file in sorted((digit_folder / label).iterdir())[skip : skip + count]:
                shutil.copy(file, root / part / label)
    return root


def test_a_model_that_learnt_nothing_and_classes_that_nobody_checks_are_told(digit_folder, tmp_path):
    images = folders_of(digit_folder, tmp_path / "images", {"0": 15, "1": 15, "2": 15}, {"0": 6, "1": 1})
    tree = {**TREE, "optimiser": {"learning_rate": 1e-9}, "loop": {**TREE["loop"], "epochs": 1}, "data": {"test": 0}}
    shown = display()
    run(Experiment.model_validate(tree), images, tmp_path / "models", tmp_path / "runs", shown)
    said = " ".join(shown.console.file.getvalue().split())
    assert "There is no validation image of 2" in said
    assert "Always to answer '0' would be right" in said


def test_what_was_left_out_is_told_where_nothing_is_left(digit_folder, tmp_path):
    images = folders_of(digit_folder, tmp_path / "images", {"0": 5, "1": 5}, {"0": 3, "1": 3})
    for file in (images / "train" / "1").iterdir():
        shutil.copy(file, images / "val" / "1")
    shown = display()
    experiment = Experiment.model_validate({**TREE, "data": {"test": 0}})
    with pytest.raises(DataError, match="class 1 has images to judge by and none to train on") as caught:
        run(experiment, images, tmp_path / "models", tmp_path / "runs", shown)
    assert "hold out less" not in str(caught.value)
    assert shown.console.file.getvalue().count("left out train/1/") == 5


def test_a_folder_of_runs_that_cannot_be_written_is_told_before_images_are_read(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigurationError, match=r"the folder of runs .*file/digits cannot be written"):
        run(Experiment.model_validate(TREE), tmp_path / "nowhere", tmp_path / "models", tmp_path / "file", display())


def test_leaves_logs_split_and_settings(finished):
    result, _ = finished
    with (result.folder / "log.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == 4
    with (result.folder / "split.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    held_out = {row["path"] for row in rows if row["split"] == "test"}
    assert held_out == {f"{file.parent.name}/{file.name}" for file in result.holdout}
    assert (result.folder / "left-out.csv").read_text() == "path,reason,message\n"
    assert latest_run(result.folder.parent, LAST) == result.folder


def test_a_run_that_is_stopped_early_says_so(digit_folder, tmp_path):
    tree = {
        **TREE,
        "optimiser": {"learning_rate": 1e-12},
        "loop": {**TREE["loop"], "patience": 1, "epochs": 9, "ema_decay": 0},
    }
    shown = display()
    run(Experiment.model_validate(tree), digit_folder, tmp_path / "models", tmp_path / "runs", shown)
    assert re.search(
        r"Stopped early after epoch \d of 9: none has been better since epoch \d", shown.console.file.getvalue()
    )


def test_few_images_are_refused_with_advice(digit_folder, tmp_path):
    for label, count in (("0", 2), ("1", 9)):
        (tmp_path / "images" / label).mkdir(parents=True)
        for file in sorted((digit_folder / label).iterdir())[:count]:
            (tmp_path / "images" / label / file.name).write_bytes(file.read_bytes())
    with pytest.raises(DataError, match=r"class 0 has only 2 usable training images, and 3 are needed; add images, or"):
        run(Experiment.model_validate(TREE), tmp_path / "images", tmp_path / "models", tmp_path / "runs", display())


def test_what_would_fail_at_the_end_fails_at_the_start(digit_folder, tmp_path):
    (tmp_path / "file").write_text("")
    experiment = Experiment.model_validate(TREE)
    with pytest.raises(ConfigurationError, match=r"the repository .* cannot be written"):
        run(experiment, digit_folder, tmp_path / "file", tmp_path / "runs", display())
    nothing_held_out = Experiment.model_validate({**TREE, "data": {"validation": 0, "test": 0}})

    class Unread(Display):
        def reading(self, files, what="images"):
            pytest.fail("images were read")

    nothing_to_wait_by = Experiment.model_validate({**TREE, "data": {"validation": 0}, "loop": {"patience": 2}})
    for settings, message in ((nothing_held_out, "no image is left"), (nothing_to_wait_by, "--patience needs")):
        with pytest.raises(ConfigurationError, match=message):
            run(settings, digit_folder, tmp_path / "models", tmp_path / "runs", Unread(Console(quiet=True)))
    too_small = Experiment.model_validate({**TREE, "input": {"size": 8}})
    with pytest.raises(ConfigurationError, match="too small for lenet5"):
        run(too_small, digit_folder, tmp_path / "models", tmp_path / "runs", display())
    trained_too_small = Experiment.model_validate({**TREE, "input": {"size": 32, "train_size": 12}})
    with pytest.raises(ConfigurationError, match=r"input\.train_size: images of 12x12 .* too small for lenet5"):
        run(trained_too_small, tmp_path / "no-images", tmp_path / "models", tmp_path / "runs", display())
    weights_of_another = tmp_path / "weights.pth"
    torch.save(create("convnet", 2, 1).state_dict(), weights_of_another)
    transfer = Experiment.model_validate({**TREE, "transfer": {"weights": str(weights_of_another)}})
    with pytest.raises(WeightsMismatchError, match="does not fit this lenet5"):
        run(transfer, tmp_path / "no-images", tmp_path / "models", tmp_path / "runs", display())


def test_parts_that_came_with_the_data_need_no_shares(digit_folder, tmp_path):
    images = tmp_path / "images"
    for file in sorted(digit_folder.glob("[01]/*.png")):
        part = images / ("val" if file.stem[-1] == "3" else "train") / file.parent.name
        part.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, part)
    tree = {**TREE, "loop": {**TREE["loop"], "epochs": 1, "patience": 1}, "data": {"validation": 0, "test": 0}}
    settings = Experiment.model_validate({**tree, "export": {"variants": []}})
    result = run(settings, images, tmp_path / "models", tmp_path / "runs", display())
    assert {file.parts[-3] for file in result.holdout} == {"val"}


def test_what_is_repeatable_on_a_gpu_is_so_from_the_start(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with repeatable(wanted=False):
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
        assert torch.backends.cudnn.benchmark
    with repeatable(wanted=True):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert not torch.backends.cudnn.benchmark
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with repeatable(wanted=True):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_faults_are_reported_and_kept_in_a_file(digit_folder, tmp_path):
    images = tmp_path / "images"
    for label in "01":
        (images / label).mkdir(parents=True)
        for file in sorted((digit_folder / label).iterdir())[:20]:
            (images / label / file.name).write_bytes(file.read_bytes())
    (images / "0" / "notes.jpg").write_text("hello")
    copy = next((images / "1").iterdir())
    (images / "1" / "zz-copy.png").write_bytes(copy.read_bytes())
    shown = display()
    tree = {**TREE, "loop": {"epochs": 1, "precision": "float32", "batch_size": 8}, "data": {"cache": "disk"}}
    result = run(Experiment.model_validate(tree), images, tmp_path / "models", tmp_path / "runs", shown)
    text = shown.console.file.getvalue()
    assert "40 images, 2 left out" in text
    assert "0/notes.jpg" in text
    with (result.folder / "left-out.csv").open() as stream:
        assert {row["path"]: row["reason"] for row in csv.DictReader(stream)} == {
            "0/notes.jpg": "unsupported_format",
            "1/zz-copy.png": "duplicate",
        }


def test_the_search_for_a_learning_rate_leaves_a_curve(digit_folder, tmp_path):
    rate = search_learning_rate(Experiment.model_validate(TREE), digit_folder, tmp_path / "runs", display())
    assert 1e-4 < rate < 1
    assert (tmp_path / "runs" / "digits" / "1" / "learning-rate.png").stat().st_size > 1000


def test_the_search_is_that_of_the_last_phase_at_the_precision_asked_for(finished, digit_folder, tmp_path, monkeypatch):
    result, _ = finished
    swept = {}

    def spy(stepper, source, phase):
        swept.update(precision=stepper.precision, phase=phase)
        return sweep(stepper, source, phase)

    monkeypatch.setattr("training.run.sweep", spy)
    tree = {
        **TREE,
        "loop": {**TREE["loop"], "precision": "bfloat16"},
        "transfer": {"weights": str(result.folder / "best.pt"), "strategy": "linear-probe"},
    }
    experiment = Experiment.model_validate(tree)
    search_learning_rate(experiment, digit_folder, tmp_path / "runs", display())
    assert swept == {"precision": "bfloat16", "phase": plan(experiment, describe("lenet5"))[-1]}


@pytest.mark.parametrize(
    ("right", "words"),
    [(3, "more often (50.0% against 15.0%)"), (10, "as often"), (11, "")],
)
def test_a_model_that_is_worse_than_a_constant_answer_is_told_how_much(right, words):
    labels = np.array([0] * 10 + [1] * 10)
    found = Evaluation(np.zeros((20, 2), np.float32), labels, loss=0.7, accuracy=right / 20, top5=1.0)
    said = without_skill(found, ("cat", "dog"))

    assert words in said
    assert bool(said) == bool(words)


def test_the_temperature_is_of_the_validation_part_and_the_test_part_judges(digit_folder, tmp_path, monkeypatch):
    seen, export = [], training.run.export_version

    def export_version(trained, *arguments, **options):
        seen.append(trained)
        return export(trained, *arguments, **options)

    monkeypatch.setattr(training.run, "export_version", export_version)
    settings = Experiment.model_validate({
        "name": "digits", "input": {"size": 16}, "data": {"validation": 0.3, "test": 0.2},
        "loop": {"epochs": 2, "precision": "float32", "threads": 1}, "export": {"calibration_images": 20}})  # fmt: skip
    display = Display(Console(file=io.StringIO()))
    result = run(settings, digit_folder, tmp_path / "models", tmp_path / "runs", display)
    (trained,) = seen
    data = prepare(settings, describe("lenet5"), digit_folder, tmp_path / "again", display, Group())
    model = create("lenet5", 10, 1)
    model.load_state_dict(checkpoint.load(result.folder / "best.pt")["model"])
    found = {part: evaluate(model, data.examples(part), data.normalise) for part in ("validation", "test")}
    own, other = (fit_temperature(found[part].logits, found[part].labels) for part in ("validation", "test"))
    assert trained.temperature == pytest.approx(own, rel=1e-3)
    assert abs(own / other - 1) > 0.01, (own, other)
    assert result.evaluation.accuracy == found["test"].accuracy
    assert (trained.mean, trained.std) == (data.normalise.mean, data.normalise.std)
    np.testing.assert_array_equal(trained.holdout, data.dataset.images[data.split.test])
    np.testing.assert_array_equal(trained.holdout_labels, data.dataset.labels[data.split.test])
    np.testing.assert_array_equal(trained.calibration, data.calibration(20))
    assert len({data.dataset.listing.paths.index(str(p.relative_to(digit_folder))) for p in trained.canary}) == 8
    assert len({p.parent.name for p in trained.canary}) == 8  # of different classes


@pytest.mark.parametrize(("test", "judgements"), [(0.2, 2), (0.0, 1)])
def test_each_held_out_part_is_judged_once_and_stays_where_it_is(digit_folder, tmp_path, monkeypatch, test, judgements):
    """A set that is mapped because it does not fit memory has held-out images that may not fit either."""
    parts, trained, evaluated, export = [], [], training.run.evaluate, training.run.export_version

    def evaluate(model, examples, *arguments, **options):
        parts.append(examples)
        return evaluated(model, examples, *arguments, **options)

    def export_version(finished, *arguments, **options):
        trained.append(finished)
        return export(finished, *arguments, **options)

    monkeypatch.setattr(training.run, "evaluate", evaluate)
    monkeypatch.setattr(training.run, "export_version", export_version)
    settings = Experiment.model_validate({
        "name": "digits", "input": {"size": 16}, "data": {"validation": 0.2, "test": test, "cache": "disk"},
        "loop": {"epochs": 1, "threads": 1}, "export": {"variants": ()}})  # fmt: skip
    run(settings, digit_folder, tmp_path / "models", tmp_path / "runs", Display(Console(file=io.StringIO())))
    (finished,) = trained
    assert len(parts) == judgements
    assert isinstance(finished.holdout.images, np.memmap)
    assert finished.holdout.images is parts[0].images
