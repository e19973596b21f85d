"""The model version on disk: the contract between training, which writes it, and the service, which reads it.

`<repository>/<model name>/<version>/` holds `model.onnx`, optional variants of it, `manifest.json`, `canary/` and
`card.html`. The manifest lists every file with its size and SHA-256. `load` reads and verifies; `service.publication`
makes a finished directory appear. Nothing here needs ONNX Runtime: what only the graph can tell is checked by
`service.engine` with `check_signature`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from service import threads, validation
from service.errors import ArtifactError, OutOfReachError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
MODEL = "model.onnx"
CARD = "card.html"
CANARY_DIR = "canary"

INPUT_NAME = "image"
LOGITS_NAME = "logits"
PROBABILITIES_NAME = "probabilities"

# A model's name is a directory, a metric label and part of URLs.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"

_LARGEST_VERSION = 2**63 - 1  # of an int64, as the API has it
# Hashed in half a millisecond. A larger buffer is longer cleared under Python's lock; with a smaller one the lock
# changes hands more often.
_CHUNK_BYTES = 512 << 10

# What a read fails with if the files are not as they have to be. All else may pass without a change of theirs.
_FAULTS_OF_FILES = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG})


class _Strict(BaseModel):
    """Frozen, and a misspelt key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Resize(_Strict):
    """How an image of any size becomes the model's input.

    `crop`: scale so that the shorter side is `shorter_side`, keep the aspect ratio, cut `width` x `height` from the
    centre. `stretch`: scale each axis on its own to `width` x `height`; nothing is cut; `shorter_side` is unused.
    Scaling down is antialiased (the filter's support grows with the scale), as Pillow and torchvision do it.
    """

    mode: Literal["crop", "stretch"] = "crop"
    shorter_side: Annotated[int, Field(ge=1, le=8192)] | None = None
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"


class InputSpec(_Strict):
    """Shape of one image as the model sees it, uint8, and how to get there.

    `height` and `width` in pixels; `channels` 1 (grayscale, ITU-R 601 luma) or 3 (RGB).
    """

    height: Annotated[int, Field(ge=1, le=8192)]
    width: Annotated[int, Field(ge=1, le=8192)]
    channels: Literal[1, 3] = 3
    resize: Resize = Resize()

    @model_validator(mode="after")
    def _crop_fits(self) -> Self:
        side = self.resize.shorter_side
        if self.resize.mode == "crop" and side is not None and side < max(self.height, self.width):
            raise ValueError(f"shorter_side {side} is smaller than the crop of {self.height}x{self.width}")
        return self

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        return self.height, self.width, self.channels

    @property
    def nbytes(self) -> int:
        """Bytes of one image as uint8[H, W, C]."""
        return self.height * self.width * self.channels

    def describe(self) -> str:
        """The resize rule in one sentence, for people."""
        how = f"{self.resize.interpolation}, antialiased"
        if self.resize.mode == "stretch":
            return f"stretched to {self.width}x{self.height} ({how})"
        side = self.resize.shorter_side or max(self.height, self.width)
        return f"shorter side to {side} ({how}), centre crop {self.width}x{self.height}"


class FileEntry(_Strict):
    """One file of the version; paths are relative, with forward slashes."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    size_bytes: Annotated[int, Field(ge=0)]


class Variant(_Strict):
    """One model file. The float model is always there, as `fp32` in `model.onnx`.

    `accuracy`: top-1 on the held-out images, 0 to 1. `images_per_second`: where it was exported, batch as noted in
    `note`. Both None if they were not measured (an imported model). `canary_tolerance`: like `Canary.tolerance`, for a
    variant whose coarser numbers may move a probability further without changing the answer; None takes the canary's.
    """

    name: Literal["fp32", "fp16", "int8", "trt-int8"]
    file: str
    accuracy: Annotated[float, Field(ge=0, le=1)] | None = None
    images_per_second: Annotated[float, Field(gt=0)] | None = None
    canary_tolerance: Annotated[float, Field(gt=0, lt=1)] | None = None
    note: str = ""


class RejectedVariant(_Strict):
    """A variant that was tried and not kept, and why."""

    name: Literal["fp16", "int8", "trt-int8"]
    reason: str


class Canary(_Strict):
    """Images whose probabilities are known.

    `images`: encoded files inside the version. `probabilities`: float32[len(images)][K], of the float model.
    `tolerance`: largest absolute difference of a probability at which the version is still trusted.
    """

    images: Annotated[tuple[str, ...], Field(min_length=1)]
    probabilities: tuple[tuple[float, ...], ...]
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 0.02

    @model_validator(mode="after")
    def _one_row_each(self) -> Self:
        if len(self.images) != len(self.probabilities):
            raise ValueError(f"{len(self.images)} images but {len(self.probabilities)} rows of probabilities")
        return self


class Weights(_Strict):
    """Where the weights come from and under which licence they may be used."""

    source: str = "trained from scratch"
    licence: str = "unspecified"


# What is told of a version beside its classes and files.
_DESCRIBING = {"architecture", "metrics", "data", "recipe", "libraries", "weights", "rejected_variants"}


class Manifest(_Strict):
    """`manifest.json`."""

    schema_version: Literal[1] = 1
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    version: Annotated[int, Field(ge=1, le=_LARGEST_VERSION)]
    created: datetime
    architecture: str
    classes: Annotated[tuple[str, ...], Field(min_length=2)]
    input: InputSpec
    temperature: Annotated[float, Field(gt=0)] = 1.0
    files: Mapping[str, FileEntry]
    variants: Annotated[tuple[Variant, ...], Field(min_length=1)]
    rejected_variants: tuple[RejectedVariant, ...] = ()
    canary: Canary
    metrics: Mapping[str, float] = {}
    data: Mapping[str, Any] = {}
    recipe: Mapping[str, Any] = {}
    libraries: Mapping[str, str] = {}
    weights: Weights = Weights()

    def tolerance(self, file: str) -> float:
        """How far a probability of the canary may be off when the variant in `file` computes it."""
        own = {variant.file: variant.canary_tolerance for variant in self.variants}
        return own.get(file) or self.canary.tolerance

    @field_validator("classes")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError("two classes have the same name")
        for name in value:
            if not _is_text(name):
                raise ValueError(f"the class {name!r} is no text that can be sent")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.variants[0].name != "fp32" or self.variants[0].file != MODEL:
            raise ValueError(f"the first variant has to be fp32 in {MODEL}")
        for row in self.canary.probabilities:
            if len(row) != len(self.classes):
                raise ValueError(f"the canary has {len(row)} probabilities for {len(self.classes)} classes")
        for path in [v.file for v in self.variants] + list(self.canary.images):
            if path not in self.files:
                raise ValueError(f"{path!r} is used but not listed under files")
        for path in self.files:
            if not _is_path(path):
                raise ValueError(f"{path!r} is no path of a file")
            if path.startswith("/") or "\\" in path or ".." in path.split("/"):
                raise ValueError(f"{path} points outside of the version's directory")
        described = self.model_dump(include=_DESCRIBING)
        if not _is_text(json.dumps(described, ensure_ascii=False, default=str)):
            raise ValueError(f"one of {', '.join(sorted(_DESCRIBING))} has text that cannot be sent: half a character")
        return self


@dataclass(frozen=True)
class ModelVersion:
    """A model version on disk, verified."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        """Absolute path of a file listed in the manifest."""
        return self.path / name

    @property
    def digest(self) -> str:
        """SHA-256 of the float model, in hexadecimal."""
        return self.manifest.files[MODEL].sha256

    def canary_images(self) -> list[bytes]:
        """The canary's encoded images, in the order of its probabilities.

        Raises:
            ArtifactError: one of them is gone, or is another one now: the model in memory is not to be judged by that.
            OutOfReachError: one cannot be read now.
        """
        try:
            images = [self.file(name).read_bytes() for name in self.manifest.canary.images]
        except OSError as error:
            raise _unreadable(error, f"{error.filename} cannot be read: {error.strerror}") from error
        for name, data in zip(self.manifest.canary.images, images, strict=True):
            if hashlib.sha256(data).hexdigest() != self.manifest.files[name].sha256:
                raise ArtifactError(f"{self.file(name)} is not what it was when the version was loaded")
        return images


def load(path: Path) -> ModelVersion:
    """Reads a model version and verifies every listed file.

    Raises:
        ArtifactError: no manifest, a manifest that breaks the schema, a directory that does not match it, or a file
            that is missing or differs from its SHA-256.
    """
    version = unverified(path)
    verify(version)
    return version


def unverified(path: Path) -> ModelVersion:
    """Reads a model version without looking at its files; nothing may be made of them before `verify`.

    Raises:
        ArtifactError: no manifest, a manifest that breaks the schema, or a directory that does not match it.
    """
    manifest = read_manifest(path)
    if path.name.isdecimal() and int(path.name) != manifest.version:
        raise ArtifactError(
            f"{path}: the manifest says version {manifest.version}, the directory says {path.name}; "
            "copy a version under its own number"
        )
    return ModelVersion(path=path, manifest=manifest)


def verify(version: ModelVersion, *, gently: bool = False) -> None:
    """Holds every file that the manifest lists against its size and SHA-256.

    Args:
        version: the model version.
        gently: see `file_entry`.

    Raises:
        ArtifactError: a file is missing or differs.
        OutOfReachError: one cannot be read now.
    """
    for name, entry in version.manifest.files.items():
        _verify_file(version.file(name), entry, gently=gently)


def read_manifest(path: Path) -> Manifest:
    """Reads `manifest.json` of a version directory without looking at the other files.

    Raises:
        ArtifactError: it is missing, is no JSON, or breaks the schema; the message lists each wrong field.
        OutOfReachError: it cannot be read now.
    """
    file = path / MANIFEST
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ArtifactError(
            f"{path} is not a model version: it has no {MANIFEST}. "
            "A version is <repository>/<model>/<number>/, as written by `convoy train`"
        ) from None
    except OSError as error:
        raise _unreadable(error, f"{file} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{file} cannot be read: {error}") from error
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{file} is not JSON: {error}") from error
    found = raw.get("schema_version") if isinstance(raw, dict) else None
    if found != SCHEMA_VERSION:
        raise ArtifactError(
            f"{file}: schema version {found!r}, but this program reads version {SCHEMA_VERSION}; "
            "use the release of Convoy that wrote it, or export the model again"
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'manifest'}: {validation.message(e)}" for e in error.errors()
        )
        raise ArtifactError(f"{file} breaks the schema: {faults}") from error


def check_signature(
    manifest: Manifest,
    inputs: Mapping[str, tuple[str, list[int | str | None]]],
    outputs: Mapping[str, tuple[str, list[int | str | None]]],
) -> None:
    """Holds the graph's inputs and outputs, {name: (ORT type, shape)}, against the manifest.

    Raises:
        ArtifactError: a name, type or shape differs from the contract, or the graph's classes from the labels.
    """
    classes = len(manifest.classes)
    wanted_in = {INPUT_NAME: ("tensor(uint8)", list(manifest.input.shape))}
    wanted_out = {
        LOGITS_NAME: ("tensor(float)", [classes]),
        PROBABILITIES_NAME: ("tensor(float)", [classes]),
    }
    for kind, found, wanted in (("input", inputs, wanted_in), ("output", outputs, wanted_out)):
        if set(found) != set(wanted):
            raise ArtifactError(f"the graph's {kind}s are {sorted(found)}, the contract has {sorted(wanted)}")
        for name, (want_type, want_shape) in wanted.items():
            got_type, got_shape = found[name]
            if got_type != want_type:
                raise ArtifactError(f"{kind} {name} is {got_type}, the contract has {want_type}")
            if not got_shape or isinstance(got_shape[0], int):
                raise ArtifactError(f"{kind} {name} has a fixed batch of {got_shape[:1]}; export it with a dynamic one")
            if got_shape[1:] != want_shape:
                raise ArtifactError(
                    f"{kind} {name} has shape {got_shape}, the manifest says [N, "
                    f"{', '.join(map(str, want_shape))}]" + (f" for {classes} labels" if kind == "output" else "")
                )


def file_entry(path: Path, *, gently: bool = False) -> FileEntry:
    """Size and SHA-256 of a file; gently, others have the CPU for half of the time (`threads.in_turns`)."""
    digest = hashlib.sha256()
    size = 0
    pieces = _pieces(path)
    for piece in threads.in_turns(pieces) if gently else pieces:
        digest.update(piece)
        size += len(piece)
    return FileEntry(sha256=digest.hexdigest(), size_bytes=size)


def versions(model_dir: Path) -> list[int]:
    """Version numbers of a model's directory, ascending. Names that are no numbers (staging) are not versions."""
    if not model_dir.is_dir():
        return []
    return sorted(int(p.name) for p in model_dir.iterdir() if is_version(p.name) and p.is_dir())


def is_version(name: str) -> bool:
    """Whether a directory's name is a version number as everybody writes it, 4 and not 04, and the API can name it."""
    return re.fullmatch(r"[1-9][0-9]{0,18}", name) is not None and int(name) <= _LARGEST_VERSION


def _pieces(path: Path) -> Iterator[memoryview]:
    """The file's bytes, all in the same buffer, one after the other."""
    with path.open("rb", buffering=0) as stream:
        buffer = memoryview(bytearray(min(_CHUNK_BYTES, path.stat().st_size + 1)))
        while count := stream.readinto(buffer):
            yield buffer[:count]


def _verify_file(path: Path, entry: FileEntry, *, gently: bool) -> None:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ArtifactError(f"{path} is no regular file; copy the version again")
        if status.st_size != entry.size_bytes:  # told at once, whatever its size is
            raise _differs(path, f"size {status.st_size} for {entry.size_bytes}")
        found = file_entry(path, gently=gently)
    except OSError as error:
        raise _unreadable(error, f"{path} is listed in the manifest but cannot be read: {error}") from error
    if found != entry:
        raise _differs(path, f"SHA-256 {found.sha256[:12]}… for {entry.sha256[:12]}…")


def _differs(path: Path, how: str) -> ArtifactError:
    return ArtifactError(
        f"{path} does not match the manifest ({how}): it is damaged or half-copied; copy the version again"
    )


def _is_path(text: str) -> bool:
    """Whether the system takes it as one: JSON can hold a NUL."""
    return bool(text) and "\0" not in text and _is_text(text)


def _is_text(text: str) -> bool:
    """Whether it is text in UTF-8: JSON can hold halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unreadable(error: OSError, message: str) -> ArtifactError:
    """Whose fault it is that a file cannot be read: the version's, or that of the moment."""
    return (ArtifactError if error.errno in _FAULTS_OF_FILES else OutOfReachError)(message)
