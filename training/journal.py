"""Figures per epoch in `log.csv`, and for TensorBoard if it is asked for."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from service.beside import file_beside
from training.folders import writing

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

LOG = "log.csv"


class Journal:
    """Writes one run's figures. The file is made from the whole history each time, so a resumed run has no seams."""

    def __init__(self, folder: Path, *, tensorboard: bool, first_epoch: int = 0) -> None:
        self._file = folder / LOG
        self._writer = _summary_writer(folder / "tensorboard", first_epoch) if tensorboard else None

    def write(self, history: Sequence[Mapping[str, float]]) -> None:
        """Rewrites `log.csv`, and adds the newest epoch to TensorBoard."""
        columns = list(dict.fromkeys(name for figures in history for name in figures))
        with (
            writing(self._file.parent),
            file_beside(self._file, sole_writer=True) as beside,
            beside.open("w", encoding="utf-8", newline="") as stream,
        ):
            rows = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
            rows.writeheader()
            rows.writerows(history)
        if self._writer:
            newest = history[-1]
            for name, value in newest.items():
                self._writer.add_scalar(name, value, int(newest["epoch"]))
            self._writer.flush()

    def close(self) -> None:
        """Closes TensorBoard's file."""
        if self._writer:
            self._writer.close()


def _summary_writer(folder: Path, first_epoch: int) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter

    # Epochs after the checkpoint that an interrupted run had already written are hidden.
    return SummaryWriter(folder, purge_step=first_epoch + 1 if first_epoch else None)
