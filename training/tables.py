"""Tables of images: CSV or Parquet with columns path, label and perhaps split."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from service.errors import ConfigurationError, DataError
from training.listing import SPLIT_ALIASES, UNDECIDED, Entry, Listing, in_order, listing_of

_PATH, _LABEL, _SPLIT = "path", "label", "split"


def list_table(file: Path) -> Listing:
    """Lists the images of a table; relative paths start at the table's folder.

    `split` is train, val (validation) or test; where it is empty or missing, the split is drawn. Other columns are
    ignored. Labels that are all numbers are in the order of numbers. What `training.split.write_split` wrote can be
    read.

    Raises:
        DataError: the file is no such table, or a row is incomplete; the message has the row's number.
        ConfigurationError: Parquet without pyarrow.
    """
    entries = table_entries(file)
    if not entries:
        raise DataError(f"{file} lists no images")
    return listing_of(file.parent, entries, in_order({entry.label for entry in entries}), source=file)


def table_entries(file: Path) -> list[Entry]:
    """The rows of a table; there may be none."""
    rows = _parquet_rows(file) if file.suffix.lower() in (".parquet", ".pq") else _csv_rows(file)
    return [_entry(file, number, row) for number, row in rows]


def _entry(file: Path, number: int, row: Mapping[str, Any]) -> Entry:
    path, label = (str(row.get(name) if row.get(name) is not None else "").strip() for name in (_PATH, _LABEL))
    if not path or not label:
        raise DataError(f"{file}, row {number}: path or label is empty")
    split = str(row.get(_SPLIT) or "").strip().lower()
    if split and split not in SPLIT_ALIASES:
        raise DataError(f"{file}, row {number}: split {split!r} is none of train, val, test")
    return Entry(path, label, SPLIT_ALIASES[split] if split else UNDECIDED)


def _csv_rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
            reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
            _check_columns(file, reader.fieldnames)
            for row in reader:
                yield reader.line_num, row  # as an editor counts: the header is line 1
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} is no CSV table of images: {error}") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error


def _parquet_rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise ConfigurationError(f"reading {file} needs pyarrow: pip install pyarrow, or give a CSV") from None
    try:
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            plain = [str(name).strip().lower() for name in names]  # as in CSV
            _check_columns(file, plain)
            wanted = {names[plain.index(name)]: name for name in (_PATH, _LABEL, _SPLIT) if name in plain}
            number = 0
            for batch in table.iter_batches(columns=list(wanted)):
                for row in batch.to_pylist():
                    number += 1
                    yield number, {wanted[name]: value for name, value in row.items()}
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{file} is no Parquet table: {error}") from error


def _check_columns(file: Path, names: Any) -> None:
    twice = [name for name in (_PATH, _LABEL, _SPLIT) if list(names).count(name) > 1]
    if twice:
        raise DataError(f"{file} has more than one column {twice[0]}; leave one of them")
    missing = [name for name in (_PATH, _LABEL) if name not in names]
    if missing:
        raise DataError(
            f"{file} has no column {' and '.join(missing)} (it has: {', '.join(map(str, names)) or 'none'}); "
            "a table of images needs path and label, and may have split"
        )
