import os
import time

import pytest

from service.beside import file_beside, folder_beside, name_beside, remove_leftovers


def aged(path, hours):
    """A file, or the folder of one, that was last written so long ago."""
    then = time.time() - 3600 * hours
    for each in (*(path.iterdir() if path.is_dir() else ()), path):
        os.utime(each, (then, then))
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_its_place_when_it_is_finished(tmp_path):
    (tmp_path / "figures").write_text("old")
    with file_beside(tmp_path / "figures") as beside:
        beside.write_text("new")
        assert (tmp_path / "figures").read_text() == "old"

    assert (tmp_path / "figures").read_text() == "new"
    assert names(tmp_path) == ["figures"]


def test_of_a_file_that_fails_nothing_is_left_but_the_old_one(tmp_path):
    def fail():
        with file_beside(tmp_path / "figures") as beside:
            beside.write_text("half")
            raise KeyError

    (tmp_path / "figures").write_text("old")
    with pytest.raises(KeyError):
        fail()

    assert (tmp_path / "figures").read_text() == "old"
    assert names(tmp_path) == ["figures"]


def test_a_folder_takes_its_place_when_it_is_finished(tmp_path):
    with folder_beside(tmp_path / "images") as beside:
        (beside / "pixels").write_text("x")
        assert not (tmp_path / "images").exists()

    assert names(tmp_path) == ["images"]
    assert names(tmp_path / "images") == ["pixels"]


def test_a_folder_never_takes_the_place_of_one_that_is_there(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "theirs").touch()
    with pytest.raises(OSError, match="not empty"), folder_beside(tmp_path / "images") as beside:
        (beside / "mine").touch()

    assert names(tmp_path) == ["images"]
    assert names(tmp_path / "images") == ["theirs"]


def test_two_writers_of_a_name_never_meet_whatever_their_process_is_called(tmp_path):
    with file_beside(tmp_path / "figures") as first, file_beside(tmp_path / "figures") as second:
        first.write_text("first")
        second.write_text("second")
        assert first != second

    assert (tmp_path / "figures").read_text() == "first"


def test_what_was_left_is_removed_after_a_day_be_it_file_or_folder(tmp_path):
    for name, hours in (("old", 25), ("young", 23)):
        file, folder = (name_beside(tmp_path / f"{name} {kind}") for kind in ("file", "folder"))
        file.touch()
        folder.mkdir()
        (folder / "half").touch()
        aged(file, hours)
        aged(folder, hours)
    remove_leftovers(tmp_path)

    assert [name.rpartition(".")[0] for name in names(tmp_path)] == [".young file", ".young folder"]


def test_a_folder_in_which_something_is_written_is_not_left(tmp_path):
    folder = name_beside(tmp_path / "images")
    folder.mkdir()
    (folder / "pixels").touch()
    then = time.time() - 48 * 3600
    os.utime(folder, (then, then))
    remove_leftovers(tmp_path)

    assert folder.exists()


@pytest.mark.parametrize("made", [file_beside, folder_beside])
def test_every_writer_removes_what_others_left(tmp_path, made):
    left = name_beside(tmp_path / "another")
    left.touch()
    aged(left, 25)
    with made(tmp_path / "one") as beside:
        beside.touch()

    assert names(tmp_path) == ["one"]


def test_the_only_writer_of_a_file_need_not_wait_for_what_it_left(tmp_path):
    mine, another = name_beside(tmp_path / "last[1].pt"), name_beside(tmp_path / "best.pt")
    mine.touch()
    another.touch()
    with file_beside(tmp_path / "last[1].pt", sole_writer=True) as beside:
        beside.touch()

    assert names(tmp_path) == [another.name, "last[1].pt"]
