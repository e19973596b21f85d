"""Exit codes of the `convoy` command, and which error ends with which."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any, Self

from service.errors import ArtifactError, ConfigurationError, ConvoyError, DataError, TrainingError


class Exit(enum.IntEnum):
    """Exit codes; `meaning` says when."""

    meaning: str

    def __new__(cls, value: int, meaning: str) -> Self:
        """An integer that knows its meaning."""
        member = int.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member

    OK = 0, "everything worked"
    UNEXPECTED = 1, "a fault of the program; please report it"
    USAGE = 2, "wrong flags or settings, a missing extra, a port in use"
    BAD_INPUT = 3, "data, image or model version unusable, or training cannot go on"
    UNREACHABLE = 4, "no server answers at that address"
    REFUSED = 5, "the server answered with an error"
    PARTIAL = 6, "some images failed, the others were classified"
    INTERRUPTED = 75, "stopped by SIGTERM after writing a checkpoint; go on with --resume"
    CTRL_C = 130, "stopped by Ctrl-C; a server drains, and ends with 0"


class ServerUnreachableError(ConvoyError):
    """Nothing answers at the address."""


class ServerRefusedError(ConvoyError):
    """The server answered with an error status.

    Attributes:
        code: name of the status.
        text: its message.
        details: what it says to programs: messages `google.protobuf.Any` of the richer error model.
    """

    def __init__(self, code: str, text: str, details: Sequence[Any] = ()) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code
        self.text = text
        self.details = details


class PartialError(ConvoyError):
    """Some of several images failed."""


_TABLE: tuple[tuple[type[ConvoyError], Exit], ...] = (
    (ServerUnreachableError, Exit.UNREACHABLE),
    (ServerRefusedError, Exit.REFUSED),
    (PartialError, Exit.PARTIAL),
    (ConfigurationError, Exit.USAGE),
    (ArtifactError, Exit.BAD_INPUT),
    (DataError, Exit.BAD_INPUT),
    (TrainingError, Exit.BAD_INPUT),
)


def code_of(error: ConvoyError) -> Exit:
    """Exit code for a domain error."""
    return next((code for kind, code in _TABLE if isinstance(error, kind)), Exit.UNEXPECTED)


def table() -> str:
    """The exit codes as lines for `--help`."""
    return "\n".join(f"  {code.value:>3}  {code.meaning}" for code in Exit)
