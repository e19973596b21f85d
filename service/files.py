"""Files of a folder that a user means when naming it."""

from __future__ import annotations

from pathlib import Path

IMAGES = frozenset({".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".webp"})
# What people take for images, too, and nothing here decodes: better told than passed over.
OTHER_PICTURES = frozenset(
    {".avif", ".cr2", ".dng", ".heic", ".heif", ".jp2", ".jxl", ".nef", ".pgm", ".ppm", ".raw", ".svg", ".tif", ".tiff"}
)


def visible_below(folder: Path) -> list[Path]:
    """Files below a folder but the hidden ones, which a Mac puts beside every image; sorted."""
    paths = (p for p in folder.rglob("*") if not any(part.startswith(".") for part in p.relative_to(folder).parts))
    return sorted(p for p in paths if p.is_file())
