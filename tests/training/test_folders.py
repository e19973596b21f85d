import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from service.errors import ConfigurationError, TrainingError
from training.config import Experiment, load_experiment
from training.folders import (
    alone,
    begun_run,
    check_apart,
    check_writable,
    has_changed,
    latest_run,
    name_for,
    new_run,
    newest_run,
    note_published,
    published,
    settings_of,
    writing,
)


def test_runs_are_numbered_and_never_overwritten(tmp_path):
    folders = [new_run(tmp_path / "digits", Experiment()) for _ in range(3)]
    assert [folder.name for folder in folders] == ["1", "2", "3"]
    (tmp_path / "digits" / "cache").mkdir()
    with pytest.raises(ConfigurationError, match=r"none has written last\.pt"):
        latest_run(tmp_path / "digits", "last.pt")
    (folders[1] / "last.pt").write_bytes(b"")  # the third is that of a failed start
    assert latest_run(tmp_path / "digits", "last.pt") == folders[1]


def test_runs_that_begin_together_have_a_folder_each(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: new_run(tmp_path, Experiment()), range(40)))
    assert sorted(int(folder.name) for folder in folders) == list(range(1, 41))


def test_settings_come_back_and_contradictions_are_refused(tmp_path):
    experiment = Experiment.model_validate({"loop": {"epochs": 7}, "model": {"options": {"dropout": 0.5}}})
    folder = new_run(tmp_path, experiment)
    assert settings_of(folder, None, {}) == experiment
    assert settings_of(folder, None, {"loop.epochs": 7}) == experiment
    with pytest.raises(ConfigurationError, match=r"another loop\.epochs,"):
        settings_of(folder, None, {"loop.epochs": 8})


def test_an_experiment_file_that_was_changed_meanwhile_is_refused(tmp_path):
    file = tmp_path / "experiment.yaml"
    file.write_text("loop: {epochs: 7}\nmodel: {options: {dropout: 0.5}}\ntune: {trials: 3}\n")
    folder = new_run(tmp_path / "runs", load_experiment(file, {"loop.seed": 3}))
    assert settings_of(folder, file, {"loop.seed": 3}) == settings_of(folder, file, {})
    file.write_text("loop: {epochs: 9}\nmodel: {options: {dropout: 0.2}}\n")
    with pytest.raises(ConfigurationError, match=r"another model\.options\.dropout, loop\.epochs,"):
        settings_of(folder, file, {})
    assert settings_of(folder, file, {"loop.epochs": 7, "model.options.dropout": 0.5}).loop.seed == 3


def test_the_export_of_a_resumed_run_may_be_another(tmp_path):
    folder = new_run(tmp_path, Experiment())
    found = settings_of(folder, None, {"export.accuracy_budget_points": 2, "export.variants": ["fp16"]})
    assert (found.export.accuracy_budget_points, found.export.variants) == (2, ("fp16",))
    assert found.model_copy(update={"export": Experiment().export}) == Experiment()


def test_nothing_to_resume_is_said_so(tmp_path):
    with pytest.raises(ConfigurationError, match="no run to resume"):
        latest_run(tmp_path / "digits", "last.pt")


def test_a_run_is_published_as_long_as_its_version_is_there(tmp_path):
    folder, version = new_run(tmp_path / "runs", Experiment()), tmp_path / "models" / "x" / "3"
    version.mkdir(parents=True)
    assert published(folder, tmp_path / "models") is None
    note_published(folder, version)
    assert published(folder, tmp_path / "models") == version
    assert published(folder, tmp_path / "elsewhere") is None
    version.rmdir()
    assert published(folder, tmp_path / "models") is None


def test_images_and_settings_that_have_changed_are_noticed(tmp_path):
    images = tmp_path / "images"
    (images / "a").mkdir(parents=True)
    (images / "a" / "1.png").write_bytes(b"1")
    folder = new_run(tmp_path / "runs", Experiment())
    note_published(folder, tmp_path)
    assert not has_changed(folder, Experiment(), images)
    assert has_changed(folder, Experiment.model_validate({"loop": {"epochs": 7}}), images)
    assert has_changed(folder, Experiment(), tmp_path / "gone")
    (images / "a" / "1.png").unlink()
    os.utime(images / "a", (2**33, 2**33))
    assert has_changed(folder, Experiment(), images)


def test_two_processes_do_not_work_on_one_run(tmp_path):
    with alone(tmp_path), pytest.raises(ConfigurationError, match="another process is working on"), alone(tmp_path):
        pass
    with alone(tmp_path):
        pass


def test_a_folder_that_can_be_written_is_not_made_before_it_is_needed(tmp_path):
    check_writable(tmp_path / "a" / "b", "the repository")
    assert list(tmp_path.iterdir()) == []


def test_the_newest_run_with_a_checkpoint_has_begun(tmp_path):
    parent = tmp_path / "digits"
    assert begun_run(parent, "last.pt") is None
    folders = [new_run(parent, Experiment()) for _ in range(11)]
    assert begun_run(parent, "last.pt") is None
    for folder in folders[8:10]:
        (folder / "last.pt").write_bytes(b"")
    assert begun_run(parent, "last.pt") == folders[9]
    assert newest_run(parent) == folders[-1]
    os.utime(folders[9] / "experiment.yaml", (1000, 1000))
    assert begun_run(parent, "last.pt", since=1000) == folders[9]
    assert begun_run(parent, "last.pt", since=2000) is None  # an older one is not meant either


def test_a_file_in_the_way_is_said_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        check_writable(tmp_path / "file", "the repository")


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("photos", "photos"),
        ("photos.v2", "photos-v2"),
        ("2024.05.01", "2024-05-01"),
        ("photos.csv", "photos"),
        ("photos.v2.tar.gz", "photos-v2"),
        ("Meine Fotos (2)", "Meine-Fotos-2"),
        ("Bücher", "Bucher"),
        ("写真", "model"),
        ("_tmp_", "tmp"),
        ("x" * 200, "x" * 64),
    ],
)
def test_a_model_is_named_after_its_images(tmp_path, folder, name):
    assert name_for(tmp_path / folder) == name
    assert Experiment.model_validate({"name": name}).name == name


def test_results_are_not_written_among_the_images(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    monkeypatch.chdir(tmp_path / "photos")
    for source, repository in ((".", "models"), ("../link", "models"), (".", ".")):
        with pytest.raises(ConfigurationError, match=r"lies among the images.*--repository"):
            check_apart(Path(source), {"--runs": tmp_path / "runs", "--repository": Path(repository)})
    check_apart(tmp_path / "photos", {"--runs": tmp_path / "runs", "--repository": tmp_path})


def test_what_cannot_be_written_is_named(tmp_path):
    with pytest.raises(TrainingError, match=r"log\.csv cannot be written: No such file"), writing(tmp_path):
        (tmp_path / "gone" / "log.csv").write_text("")


def test_a_new_run_comes_after_all_others_whatever_was_removed(tmp_path):
    (tmp_path / "5").mkdir()
    assert new_run(tmp_path, Experiment()).name == "6"
