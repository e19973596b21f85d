"""Numbers and settings in words, for the model card."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

_Z95 = 1.959963984540054  # of the normal distribution, for 95% intervals


def wilson_interval(share: float, images: int) -> tuple[float, float]:
    """The 95% interval of a share measured on so many images (Wilson, 1927)."""
    if not images:
        return 0.0, 1.0
    z2 = _Z95**2 / images
    centre = (share + z2 / 2) / (1 + z2)
    half = _Z95 / (1 + z2) * math.sqrt(share * (1 - share) / images + z2 / (4 * images))
    return max(0.0, centre - half), min(1.0, centre + half)


def reservations(images: Mapping[str, int]) -> str:
    """What the figures of held-out images do not say, if one part had to serve twice; empty if none had.

    Args:
        images: of each part: train, validation, test.
    """
    if not images["test"]:
        return (
            "The same images chose the epoch and the temperature, so new ones will be classified somewhat worse: hold "
            "out a test part for figures to rely on."
        )
    if not images["validation"]:
        return (
            "The temperature was fitted to the same images, so its figures flatter: hold out a validation part, which "
            "also chooses the best epoch."
        )
    return ""


def flattened(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and printable values of a nested mapping."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flattened(value, f"{name}.")
        elif isinstance(value, list | tuple):
            yield name, ", ".join(map(figure, value)) or "none"
        else:
            yield name, figure(value)


def figure(value: object) -> str:
    """A value for people: floats in four digits, nothing as "none", the rest as it is."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def percent(share: float) -> str:
    """0.98765 as 98.77%."""
    return f"{100 * share:.2f}%"


def short(count: int) -> str:
    """11689512 as 11.7 M; below 10,000 every digit."""
    if count < 10_000:  # noqa: PLR2004  five digits are the first that need help
        return f"{count:,}"
    power, letter = next(unit for unit in ((9, "G"), (6, "M"), (3, "k")) if count >= 10 ** unit[0])
    return f"{count / 10**power:.3g} {letter}"


def size(size_bytes: int) -> str:
    """Bytes in the largest unit that leaves a number of 1 or more."""
    amount, units = float(size_bytes), ["bytes", "KiB", "MiB", "GiB"]
    while amount >= 1024 and len(units) > 1:  # noqa: PLR2004  the next unit
        amount /= 1024
        units.pop(0)
    return f"{amount:.0f} {units[0]}" if units[0] == "bytes" else f"{amount:.1f} {units[0]}"


def first_line(error: BaseException) -> str:
    """What an error says first, or its kind: libraries put pages of advice on their own internals behind it."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
