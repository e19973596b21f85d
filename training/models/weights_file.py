"""Files of weights: PyTorch checkpoints and safetensors.

Checkpoints are read with `weights_only`, so that nothing in them is executed. torchvision ends file names in the first
8 hexadecimal digits of the file's SHA-256, which is verified offline.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from service.errors import TrainingError
from training.models.registry import WEIGHTS_URL, published
from training.wording import first_line

_HASH = re.compile(r"-([0-9a-f]{8})\.(?:pth|pt|safetensors)$")
# Where training scripts put the weights among other things, torchvision's reference scripts under the first.
# PyTorch's AveragedModel counts there, beside the weights.
_AVERAGED_MODELS = "n_averaged"
_NESTED = ("model", "state_dict", "model_state_dict")
_ZIP = b"PK\x03\x04"  # how files begin that PyTorch writes since 1.6


@dataclass(frozen=True)
class WeightsFile:
    """A file in memory.

    Attributes:
        path: where it was.
        state: its tensors on the CPU, by name.
        sha256: of the file, in hexadecimal.
        verified: the name carries a hash, and the file has it.
        model: architecture and options of the model that they are from, where the file says so.
    """

    path: Path
    state: Mapping[str, Tensor]
    sha256: str
    verified: bool
    model: tuple[str, Mapping[str, Any]] | None = None


def read_weights(path: Path, *, check_hash: bool = True) -> WeightsFile:
    """Reads names and tensors without executing anything.

    Raises:
        TrainingError: the file is missing or damaged, its SHA-256 contradicts its name, or it holds other things.
    """
    try:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            wanted = _hash_in(path.name) if check_hash else None
            if wanted is not None and not digest.startswith(wanted):
                raise TrainingError(
                    f"{path} is damaged or was changed: its SHA-256 begins with {digest[:8]}, its name says {wanted}; "
                    "download it again"
                )
            stream.seek(0)
            content = _parse(path, stream)
    except OSError as error:
        source = f"; it is published at {WEIGHTS_URL}{path.name}" if published(path.name) else ""
        raise TrainingError(f"{path} cannot be read: {error.strerror or error}{source}") from error
    return WeightsFile(path, _tensors(path, content), digest, wanted is not None, _model(content))


def _hash_in(name: str) -> str | None:
    """The hash in a file name. Eight decimal digits are taken for a date, except in a name that torchvision uses."""
    found = _HASH.search(name)
    if found is None or (found[1].isdecimal() and published(name) is None):
        return None
    return found[1]


def _parse(path: Path, stream: BinaryIO) -> Any:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load(stream.read())
        if stream.read(len(_ZIP)) == _ZIP:
            check_sums(stream)
        stream.seek(0)
        with warnings.catch_warnings():
            # About plain pickles; they are read or refused all the same.
            warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)
            return torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise TrainingError(
            f"{path} is no checkpoint, or holds more than tensors and plain values, which could run code; "
            "where you trust it, save its state_dict() alone"
        ) from error
    except (RuntimeError, ValueError, EOFError, LookupError, zipfile.BadZipFile, safetensors.SafetensorError) as error:
        raise TrainingError(f"{path} is no readable checkpoint: {first_line(error)}") from error


def check_sums(archive: Path | BinaryIO) -> None:
    """PyTorch's reader looks at no checksum: weights in which bits have flipped would be taken as they are.

    Raises:
        zipfile.BadZipFile: the archive is damaged, or none.
    """
    with zipfile.ZipFile(archive) as opened:
        if damaged := opened.testzip():
            raise zipfile.BadZipFile(f"{damaged} in it is damaged")


def _is_entry(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def _instead(path: Path, content: Any) -> str:
    """What a file has that holds none where they are looked for."""
    if path.name == "last.pt" and path.with_name("best.pt").exists():
        return "; it is what a run goes on from, its weights are in best.pt beside it"
    if not isinstance(content, Mapping):
        return ""
    inside = [
        str(key) for key, value in content.items() if isinstance(value, Mapping) and any(map(_is_entry, value.items()))
    ]
    return f"; there are some under {', '.join(map(repr, inside))}: save that part alone" if inside else ""


def _model(content: Any) -> tuple[str, Mapping[str, Any]] | None:
    """What checkpoints of `convoy train` say of the model beside its weights."""
    name, options = (content.get(key) if isinstance(content, Mapping) else None for key in ("architecture", "options"))
    return (name, options) if isinstance(name, str) and isinstance(options, Mapping) else None


def _tensors(path: Path, content: Any) -> dict[str, Tensor]:
    """The names and tensors in whatever the file holds."""
    nested = (content[key] for key in _NESTED if isinstance(content, Mapping) and isinstance(content.get(key), Mapping))
    state = next(nested, content)
    if not isinstance(state, Mapping) or not state or not all(map(_is_entry, state.items())):
        places = " or ".join(_NESTED)
        raise TrainingError(
            f"{path} holds no weights: names with tensors, alone or under {places}{_instead(path, content)}"
        )
    odd = [name for name, tensor in state.items() if tensor.layout != torch.strided or tensor.is_quantized]
    if odd:
        raise TrainingError(
            f"{path} holds sparse or quantised tensors ({odd[0]} is the first of {len(odd)}); save dense ones of a "
            "floating-point type"
        )
    return {name: tensor for name, tensor in state.items() if name != _AVERAGED_MODELS}
