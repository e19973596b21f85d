import pyarrow as pa
import pytest
from pyarrow import parquet

from service.errors import DataError
from training.data import list_images
from training.listing import TEST, TRAIN, UNDECIDED, VALIDATION


def test_reads_csv_with_splits_and_other_columns(tmp_path):
    table = tmp_path / "images.csv"
    table.write_text("who,label,path,split\nme,cat,x/1.png,train\n,dog,/abs/2.png,VAL\n,cat,3.png,\n,dog,4.png,test\n")
    listing = list_images(table)
    assert listing.classes == ("cat", "dog")
    assert listing.paths == ("x/1.png", "/abs/2.png", "3.png", "4.png")
    assert listing.labels.tolist() == [0, 1, 0, 1]
    assert listing.splits.tolist() == [TRAIN, VALIDATION, UNDECIDED, TEST]
    assert str(listing.file(1)) == "/abs/2.png"
    assert listing.file(0) == tmp_path / "x/1.png"


def test_labels_that_are_numbers_are_in_the_order_of_numbers(tmp_path):
    rows = [f"{label}.png,{label}" for label in (10, 2, 0, 11, 1)]
    (tmp_path / "images.csv").write_text("\n".join(["path,label", *rows]))
    listing = list_images(tmp_path / "images.csv")
    assert listing.classes == ("0", "1", "2", "10", "11")
    assert listing.labels.tolist() == [3, 2, 0, 4, 1]


def test_a_table_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "images.csv").symlink_to("/proc/self/mem")
    with pytest.raises(DataError, match=r"images\.csv cannot be read: "):
        list_images(tmp_path / "images.csv")


def test_columns_may_be_written_in_capitals(tmp_path):
    (tmp_path / "images.csv").write_text("Path, Label ,SPLIT\n1.png,a,Test\n2.png,b,train\n")
    listing = list_images(tmp_path / "images.csv")
    assert listing.classes == ("a", "b")
    assert listing.splits.tolist() == [TEST, TRAIN]


def test_a_damaged_parquet_file_is_an_error_with_its_name(tmp_path):
    file = tmp_path / "images.parquet"
    rows = {"Path": [f"a{i}.jpg" for i in range(5000)], "LABEL": [f"{i % 2}" for i in range(5000)]}
    parquet.write_table(pa.table(rows), file, compression="snappy")
    assert list_images(file).classes == ("0", "1")  # capitals as in CSV
    content = bytearray(file.read_bytes())
    content[100:4000] = bytes(3900)
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"images\.parquet is no Parquet table"):
        list_images(file)


def test_a_path_with_a_nul_is_refused(tmp_path):
    (tmp_path / "images.csv").write_text("path,label\na\0.jpg,x\nb.jpg,y\n")
    with pytest.raises(DataError, match="NUL"):
        list_images(tmp_path / "images.csv")


def test_reads_parquet_with_number_labels(tmp_path):
    table = tmp_path / "images.parquet"
    parquet.write_table(pa.table({"path": ["1.png", "2.png"], "label": [7, 3]}), table)
    listing = list_images(table)
    assert listing.classes == ("3", "7")
    assert listing.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\n1.png,a\n", r"has no column path \(it has: file, label\)"),
        ("path,label\n1.png,a\n,b\n", "row 3: path or label is empty"),
        ('path,label\n"1\n2.png",a\n,b\n', "row 4: path or label is empty"),
        ("path,label,split\n1.png,a,dev\n", "row 2: split 'dev'"),
        ("path,label,label\n1.png,a,b\n", "more than one column label"),
        ("path,label\n", "lists no images"),
        ("path,label\n1.png,a\n2.png,a\n", r"images\.csv holds only one class \(a\)"),
        ("", "has no column path and label"),
    ],
)
def test_says_which_row_is_wrong(tmp_path, text, message):
    table = tmp_path / "images.csv"
    table.write_text(text)
    with pytest.raises(DataError, match=message):
        list_images(table)


def test_binary_files_are_no_tables(tmp_path):
    for name in ("images.csv", "images.parquet"):
        (tmp_path / name).write_bytes(b"path,label\n\xff\xfe\x00\x80")
        with pytest.raises(DataError, match=f"{name} is no"):
            list_images(tmp_path / name)
