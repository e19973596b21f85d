"""The folder of a run: `<runs>/<name>/<number>/` with settings, split, checkpoints and logs.

None is ever overwritten.
"""

from __future__ import annotations

import re
import tempfile
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from service.errors import ConfigurationError, TrainingError
from service.locks import held, locked
from training.config import Experiment, load_experiment, read_yaml

SETTINGS = "experiment.yaml"
_PUBLISHED = "published.txt"
LAST = "last.pt"  # the checkpoint that a run is resumed from

_LONGEST_NAME = 64
_CLOCKS_S = 5.0  # by which those of a file server and of a process may differ
_SUFFIXES = re.compile(r"(\.(csv|gz|onnx|parquet|pq|tar|tsv|txt))+$", re.IGNORECASE)
_EXPORT = "export."  # has no part in the weights


def name_for(source: Path) -> str:
    """A model's name after its images: "Meine Fotos (2)" gives Meine-Fotos-2. What has no letters gives `model`."""
    place = source.resolve()
    name = place.name if place.is_dir() else _SUFFIXES.sub("", place.name)
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9_-]+", "-", plain).strip("-_")[:_LONGEST_NAME] or "model"


def check_writable(folder: Path, what: str) -> None:
    """Tries to write to the folder, or to where it would be made: nothing is left, if the images cannot be used.

    Raises:
        ConfigurationError: that does not work.
    """
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    try:
        tempfile.TemporaryDirectory(dir=place).cleanup()
    except OSError as error:
        raise ConfigurationError(f"{what} {folder} cannot be written: {error.strerror}; choose another") from error


def check_apart(source: Path, outputs: Mapping[str, Path]) -> None:
    """Refuses to write, {flag: folder}, between the images: the next run would take the results for classes.

    Raises:
        ConfigurationError: a folder is that of the images, or lies in it.
    """
    images = source.resolve()
    for flag, folder in outputs.items():
        if images.is_dir() and folder.resolve().is_relative_to(images):
            raise ConfigurationError(f"{folder} lies among the images of {source}; choose another folder with {flag}")


def make_room(folder: Path) -> str:
    """What to do where a run's folder could not be written: only what has a checkpoint can be resumed."""
    return "make room, then --resume" if (folder / LAST).exists() else "make room and start again"


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Within this block a full disk or a missing permission is an error with the file's name.

    Raises:
        TrainingError: something in the folder cannot be written.
    """
    try:
        yield
    except OSError as error:
        place = error.filename or folder
        raise TrainingError(f"{place} cannot be written: {error.strerror or error}; {make_room(folder)}") from error


@contextmanager
def one_by_one(folder: Path) -> Iterator[None]:
    """Of several processes that would make the same folder one does, and the others wait for it; makes the parent."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{folder.name}.lock")):
        yield


def as_yaml(experiment: Experiment) -> str:
    """All settings, as an experiment file."""
    text: str = yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False)
    return text


def new_run(parent: Path, experiment: Experiment) -> Path:
    """Makes `<parent>/<next number>/`, whoever else does so at the same time, and writes the settings into it."""
    check_writable(parent, "the folder of runs")
    settings = as_yaml(experiment)
    with writing(parent):
        parent.mkdir(parents=True, exist_ok=True)
    number = max(_numbers(parent), default=0) + 1
    while True:
        folder = parent / str(number)
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        except OSError as error:
            raise TrainingError(f"{folder} cannot be made: {error.strerror}; make room and try again") from error
        else:
            break
    with writing(folder):
        (folder / SETTINGS).write_text(settings, encoding="utf-8")
    return folder


def latest_run(parent: Path, checkpoint: str) -> Path:
    """The newest run to go on with: the newest that has written a checkpoint.

    Raises:
        ConfigurationError: there is none.
    """
    folder = begun_run(parent, checkpoint)
    if folder is None:
        raise ConfigurationError(
            f"{parent} holds no run to resume: none has written {checkpoint}; start one without --resume"
        )
    return folder


def begun_run(parent: Path, checkpoint: str, since: float = 0) -> Path | None:
    """The newest run that has written a checkpoint (a file of that name); None if no run has got that far.

    `since`: seconds of the epoch; runs that began before do not count.
    """
    for folder in _newest_first(parent):
        if (folder / checkpoint).is_file():
            return folder if (folder / SETTINGS).stat().st_mtime >= since - _CLOCKS_S else None
    return None


def note_published(folder: Path, version: Path) -> None:
    """Notes which version the run has become."""
    with writing(folder):
        (folder / _PUBLISHED).write_text(f"{version.resolve()}\n", encoding="utf-8")


def published(folder: Path, repository: Path) -> Path | None:
    """The version that the run has become, if it is still in that repository."""
    try:
        version = Path((folder / _PUBLISHED).read_text(encoding="utf-8").strip())
    except OSError:
        return None
    return version if version.is_dir() and version.parent.parent == repository.resolve() else None


def has_changed(folder: Path, experiment: Experiment, source: Path) -> bool:
    """Whether the run was started with other settings, or images or their folders are newer than its version."""
    if load_experiment(folder / SETTINGS, {}) != experiment:
        return True
    try:
        since = (folder / _PUBLISHED).stat().st_mtime
        return any(place.lstat().st_mtime > since for place in (source, *source.rglob("*")))
    except OSError:  # the images are gone, or going: whoever reads them tells what is wrong
        return True


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """While it lasts no other process may work on the run.

    Raises:
        ConfigurationError: one does.
    """
    with held(folder / ".lock") as mine:
        if not mine:
            raise ConfigurationError(f"another process is working on {folder}; wait for it, or stop it")
        yield


def newest_run(parent: Path) -> Path | None:
    """The run that began last, however far it has got."""
    return next(_newest_first(parent), None)


def _newest_first(parent: Path) -> Iterator[Path]:
    numbers = _numbers(parent) if parent.is_dir() else []
    return (parent / str(number) for number in sorted(numbers, reverse=True))


def settings_of(folder: Path, file: Path | None, overrides: Mapping[str, Any]) -> Experiment:
    """The settings that a run was started with; only those of the export may be others by now.

    Args:
        folder: of the run.
        file: the experiment file that is given to the resumed run, if any.
        overrides: the flags that are given to it, by dotted key.

    Raises:
        ConfigurationError: they cannot be read, or what is given contradicts them.
    """
    stored = load_experiment(folder / SETTINGS, {})
    tree = read_yaml(file) if file else {}
    tree.pop("tune", None)  # as in `load_experiment`
    asked = load_experiment(folder / SETTINGS, {**dict(_leaves(tree)), **overrides})
    before, now = (dict(_leaves(settings.model_dump(mode="json"))) for settings in (stored, asked))
    changed = [key for key in now if before.get(key) != now[key] and not key.startswith(_EXPORT)]
    if changed:
        raise ConfigurationError(
            f"{folder} was started with another {', '.join(changed)}, and a resumed run has to end as if it had not "
            "been interrupted; give the settings it was started with, or start a new run without --resume"
        )
    return asked


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a nested mapping."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _numbers(parent: Path) -> list[int]:
    return [int(entry.name) for entry in parent.iterdir() if entry.name.isdecimal()]
