"""What pydantic finds wrong with settings and files, in words for people."""

from __future__ import annotations

from collections.abc import Mapping

_OURS = "Value error, "  # what pydantic puts before the message of a validator


def message(error: Mapping[str, object]) -> str:
    """What is wrong, of one of `ValidationError.errors()`."""
    return str(error["msg"]).removeprefix(_OURS)


def value(error: Mapping[str, object]) -> str:
    """What was given; empty for a whole section, which would bury the message."""
    given = error["input"]
    return "" if isinstance(given, Mapping) else repr(given)
