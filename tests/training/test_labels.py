"""Names of classes from a file, as people's editors write it."""

import pytest

from service.errors import DataError
from training.labels import read_labels


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\n\nb", "empty line at 2"),
        ("a\n", "has 1 lines"),
        ("", "has 0 lines"),
        ("a\na\na (0)\n", "rename them"),
    ],
)
def test_labels_that_are_no_list_of_classes_are_refused(tmp_path, text, message):
    path = tmp_path / "labels.txt"
    path.write_text(text)

    with pytest.raises(DataError, match=message):
        read_labels(path)


def test_missing_and_binary_labels_are_named(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")

    for name in ("missing", "binary"):
        with pytest.raises(DataError, match=f"{name} cannot be read"):
            read_labels(tmp_path / name)


def test_equal_labels_are_told_apart_by_their_index(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("crane\r\nowl\r\ncrane\r\n", encoding="utf-8-sig")

    assert read_labels(path) == ("crane (0)", "owl", "crane (2)")


@pytest.mark.parametrize("between", ["\u2028", "\u0085", "\f", "\v"])
def test_only_ends_of_lines_end_a_label(tmp_path, between):
    path = tmp_path / "labels.txt"
    path.write_bytes(f"whooping{between}crane\r\nowl\rdove\nfinch\n".encode())

    assert read_labels(path) == (f"whooping{between}crane", "owl", "dove", "finch")
