import os

import pytest

from service.errors import DataError
from training.data import list_images
from training.listing import TEST, TRAIN, UNDECIDED, VALIDATION


def make(root, *names):
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"any")


def test_lists_a_folder_per_class_in_sorted_order(tmp_path):
    make(tmp_path, "b/2.png", "b/1.JPG", "a/deep/3.webp", "a/.hidden.png", "a/notes.txt", ".git/x/y.png")
    listing = list_images(tmp_path)
    assert listing.classes == ("a", "b")
    assert listing.paths == ("a/deep/3.webp", "b/1.JPG", "b/2.png")
    assert listing.labels.tolist() == [0, 1, 1]
    assert set(listing.splits.tolist()) == {UNDECIDED}
    assert listing.file(0) == tmp_path / "a/deep/3.webp"


def test_takes_over_the_parts_of_a_folder_that_has_them(tmp_path):
    make(tmp_path, "train/a/1.png", "train/b/2.png", "val/a/3.png", "test/b/4.png")
    listing = list_images(tmp_path)
    found = dict(zip(listing.paths, listing.splits.tolist(), strict=True))
    assert found == {
        "train/a/1.png": TRAIN,
        "train/b/2.png": TRAIN,
        "val/a/3.png": VALIDATION,
        "test/b/4.png": TEST,
    }
    assert [listing.classes[k] for k in listing.labels] == ["b", "a", "b", "a"]  # test, train, val


def test_a_single_folder_called_train_is_a_class(tmp_path):
    make(tmp_path, "train/1.png", "bus/2.png")
    assert list_images(tmp_path).classes == ("bus", "train")


def test_folders_without_images_beside_the_parts_are_no_matter(tmp_path):
    make(tmp_path, "train/a/1.png", "train/b/2.png", "val/a/3.png", "docs/readme.md", "labels.csv")
    assert len(list_images(tmp_path)) == 3


def test_a_class_called_train_may_have_folders_of_its_own(tmp_path):
    make(tmp_path, "train/steam/1.png", "bus/electric/2.png")
    assert list_images(tmp_path).classes == ("bus", "train")


def test_a_class_that_only_the_test_part_has_is_refused(tmp_path):
    make(tmp_path, "train/a/1.png", "train/b/2.png", "test/c/3.png")
    with pytest.raises(DataError, match=r"classes that the training part lacks: c"):
        list_images(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "holds no images"),
        (["1.png", "2.png"], "holds 2 images but no folders"),
        (["a/1.png"], r"only one class \(a\)"),
        (["a/1.png", "b/notes.txt"], "no images in b"),
        (
            ["a/1.png", "b/2.png", "4.png", "3.png"],
            r"beside the folders of the classes \(2, such as 3\.png\); put each",
        ),
        (["train/a/1.png", "train/b/2.png", "val/a/3.png", "4.png"], r"beside the folders of the parts \(1, such as 4"),
        (["train/a/1.png", "train/b/2.png", "val/a/3.png", "val/4.png"], r"val has images beside .* classes \(1, such"),
        (["train/a/1.png", "train/b/2.png", "val/a/3.png", "dev/a/4.png"], r"images in dev; parts are called train, "),
        (["train/a/1.png", "train/b/2.png", "dev/a/3.png"], "train, dev hold folders of the same names, as parts"),
    ],
)
def test_says_what_is_wrong_with_a_folder(tmp_path, names, message):
    make(tmp_path, *names)
    with pytest.raises(DataError, match=message):
        list_images(tmp_path)


def test_a_missing_source_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere does not exist"):
        list_images(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["photos.zip", "photos.tar.gz", "shards.TAR"])
def test_an_archive_is_to_be_unpacked(tmp_path, name):
    make(tmp_path, name)
    with pytest.raises(DataError, match=rf"{name} is an archive; unpack it"):
        list_images(tmp_path / name)


def test_links_are_followed_but_not_in_circles(tmp_path):
    make(tmp_path, "photos/a/1.png", "photos/b/2.png", "elsewhere/deep/3.png")
    (tmp_path / "photos/a/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos/a/again").symlink_to(tmp_path / "photos/a")
    (tmp_path / "photos/b/up").symlink_to(tmp_path / "photos/b")
    (tmp_path / "photos/b/itself.png").symlink_to(tmp_path / "photos/b/itself.png")
    assert list_images(tmp_path / "photos").paths == ("a/1.png", "a/more/deep/3.png", "b/2.png", "b/itself.png")


def test_names_may_be_of_any_script_but_have_to_be_text(tmp_path):
    make(tmp_path, "café au lait/1 (2).png", "\u732b/\U0001f431.jfif", 'a\nb, "c"/1.png')
    listing = list_images(tmp_path)
    assert listing.classes == ('a\nb, "c"', "café au lait", "\u732b")
    make(tmp_path, os.fsdecode(b"caf\xe9/1.png"))
    with pytest.raises(DataError, match=r"caf\\udce9/1\.png' is not in UTF-8; rename"):
        list_images(tmp_path)


def test_pictures_that_cannot_be_read_are_listed_to_be_reported(tmp_path):
    make(tmp_path, "a/1.png", "a/2.HEIC", "a/3.tif", "b/4.png", "b/readme.md")
    assert list_images(tmp_path).paths == ("a/1.png", "a/2.HEIC", "a/3.tif", "b/4.png")


def test_packed_shards_are_to_be_unpacked(tmp_path):
    make(tmp_path, "train-0.tar.gz", "train-1.tar.gz")
    with pytest.raises(DataError, match=r"but train-0\.tar\.gz, train-1\.tar\.gz; unpack that"):
        list_images(tmp_path)


def test_the_training_part_alone_is_split_as_a_folder_of_classes(tmp_path):
    make(tmp_path, *(f"train/{name}/{n}.png" for name in ("cat", "dog") for n in range(3)))
    listing = list_images(tmp_path)
    assert listing.classes == ("cat", "dog")
    assert listing.paths[0] == "train/cat/0.png"


def test_a_part_beside_the_classes_is_no_class(tmp_path):
    make(tmp_path, "cat/1.png", "dog/2.png", "test/cat/3.png", "test/dog/4.png")
    with pytest.raises(DataError, match="test holds folders of the names of those beside it"):
        list_images(tmp_path)


def test_names_that_look_the_same_are_told(tmp_path):
    make(tmp_path, "K\u00e4fer/1.png", "Ka\u0308fer/2.png")
    with pytest.raises(DataError, match=r"two classes 'K.*fer' and 'K.*fer', which look the same"):
        list_images(tmp_path)
