"""Finding the images: which files there are, and which class each belongs to. Nothing is decoded here.

Three layouts are understood: a folder per class; such folders below `train`, `val` and `test`; and a table, CSV or
Parquet, with columns path, label and perhaps split (`training.tables`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from service.errors import DataError
from service.files import IMAGES
from training.listing import SPLIT_ALIASES, TRAIN, Entry, Listing, is_image, listing_of
from training.tables import list_table

_ARCHIVES = frozenset({".7z", ".bz2", ".gz", ".rar", ".tar", ".tgz", ".xz", ".zip", ".zst"})
_PARTS_ARE = f"parts are called {', '.join(SPLIT_ALIASES)}"


def list_images(source: Path) -> Listing:
    """Lists the images of a folder or a table.

    Hidden files and files without an image's suffix are ignored.

    Raises:
        DataError: the source is missing, holds no images or fewer than two classes, its parts disagree on classes, or
            there are images outside of classes and parts.
    """
    if source.is_file():
        if source.suffix.lower() in _ARCHIVES:
            raise DataError(
                f"{source} is an archive; unpack it and give the folder (tar shards: the folder they are in)"
            )
        return list_table(source)
    if not source.is_dir():
        raise DataError(f"{source} does not exist; give a folder that holds one folder of images per class, or a CSV")
    folders = _folders(source)
    parts = {name: SPLIT_ALIASES[name.lower()] for name in folders if name.lower() in SPLIT_ALIASES}
    if TRAIN in parts.values() and (len(parts) > 1 or folders == list(parts)):
        _check_parts(source, [name for name in folders if name not in parts])
        return _list_parts(source, parts)
    if TRAIN in parts.values():
        _check_no_parts(source, next(iter(parts)), folders)
    _check_no_part_among(source, parts, folders)
    found = {name: sorted(_walk(source / name, name)) for name in folders}
    _check_folders(source, found)
    return listing_of(source, [Entry(path, name) for name, paths in found.items() for path in paths])


def _list_parts(root: Path, parts: Mapping[str, int]) -> Listing:
    """Folders `train`, `val`, `test`, each with a folder per class."""
    entries, trained = [], set(_folders(root / next(n for n, p in parts.items() if p == TRAIN)))
    for part, split in parts.items():
        found = {name: sorted(_walk(root / part / name, f"{part}/{name}")) for name in _folders(root / part)}
        _check_folders(root / part, found)
        unknown = sorted(set(found) - trained)
        if unknown:
            raise DataError(f"{root / part} has classes that the training part lacks: {_some(unknown)}")
        entries += [Entry(path, name, split) for name, paths in found.items() for path in paths]
    return listing_of(root, entries)


def _check_parts(root: Path, others: Sequence[str]) -> None:
    """What lies beside the parts would be left out without a word."""
    unknown = [name for name in others if any(_walk(root / name, name))]
    if unknown:
        raise DataError(
            f"{root} has parts of a split and beside them images in {_some(unknown)}; {_PARTS_ARE}; rename the folder "
            "or move it elsewhere"
        )
    _check_loose(root, "the folders of the parts")


def _check_no_parts(root: Path, train: str, folders: Sequence[str]) -> None:
    """A part of another name is no class, and neither is the training part beside it."""
    classes, others = set(_folders(root / train)), [name for name in folders if name != train]
    below = [set(_folders(root / name)) for name in others]
    if others and all(names and names <= classes for names in below):
        raise DataError(
            f"{root}: {_some([train, *others])} hold folders of the same names, as parts of a split do; {_PARTS_ARE}; "
            "rename the folders, or give a CSV if they are classes"
        )


def _check_no_part_among(root: Path, parts: Mapping[str, int], folders: Sequence[str]) -> None:
    """A folder `test` beside the classes that holds those classes again is no class of its own."""
    classes = {name for name in folders if name not in parts}
    for part in parts:
        if (below := set(_folders(root / part))) and below <= classes:
            raise DataError(
                f"{root}: {part} holds folders of the names of those beside it, as a part of a split does; put those "
                f"beside it into {root / 'train'}, or give a CSV if {part} is a class"
            )


def _check_loose(root: Path, beside: str) -> None:
    loose = sorted(entry.name for entry in _entries(root) if is_image(entry.name) and not _is_folder(entry))
    if loose:
        raise DataError(
            f"{root} has images beside {beside} ({len(loose)}, such as {loose[0]}); put each into the folder of its "
            "class, or elsewhere"
        )


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in _entries(folder) if _is_folder(entry))


def _walk(folder: Path, prefix: str, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Images below a folder; a link to a folder is followed, but not to one that it lies in."""
    place = os.path.realpath(folder)
    if place in above:
        return
    for entry in _entries(folder):
        if _is_folder(entry):
            yield from _walk(folder / entry.name, f"{prefix}/{entry.name}", (*above, place))
        elif is_image(entry.name):
            yield f"{prefix}/{entry.name}"


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is not hidden."""
    try:
        with os.scandir(folder) as found:
            return [entry for entry in found if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}; mend its permissions or remove it") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself; as an image it will be reported
        return False


def _check_folders(root: Path, found: Mapping[str, Sequence[str]]) -> None:
    layout = f"put the images of each class into a folder of its own: {root}/<class>/<image>"
    if not any(found.values()):
        loose = sum(is_image(entry.name) for entry in _entries(root))
        if loose:
            raise DataError(f"{root} holds {loose} images but no folders of images; {layout}")
        packed = [entry.name for entry in _entries(root) if Path(entry.name).suffix.lower() in _ARCHIVES]
        if packed:
            raise DataError(
                f"{root} holds no images, but {_some(packed)}; unpack that (tar shards: only the compression)"
            )
        raise DataError(f"{root} holds no images ({', '.join(sorted(IMAGES))}); {layout}")
    empty = [name for name, paths in found.items() if not paths]
    if empty:
        raise DataError(f"{root}: no images in {_some(empty)}; add images or remove the folder")
    _check_loose(root, "the folders of the classes")


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
