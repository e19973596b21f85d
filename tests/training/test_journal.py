import csv

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training.journal import Journal

HISTORY = [{"epoch": 1.0, "train_loss": 2.0}, {"epoch": 2.0, "train_loss": 1.0, "val_accuracy": 0.5}]


def test_the_log_has_a_row_per_epoch_and_empty_cells_for_what_is_missing(tmp_path):
    journal = Journal(tmp_path, tensorboard=False)
    for count in (1, 2):
        journal.write(HISTORY[:count])
    journal.close()
    with (tmp_path / "log.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["train_loss"] for row in rows] == ["2.0", "1.0"]
    assert [row["val_accuracy"] for row in rows] == ["", "0.5"]
    assert [file.name for file in tmp_path.iterdir()] == ["log.csv"]


def test_tensorboard_gets_the_same_figures(tmp_path):
    journal = Journal(tmp_path, tensorboard=True)
    for count in (1, 2):
        journal.write(HISTORY[:count])
    journal.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train_loss")] == [(1, 2.0), (2, 1.0)]
