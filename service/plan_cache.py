"""What was measured for a model version on this machine, on disk, so that the next start need not measure again.

Anything that could change the outcome is part of the key. A cache that cannot be read or written costs the measuring
and nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.artifact import ModelVersion
from service.beside import file_beside
from service.candidates import Machine, Wishes

_SCHEMA = 2


class Row(BaseModel):
    """One candidate, and what became of it.

    `images_per_second`: over all executors, at batches of `batch`, as `service.trial` measures. `difference`: largest
    one of a canary's probability. `load_s`: seconds from opening the file to the first answers. `nodes`: of the graph,
    by provider. `note`: the reason of an outcome.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    provider: str
    variant: str
    file: str
    precision: str
    executors: int
    threads: int
    outcome: Literal["chosen", "slower", "refused", "failed", "skipped"]
    load_s: float | None = None
    difference: float | None = None
    images_per_second: float | None = None
    batch: int | None = None
    nodes: dict[str, int] = {}
    note: str = ""


class Table(BaseModel):
    """The rows in the order in which they were tried; `largest_batch` of the chosen one, in images.

    `cut_at_s`: the budget that was spent before all of them could be tried; None if all were.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    rows: tuple[Row, ...]
    largest_batch: Annotated[int, Field(ge=1, le=1024)]
    seconds: float
    cut_at_s: float | None = None

    @property
    def chosen(self) -> Row:
        """The row that runs."""
        return next(row for row in self.rows if row.outcome == "chosen")


def key(version: ModelVersion, wishes: Wishes, machine: Machine) -> str:
    """Hash of everything that the outcome depends on."""
    canary = version.manifest.canary
    facts = {
        "schema": _SCHEMA,
        # What passes one canary may fail another one of the same model.
        "canary": [version.manifest.files[image].sha256 for image in canary.images],
        "probabilities": canary.probabilities,
        "input": version.manifest.input.model_dump(),
        "files": {variant.name: version.manifest.files[variant.file].sha256 for variant in version.manifest.variants},
        "tolerances": {variant.name: version.manifest.tolerance(variant.file) for variant in version.manifest.variants},
        "wishes": dataclasses.asdict(dataclasses.replace(wishes, options={}, budget_s=0.0)),
        "options": {name: dict(options) for name, options in wishes.options.items()},
        "machine": [machine.cpus, machine.cpu_name, sorted(machine.cpu_flags), machine.gpus, dict(machine.versions)],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class PlanCache:
    """Tables by key, one file each.

    Args:
        directory: made when something is written.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def read(self, name: str, budget_s: float = 0.0) -> Table | None:
        """The table of a key; None if there is none that can be used, or if a larger budget would try more."""
        try:
            table = Table.model_validate_json(self._file(name).read_bytes())
        except (OSError, ValidationError):
            return None
        if table.cut_at_s is not None and table.cut_at_s < budget_s:
            return None
        return table if any(row.outcome == "chosen" for row in table.rows) else None

    def write(self, name: str, table: Table) -> bool:
        """Keeps a table; says whether that worked. It appears whole or not at all."""
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with file_beside(self._file(name)) as beside:
                beside.write_text(table.model_dump_json(indent=2), encoding="utf-8")
        except OSError:
            return False
        return True

    def forget(self, name: str) -> None:
        """Drops a table that turned out wrong."""
        with contextlib.suppress(OSError):
            self._file(name).unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self._directory / f"{name}.json"
