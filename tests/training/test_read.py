from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from service.artifact import InputSpec
from service.errors import DataError
from service.preprocess import preprocess
from training.data import list_images
from training.read import check_classes, count_channels, read_images

SPEC = InputSpec(height=16, width=16, channels=1)


def save(path, seed, mode="L", side=24, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)


def test_pixels_are_those_that_the_service_sees(tmp_path):
    for number, label in enumerate(("a", "a", "b")):
        save(tmp_path / label / f"{number}.jpg", number, "RGB", side=40, quality=90)
    spec = InputSpec(height=16, width=16, channels=3)
    dataset, faults = read_images(list_images(tmp_path), spec)
    assert not faults
    for row in range(3):
        expected = preprocess(dataset.listing.file(row).read_bytes(), spec)
        np.testing.assert_array_equal(dataset.images[row], expected)


def test_faulty_files_are_reported_by_path_and_left_out(tmp_path):
    for number in range(4):
        save(tmp_path / "a" / f"{number}.png", number)
        save(tmp_path / "b" / f"{number}.png", 10 + number)
    (tmp_path / "a" / "text.jpg").write_text("hello")
    (tmp_path / "a" / "empty.png").write_bytes(b"")
    whole = (tmp_path / "b" / "0.png").read_bytes()
    (tmp_path / "b" / "cut.png").write_bytes(whole[: len(whole) // 2])
    save(tmp_path / "b" / "tiny.png", 99, side=3)
    (tmp_path / "b" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    done = []
    dataset, faults = read_images(list_images(tmp_path), SPEC, min_side_pixels=4, advance=done.append)
    assert {fault.path: fault.reason for fault in faults} == {
        "a/text.jpg": "unsupported_format",
        "a/empty.png": "empty",
        "b/cut.png": "corrupt",
        "b/tiny.png": "tiny",
        "b/gone.png": "unreadable",
    }
    assert len(dataset) == 8
    assert sum(done) == 13
    assert np.bincount(dataset.labels[dataset.usable]).tolist() == [4, 4]


@pytest.mark.parametrize("segment", [b"\xff\xee\x00\x07Adobe", b"\xff\xe0\x00\x07JFIF\x00"])
def test_a_file_that_pillow_refuses_and_the_service_reads_is_used(tmp_path, segment):
    for label in "ab":
        save(tmp_path / label / "0.jpg", 0)
    odd = tmp_path / "a" / "0.jpg"
    odd.write_bytes(odd.read_bytes()[:2] + segment + odd.read_bytes()[2:])
    with pytest.raises(OSError, match="cannot identify"):
        Image.open(odd)
    dataset, faults = read_images(list_images(tmp_path), SPEC, min_side_pixels=4)

    assert not faults
    np.testing.assert_array_equal(dataset.images[0], dataset.images[1])


def test_a_class_without_a_usable_file_stops_with_an_example(tmp_path):
    save(tmp_path / "a" / "1.png", 1)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.jpg").write_text("hello")
    with pytest.raises(DataError, match=r"no usable image of class b .*b/x\.jpg"):
        check_classes(*read_images(list_images(tmp_path), SPEC))


def test_the_digest_follows_content_and_labels_but_not_faults(tmp_path):
    for number, label in enumerate("aabb"):
        save(tmp_path / label / f"{number}.png", number)
    first, _ = read_images(list_images(tmp_path), SPEC)
    (tmp_path / "a" / "bad.png").write_bytes(b"bad")
    with_fault, _ = read_images(list_images(tmp_path), SPEC)
    assert with_fault.digest() == first.digest()
    (tmp_path / "a" / "1.png").rename(tmp_path / "b" / "1.png")
    moved, _ = read_images(list_images(tmp_path), SPEC)
    assert moved.digest() != first.digest()


def test_the_digest_follows_the_split_that_a_table_gives(tmp_path):
    table, digests = tmp_path / "images.csv", []
    for number in range(4):
        save(tmp_path / f"{number}.png", number)
    for parts in (("train", "test"), ("test", "train"), ("", "")):
        rows = [f"{number}.png,{'ab'[number // 2]},{parts[number % 2]}\n" for number in range(4)]
        table.write_text("path,label,split\n" + "".join(rows))
        digests.append(read_images(list_images(table), SPEC)[0].digest())
    table.write_text("path,label\n" + "".join(f"{number}.png,{'ab'[number // 2]}\n" for number in range(4)))
    assert len(set(digests)) == 3
    assert read_images(list_images(table), SPEC)[0].digest() == digests[-1]


@pytest.mark.parametrize(("modes", "channels"), [("LL", 1), (("L", "RGB"), 3), (("1", "LA"), 1)])
def test_channels_are_one_only_if_all_images_are_gray(tmp_path, modes, channels):
    for number, mode in enumerate(modes):
        save(tmp_path / "ab"[number] / "x.png", number, mode)
    assert count_channels(list_images(tmp_path)) == channels


def test_channels_are_counted_past_odd_and_huge_files(tmp_path):
    for label in "ab":
        save(tmp_path / label / "1.png", 1)
        (tmp_path / label / "odd.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 40)
    Image.new("1", (12_000, 12_000)).save(tmp_path / "a" / "huge.png")
    listing = list_images(tmp_path)
    assert count_channels(listing) == 1  # without Pillow's warning of a decompression bomb
    _, faults = read_images(listing, SPEC)
    assert {fault.path: fault.reason for fault in faults} == {
        "a/huge.png": "too_large",
        "a/odd.png": "corrupt",
        "b/odd.png": "corrupt",
    }


def test_formats_that_cannot_be_read_are_left_out_with_their_paths(tmp_path):
    for label in "ab":
        save(tmp_path / label / "1.png", ord(label))
    save(tmp_path / "a" / "scan.tif", 3)
    _, faults = read_images(list_images(tmp_path), SPEC)
    assert [(fault.path, fault.reason) for fault in faults] == [("a/scan.tif", "unsupported_format")]


def test_an_image_of_the_least_side_is_used(tmp_path):
    for label in "ab":
        (tmp_path / label).mkdir()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 9), dtype=np.uint8)).save(
            tmp_path / label / "0.png"
        )
    assert not read_images(list_images(tmp_path), SPEC, min_side_pixels=4)[1]
    assert len(read_images(list_images(tmp_path), SPEC, min_side_pixels=5)[1]) == 2


def test_images_with_a_palette_are_coloured(tmp_path):
    for label in "ab":
        (tmp_path / label).mkdir()
        pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert("P").save(tmp_path / label / "0.png")
    assert count_channels(list_images(tmp_path)) == 3


def test_other_labels_contents_paths_or_parts_are_other_data(tmp_path):
    for label in "ab":
        (tmp_path / label).mkdir()
        for number in range(2):
            pixels = np.random.default_rng([ord(label), number]).integers(0, 256, (9, 9), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / label / f"{number}.png")
    data, _ = read_images(list_images(tmp_path), SPEC)
    listing = data.listing
    others = [
        replace(data, listing=replace(listing, labels=listing.labels[[0, 2, 1, 3]])),
        replace(data, listing=replace(listing, splits=np.array([0, 0, 0, 2], np.int8))),
        replace(data, listing=replace(listing, paths=(*listing.paths[:3], "b/2.png"))),
        replace(data, digests=data.digests[[1, 0, 2, 3]]),
        data.without([3]),
    ]
    digests = {found.digest() for found in (data, *others)}
    assert len(digests) == 6
