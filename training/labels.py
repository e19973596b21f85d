"""Names of classes from a text file, one on each line."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from service.errors import DataError


def read_labels(path: Path) -> tuple[str, ...]:
    """One class per line; names that occur again get their index, as ImageNet's two cranes need it.

    Raises:
        DataError: the file cannot be read, has an empty line between two classes, or fewer than two classes.
    """
    try:
        text = path.read_text(encoding="utf-8-sig").rstrip()  # CR and CRLF are LF already
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the labels {path} cannot be read: {error}; give a UTF-8 text with one class per line"
        ) from None
    # Not splitlines, which takes U+2028, U+0085 or a form feed within a name for the end of a line too.
    lines = [line.strip() for line in text.split("\n")] if text else []
    if "" in lines:
        raise DataError(f"{path} has an empty line at {lines.index('') + 1}; every line is the name of a class")
    if len(lines) < 2:  # noqa: PLR2004  a classifier tells at least two things apart
        raise DataError(f"{path} has {len(lines)} lines; a classifier needs two classes, one per line")
    count = Counter(lines)
    names = tuple(f"{name} ({i})" if count[name] > 1 else name for i, name in enumerate(lines))
    if len(set(names)) < len(names):
        raise DataError(f"{path} has names that occur again, and already has what would tell them apart; rename them")
    return names
