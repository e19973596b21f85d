import pickle
import random
import resource
from contextlib import suppress

import pytest
import torch

from service.errors import DataError, TrainingError
from training import checkpoint


def test_what_was_saved_is_loaded(tmp_path):
    state = {"weights": {"a": torch.arange(3.0)}, "history": [{"loss": 1.5}], "best": (0.5, -1.0), "none": None}
    checkpoint.save(tmp_path / "last.pt", state)
    loaded = checkpoint.load(tmp_path / "last.pt")
    assert torch.equal(loaded["weights"]["a"], torch.arange(3.0))
    assert {key: loaded[key] for key in ("history", "best", "none")} == {
        "history": [{"loss": 1.5}],
        "best": (0.5, -1.0),
        "none": None,
    }


def test_only_the_finished_file_is_there(tmp_path):
    for value in (1, 2):
        checkpoint.save(tmp_path / "last.pt", {"value": value})
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]
    assert checkpoint.load(tmp_path / "last.pt")["value"] == 2


def test_what_a_killed_process_left_is_gone_with_the_next_checkpoint(tmp_path):
    for name in (".last.pt.writing-1", ".best.pt.writing-1"):
        (tmp_path / name).write_bytes(b"half")
    checkpoint.save(tmp_path / "last.pt", {"value": 1})
    assert sorted(file.name for file in tmp_path.iterdir()) == [".best.pt.writing-1", "last.pt"]


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path):
    checkpoint.save(tmp_path / "last.pt", {"value": 1})
    with pytest.raises((TrainingError, AttributeError, pickle.PicklingError)):
        checkpoint.save(tmp_path / "last.pt", {"value": lambda: None})
    assert checkpoint.load(tmp_path / "last.pt")["value"] == 1


def test_a_folder_that_is_gone_is_an_error_with_the_path(tmp_path):
    with pytest.raises(TrainingError, match="nowhere"):
        checkpoint.save(tmp_path / "nowhere" / "last.pt", {})


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_code_in_a_checkpoint_is_not_executed(tmp_path, capsys):
    torch.save({"format": 1, "evil": Evil()}, tmp_path / "last.pt")
    with pytest.raises(DataError, match="no readable checkpoint"):
        checkpoint.load(tmp_path / "last.pt")
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a zip"])
def test_damaged_files_are_an_error_with_the_path(tmp_path, content):
    (tmp_path / "last.pt").write_bytes(content)
    with pytest.raises(DataError, match=r"last\.pt is no readable checkpoint"):
        checkpoint.load(tmp_path / "last.pt")


def test_missing_and_foreign_files_are_told_apart(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        checkpoint.load(tmp_path / "last.pt")
    torch.save({"format": 99}, tmp_path / "last.pt")
    with pytest.raises(DataError, match="format 99"):
        checkpoint.load(tmp_path / "last.pt")


def test_a_full_disk_is_said_in_the_words_of_the_operating_system(tmp_path):
    """PyTorch reports it as an "enforce fail" of its archive writer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(TrainingError, match="cannot be written: File too large; make room and start again"):
            checkpoint.save(tmp_path / "last.pt", {"value": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_with_any_flipped_bit_is_damaged_or_as_it_was(tmp_path):
    file = tmp_path / "last.pt"
    checkpoint.save(file, {"step": 1, "model": {"a": torch.arange(100)}})
    whole, draws, found = file.read_bytes(), random.Random(0), []
    for _ in range(600):
        damaged = bytearray(whole)
        damaged[draws.randrange(len(whole))] ^= 1 << draws.randrange(8)
        file.write_bytes(damaged)
        with suppress(DataError):
            found.append(checkpoint.load(file))
    assert len(found) < 300  # where there is nothing but padding, or what the archive's reader does not need
    assert all(state["step"] == 1 and torch.equal(state["model"]["a"], torch.arange(100)) for state in found)
