"""Where commands print their tables."""

from __future__ import annotations

import os
import sys
import unicodedata
from typing import Any

from rich.console import Console

_COLUMNS_OF_A_PIPE = 200


def printable(text: str) -> str:
    """A name that somebody else has chosen, with escapes for what would move the cursor or change colours."""
    return "".join(
        letter.encode("unicode_escape").decode() if unicodedata.category(letter) == "Cc" else letter for letter in text
    )


def console(**options: Any) -> Console:
    """A console on stdout. Where that is no terminal, rich would cut tables at 80 columns, for nobody's sake.

    Args:
        options: of the console.
    """
    terminal = sys.stdout is not None and sys.stdout.isatty()
    width = None if terminal or "COLUMNS" in os.environ else _COLUMNS_OF_A_PIPE
    # Names of models, classes and architectures are anybody's: what looks like rich's markup in them is none.
    return Console(width=width, markup=False, **options)
