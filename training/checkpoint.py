"""Checkpoints: all of a run's state, written atomically and read without executing anything."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from service.beside import file_beside
from service.errors import DataError, TrainingError
from training.folders import make_room
from training.models.weights_file import check_sums
from training.wording import first_line

FORMAT = 1


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint of tensors and plain values; a crash leaves either the old file or the new one.

    Raises:
        TrainingError: it cannot be written (disk full, permissions).
    """
    try:
        # What a killed process has left is as large as the checkpoint, and nobody else writes to a run's folder.
        with file_beside(path, sole_writer=True) as beside, beside.open("wb") as stream:
            torch.save({"format": FORMAT, **state}, stream)
            stream.flush()
            os.fsync(stream.fileno())
    except (OSError, RuntimeError) as error:
        raise TrainingError(
            f"checkpoint {path} cannot be written: {_reason(error)}; {make_room(path.parent)}"
        ) from error


def _reason(error: BaseException) -> str:
    """Behind PyTorch's "enforce fail" stands what the operating system said: a full disk, mostly."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause.strerror or str(cause)
        cause = cause.__cause__ or cause.__context__
    return first_line(error)


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint with `weights_only`: tensors and plain values, no code.

    Raises:
        DataError: it is missing, damaged, or of another format.
    """
    try:
        check_sums(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; there is no run to go on with") from None
    except Exception as error:  # on damaged bytes both readers raise nearly everything
        raise DataError(f"{path} is no readable checkpoint: {first_line(error)}") from error
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise DataError(f"{path} is a checkpoint of format {found!r}, this program reads {FORMAT}")
    return dict(state)
