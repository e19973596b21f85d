"""Where model versions come from: a directory, or a bucket that is mirrored into one.

Both give `<repository>/<model>/<version>/` on the local disk. A version is seen only when its manifest is there;
training publishes atomically, and a copy that is under way fails its hashes and is looked at again when it changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from service import artifact, logs, mirror
from service.errors import ArtifactError, ConfigurationError, OutOfReachError

_log = logs.get("repository")

Fingerprint = tuple[tuple[str, int, int], ...]


class Source(Protocol):
    """A place with model versions. All methods block: call them off the event loop."""

    @property
    def location(self) -> str:
        """The place, as the operator named it."""

    def models(self) -> dict[str, list[int]]:
        """Version numbers of every model, ascending; models without a version are left out.

        Raises:
            ConfigurationError: the place does not exist or cannot be read. What is gone is told apart from what cannot
                be listed: a version that was not seen would be taken out of service.
        """

    def fetch(self, name: str, number: int) -> Path:
        """Local directory of a version; its content is not verified yet.

        Raises:
            ArtifactError: it is incomplete or damaged.
            OutOfReachError: it cannot be had now; the next attempt may succeed, although nothing has changed there.
        """

    def fingerprint(self, name: str, number: int) -> Fingerprint:
        """Changes whenever a file of the version changes; empty if the version is gone.

        Raises:
            OutOfReachError: that cannot be told now.
        """

    def tidy(self, present: Mapping[str, Collection[int]], served: Collection[tuple[str, int]]) -> None:
        """Removes local copies of versions, by name and number, that are neither present nor served any more."""


def open_source(location: str, cache: Path) -> Source:
    """The source for a setting: a path, or a URL (`s3://bucket/models`, `gs://…`) that is mirrored below `cache`."""
    return RemoteSource(location, cache) if "://" in location else LocalSource(Path(location))


class LocalSource:
    """A directory on this machine, or mounted into it.

    Args:
        root: the repository.
    """

    def __init__(self, root: Path) -> None:
        self.location = str(root)
        self._root = root
        self._passed_over: Mapping[Path, str] = {}

    def models(self) -> dict[str, list[int]]:
        """Every directory `<name>/<number>/` with a manifest; what cannot be read is logged, and the others stay."""
        try:
            entries = sorted(path for path in self._root.iterdir() if not path.name.startswith("."))
        except FileNotFoundError:
            raise ConfigurationError(
                f"the repository {self._root} does not exist; train a model into it with "
                f"`convoy train DATA --repository {self._root} --name NAME`, or name another with --repository"
            ) from None
        except OSError as error:
            raise ConfigurationError(f"the repository {self._root} cannot be read: {error.strerror}") from error
        found, passed_over = {}, {}
        for path in entries:
            try:
                if not stat.S_ISDIR(_mode(path)):
                    continue
                path.name.encode()  # names become labels of metrics, and text in messages
                found[path.name] = self._complete(path)
            except UnicodeEncodeError:
                passed_over[path] = "its name is not in UTF-8; rename it"
            except OSError as error:
                passed_over[path] = f"it cannot be read: {error}"
        for path in passed_over.keys() - self._passed_over.keys():  # once, not at each look
            _log.warning("directory passed over", path=ascii(str(path)), reason=passed_over[path])
        self._passed_over = passed_over
        return {name: numbers for name, numbers in found.items() if numbers}

    def fetch(self, name: str, number: int) -> Path:
        """The directory itself."""
        return self._root / name / str(number)

    def fingerprint(self, name: str, number: int) -> Fingerprint:
        """Paths, sizes and times of all files."""
        root = self._root / name / str(number)
        try:
            return tuple(sorted(_states_below(root)))
        except OSError as error:
            raise OutOfReachError(f"{root} cannot be read: {error}") from error

    def tidy(self, present: Mapping[str, Collection[int]], served: Collection[tuple[str, int]]) -> None:
        """Nothing: there are no copies."""

    @staticmethod
    def _complete(model: Path) -> list[int]:
        names = [path.name for path in model.iterdir() if artifact.is_version(path.name)]
        return sorted(int(name) for name in names if stat.S_ISREG(_mode(model / name / artifact.MANIFEST)))


class RemoteSource:
    """A place that fsspec can read, mirrored version by version into a directory and verified by SHA-256.

    Args:
        url: for instance `s3://bucket/models`; the protocol's package (s3fs, gcsfs, adlfs) has to be installed.
        cache: directory of the mirror; what is there already is not fetched again.

    Raises:
        ConfigurationError: the protocol is unknown or its package is missing.
    """

    def __init__(self, url: str, cache: Path) -> None:
        self.location = url
        self._url = url
        readable = "".join(c if c.isalnum() else "_" for c in url)
        self._mirror = cache / "mirror" / f"{readable}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"
        self._filesystem, self._root = _open(url)
        # In a bucket no folder is there without a file; what can be lost is the bucket.
        self._place = self._root if self._root.startswith("/") else self._root.partition("/")[0]

    def models(self) -> dict[str, list[int]]:
        """Every `<name>/<number>/` with a manifest."""
        try:
            self._filesystem.invalidate_cache()
            entries = self._listed(self._root)
            there = bool(entries) or self._filesystem.exists(self._place)
            found = {name: self._complete(path) for name, path in _folders(entries) if not name.startswith(".")}
        except Exception as error:  # each backend raises exceptions of its own library
            raise ConfigurationError(f"the repository {self._url} cannot be read: {error}") from error
        if not there:  # mistyped or lost: not the same as versions that were removed
            raise ConfigurationError(
                f"the repository {self._url} does not exist; create it, or name another with --repository"
            )
        return {name: numbers for name, numbers in sorted(found.items()) if numbers}

    def fetch(self, name: str, number: int) -> Path:
        """Downloads a version beside its place, verifies it, and moves it there; or finds it there, unchanged.

        Other processes may share the cache: whoever is first puts the copy there, and none removes it from under them.
        """
        target = self._mirror / name / str(number)
        source = f"{self._root}/{name}/{number}"
        try:
            manifest = self._filesystem.cat_file(f"{source}/{artifact.MANIFEST}")
            if _holds(target, manifest):
                return target
            with mirror.staging(self._mirror, name, number) as staging:
                self._download(source, staging, manifest)
                artifact.load(staging)
                with mirror.replacing(self._mirror):
                    if not _holds(target, manifest):
                        mirror.replace(target, staging)
        except ArtifactError:
            raise
        except FileNotFoundError as error:
            if str(error.filename).startswith(str(self._mirror)):
                raise OutOfReachError(f"{self._url}/{name}/{number}: somebody cleared {self._mirror}") from error
            raise ArtifactError(f"{self._url}/{name}/{number} is half-copied: {error} is not there") from error
        except Exception as error:  # each backend raises exceptions of its own library
            raise OutOfReachError(f"{self._url}/{name}/{number} cannot be fetched: {error}") from error
        return target

    def fingerprint(self, name: str, number: int) -> Fingerprint:
        """Paths and sizes of all files, and what the backend knows of their changes."""
        try:
            return tuple(sorted(self._states_below(f"{self._root}/{name}/{number}")))
        except Exception as error:  # each backend raises exceptions of its own library
            raise OutOfReachError(f"{self._url}/{name}/{number} cannot be listed: {error}") from error

    def tidy(self, present: Mapping[str, Collection[int]], served: Collection[tuple[str, int]]) -> None:
        """Removes what the mirror holds of them.

        What is present is looked up once more while no process can put a copy there: another one may have fetched a
        version that was published after `present` was listed.
        """
        if not list(self._superfluous(present, served)):
            return
        with contextlib.suppress(ConfigurationError), mirror.replacing(self._mirror):
            for copy in list(self._superfluous(self.models(), served)):
                shutil.rmtree(copy, ignore_errors=True)

    def _superfluous(
        self, present: Mapping[str, Collection[int]], served: Collection[tuple[str, int]]
    ) -> Iterator[Path]:
        for copy in self._mirror.glob("*/*"):
            name, number = copy.parent.name, copy.name
            if (
                artifact.is_version(number)
                and int(number) not in present.get(name, ())
                and (name, int(number)) not in served
            ):
                yield copy

    def _complete(self, model: str) -> list[int]:
        """Numbers of a model's versions that have a manifest, ascending."""
        return sorted(
            int(name)
            for name, path in _folders(self._listed(model))
            if artifact.is_version(name)
            and any(_name(entry) == artifact.MANIFEST and entry["type"] == "file" for entry in self._listed(path))
        )

    def _states_below(self, folder: str) -> Iterator[tuple[str, int, int]]:
        for entry in self._listed(folder):
            if entry["type"] == "directory":
                yield from self._states_below(entry["name"])
            else:
                yield f"{entry['name']} {_changed(entry)}", int(entry.get("size") or 0), 0

    def _listed(self, folder: str) -> list[Mapping[str, Any]]:
        """What lies in a folder; empty if it is gone. Whatever else goes wrong is raised.

        `glob`, `walk` and `find` of fsspec leave out what cannot be listed, without a word.
        """
        try:
            entries = self._filesystem.ls(folder, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        # Some stores list the marker of a folder within it.
        return [self._followed(entry) for entry in entries if entry["name"].strip("/") != folder.strip("/")]

    def _followed(self, entry: Mapping[str, Any]) -> Mapping[str, Any]:
        """A symbolic link as what it leads to."""
        if entry["type"] in {"file", "directory"}:
            return entry
        return {**entry, "type": "directory" if self._filesystem.isdir(entry["name"]) else "file"}

    def _download(self, source: str, staging: Path, manifest: bytes) -> None:
        (staging / artifact.MANIFEST).write_bytes(manifest)
        for path, entry in artifact.read_manifest(staging).files.items():
            (staging / path).parent.mkdir(parents=True, exist_ok=True)
            self._filesystem.get_file(f"{source}/{path}", str(staging / path))
            came_bytes = (staging / path).stat().st_size
            # A file that lies there in another size is half-copied, which verifying tells.
            if came_bytes != entry.size_bytes and came_bytes != self._filesystem.size(f"{source}/{path}"):
                raise OutOfReachError(f"{self._url}: the download of {path} was cut short after {came_bytes} bytes")


def _mode(path: Path) -> int:
    """As `stat` gives it; 0 if nothing is there."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0


def _states_below(root: Path) -> Iterator[tuple[str, int, int]]:
    """Path, size and time of everything below; OSError if something cannot be read."""

    def failed(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):  # else it is gone
            raise error

    for folder, folders, files in os.walk(root, onerror=failed):
        for path in (Path(folder) / name for name in (*folders, *files)):
            try:
                state = path.stat()
            except FileNotFoundError:  # removed while we look: the next look will see a settled state
                continue
            yield path.relative_to(root).as_posix(), state.st_size, state.st_mtime_ns


def _folders(entries: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Last name and path of each folder among a place's entries."""
    return ((_name(entry), entry["name"]) for entry in entries if entry["type"] == "directory")


def _name(entry: Mapping[str, Any]) -> str:
    return PurePosixPath(entry["name"]).name


def _holds(target: Path, manifest: bytes) -> bool:
    """Whether a copy is there, with this manifest, and undamaged."""
    try:
        return (target / artifact.MANIFEST).read_bytes() == manifest and bool(artifact.load(target))
    except (OSError, ArtifactError):
        return False


def _changed(info: Mapping[str, Any]) -> str:
    """What changes with a file's content, by whatever name a backend knows it."""
    keys = ("ETag", "etag", "mtime", "LastModified", "last_modified", "created")
    return str(next((info[key] for key in keys if info.get(key)), ""))


def _open(url: str) -> tuple[Any, str]:
    try:
        import fsspec

        filesystem, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ConfigurationError(f"the repository {url} needs a package: {error}") from error
    except Exception as error:
        raise ConfigurationError(f"the repository {url} cannot be opened: {error}") from error
    return filesystem, str(root).rstrip("/")
