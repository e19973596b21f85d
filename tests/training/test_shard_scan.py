import os
import shutil
import time
import tracemalloc

import numpy as np
import pytest
from tar_shards import SPEC, numbered, png, scanned, seen, source_of, write_shard

from service.errors import DataError
from service.preprocess import preprocess
from training.listing import TEST, TRAIN, VALIDATION
from training.shard_columns import DIGEST_BYTES, Columns, Seen
from training.shards import find_shards, read_shard


def test_keys_that_start_again_in_each_shard_are_samples_of_their_own(tmp_path):
    held_out = {}
    for number in range(3):
        samples = [(f"{i:04d}", png(100 * number + i), (number + i) % 3) for i in range(40)]
        samples += [(samples[0][0], png(100 * number + 50), number)]  # and within one
        write_shard(tmp_path / f"{number:03d}.tar", samples)
        held_out |= {image: str(label) for _, image, label in samples}
    found = scanned(tmp_path, tmp_path, validation=0.3)
    for row, label in enumerate(found.held_out.labels.tolist()):
        assert held_out.pop(found.held_out.file(row).read_bytes()) == str(label)
    assert len(held_out) == len(found.shards) == 3 * 41 - len(found.held_out)
    keys = [{s.key for s, part in zip(read_shard(url), parts, strict=True) if part != TRAIN}
            for url, parts in zip(found.shards.urls, found.shards.parts, strict=True)]  # fmt: skip
    assert keys[0] != keys[1] != keys[2]


def test_the_scan_holds_out_counts_and_measures(shards, tmp_path):
    found = scanned(shards, tmp_path)
    held_out = len(found.held_out)
    assert 5 <= held_out <= 30
    assert len(found.shards) + held_out == 90
    assert found.held_out.classes == ("0", "1", "2")
    train = [preprocess(s.image, SPEC) for url, parts in zip(found.shards.urls, found.shards.parts, strict=True)
             for s, part in zip(read_shard(url), parts, strict=True) if part == TRAIN]  # fmt: skip
    pixels = np.stack(train) / 255
    assert found.shards.mean[0] == pytest.approx(pixels.mean(), abs=1e-5)
    assert found.shards.std[0] == pytest.approx(pixels.std(), abs=1e-5)
    assert found.shards.calibration.shape == (len(found.shards), 16, 16, 1)
    assert found.shards.train_labels().tolist() == [
        label for labels, parts in zip(found.shards.labels, found.shards.parts, strict=True)
        for label, part in zip(labels.tolist(), parts, strict=True) if part == TRAIN
    ]  # fmt: skip


def test_the_second_scan_is_the_first(shards, tmp_path):
    first = scanned(shards, tmp_path)
    read = []
    second = scanned(shards, tmp_path, advance=read.append)
    assert not read
    assert second.shards.digest == first.shards.digest
    assert second.held_out.paths == first.held_out.paths
    assert scanned(shards, tmp_path, seed=1).held_out.paths != first.held_out.paths


def test_the_same_shards_elsewhere_are_the_same_data(shards, tmp_path):
    copies = tmp_path / "elsewhere" / "copies"
    shutil.copytree(shards, copies)
    assert scanned(copies, tmp_path).shards.digest == scanned(shards, tmp_path).shards.digest
    (copies / "train-000.tar").rename(copies / "train-009.tar")
    assert scanned(copies, tmp_path).shards.digest != scanned(shards, tmp_path).shards.digest


def test_images_beside_shards_are_not_left_out_without_a_word(shards, tmp_path):
    (shards / "notes").mkdir()
    (shards / "notes" / "read.me").write_text("")
    (shards / ".hidden").mkdir()
    (shards / ".hidden" / "1.png").write_bytes(png(0))
    assert len(find_shards(shards)) == 3
    (shards / "cat").mkdir()
    (shards / "cat" / "1.png").write_bytes(png(0))
    with pytest.raises(DataError, match=r"holds tar shards and beside them images, as .*cat/1\.png"):
        scanned(shards, tmp_path)
    shutil.rmtree(shards / "cat")
    (shards / "train" / "cat").mkdir(parents=True)
    (shards / "train" / "cat" / "1.png").write_bytes(png(0))
    with pytest.raises(DataError, match=r"beside them images, as .*train/cat/1\.png"):
        scanned(shards, tmp_path)


def test_shards_named_for_a_part_are_that_part(shards, tmp_path):
    write_shard(shards / "val-000.tar", numbered(6, 500))
    found = scanned(shards, tmp_path, test=0.0)
    assert len(found.shards) == 90
    assert set(found.held_out.splits.tolist()) == {VALIDATION}
    assert len(found.held_out) == 6


def test_faults_and_leaks_are_set_aside(shards, tmp_path):
    write_shard(shards / "test-0.tar", [("t0", png(7), 1), ("t1", png(901), 2), ("t2", png(902), 0)])  # 7 is trained on
    write_shard(
        shards / "train-900.tar",
        [
            ("twice", png(803), 0),
            ("twice", png(804), 1),
            ("text", b"hello", 0),
            ("nolabel", png(800), None),
            ("noimage", None, 1),
            ("good", png(801), 2),
        ],
    )
    found = scanned(shards, tmp_path, validation=0.0)
    reasons = {fault.path.rsplit("/", 1)[1]: fault.reason for fault in found.faults}
    assert reasons == {
        "twice.png": "ambiguous",
        "text.png": "unsupported_format",
        "nolabel.png": "incomplete",
        "noimage": "incomplete",
        "s0007.png": "leak",
    }
    assert len(found.shards) == 90 - 1 + 1
    assert preprocess(png(7), SPEC).tobytes() not in seen(source_of(found.shards).batches(0, 0))


def test_the_same_image_in_two_parts_or_under_two_labels_is_set_aside(shards, tmp_path):
    one, other, both, kept = png(901), png(902), png(903), png(904)
    write_shard(shards / "val-0.tar", [("v0", one, 1), ("v1", other, 2), ("v2", kept, 0), ("v3", png(905), 0)])
    write_shard(shards / "test-0.tar", [("t0", one, 1), ("t1", png(906), 1)])
    write_shard(shards / "train-900.tar", [("a", other, 1), ("b", both, 0), ("c", both, 1), ("d", kept, 0)])
    found = scanned(shards, tmp_path)
    reasons = {fault.path.rsplit("/", 1)[1]: (fault.reason, fault.message) for fault in found.faults}
    contradiction = "the same image has different labels: "
    assert reasons == {
        "v0.png": ("leak", "the same bytes as an image of the test part"),
        "v1.png": ("contradiction", f"{contradiction}1, 2"),
        "a.png": ("contradiction", f"{contradiction}1, 2"),
        "b.png": ("contradiction", f"{contradiction}0, 1"),
        "c.png": ("contradiction", f"{contradiction}0, 1"),
        "d.png": ("leak", "the same bytes as an image of the validation part"),
    }
    assert len(found.shards) == 90
    assert sorted(found.held_out.splits.tolist()) == [VALIDATION] * 2 + [TEST] * 2


@pytest.mark.parametrize("end", ["\n", ""])
def test_names_of_number_labels_come_from_a_file(shards, end, tmp_path):
    (shards / "classes.txt").write_text(f"zebra\nape\ncat\nunused{end}")
    found = scanned(shards, tmp_path)
    assert found.held_out.classes == ("zebra", "ape", "cat", "unused")
    (shards / "classes.txt").write_text("zebra\nape\n")
    with pytest.raises(DataError, match="names 2 classes, but a sample has label 2"):
        scanned(shards, tmp_path)


def test_classes_of_one_name_are_told_apart(shards, tmp_path):
    """As ImageNet's two cranes: the held-out images of one would be taken for the other."""
    (shards / "classes.txt").write_bytes(b"\xef\xbb\xbfcrane\r\nape\r\ncrane\r\n\r\n")
    found = scanned(shards, tmp_path).held_out
    (shards / "classes.txt").write_text("zebra\nape\ncat\n")
    other = scanned(shards, tmp_path).held_out

    assert found.classes == ("crane (0)", "ape", "crane (2)")
    assert found.labels.tolist() == other.labels.tolist()
    assert set(found.labels.tolist()) == {0, 1, 2}


def test_other_names_of_the_classes_are_other_data(shards, tmp_path):
    digests = set()
    for names in ("zebra ape cat", "cat ape zebra", "zebra ape cat dog"):
        (shards / "classes.txt").write_text("\n".join(names.split()))
        digests.add(scanned(shards, tmp_path).shards.digest)

    assert len(digests) == 3


@pytest.mark.parametrize("name", ["classes.txt", "list.txt"])
def test_a_text_that_is_not_in_utf8_is_named(shards, tmp_path, name):
    (shards / name).write_bytes("zèbre.tar\nape\ncat\n".encode("latin-1"))
    with pytest.raises(DataError, match=f"{name}.* UTF-8"):
        scanned(shards if name == "classes.txt" else shards / name, tmp_path)


def test_a_shard_that_is_no_tar_is_named(tmp_path):
    (tmp_path / "train-0.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(DataError, match=r"train-0\.tar cannot be read"):
        scanned(tmp_path, tmp_path)
    listed = tmp_path / "list.txt"
    listed.write_text("nowhere-0.tar\n")
    with pytest.raises(DataError, match=r"nowhere-0\.tar cannot be read"):
        scanned(listed, tmp_path)


def test_only_the_parts_with_a_share_are_held_out_and_in_that_proportion(tmp_path):
    write_shard(tmp_path / "shards" / "000.tar", numbered(400))
    for number, shares in enumerate(((0.3, 0.0), (0.0, 0.3), (0.3, 0.1))):
        found = scanned(tmp_path / "shards", tmp_path / str(number), validation=shares[0], test=shares[1])
        for part, share in ((1, shares[0]), (2, shares[1])):
            count = int((found.shards.parts[0] == part).sum())
            assert count == 0 if share == 0 else abs(count / 400 - share) < 0.07


def test_labels_that_are_numbers_are_in_the_order_of_numbers(tmp_path):
    write_shard(tmp_path / "shards" / "000.tar", numbered(48, classes=12))
    found = scanned(tmp_path / "shards", tmp_path, validation=0.2)
    assert found.held_out.classes == tuple(map(str, range(12)))
    assert found.shards.labels[0].tolist() == [i % 12 for i in range(48)]


def test_a_scan_with_other_shares_seed_or_contents_is_another_one(shards, tmp_path):
    first = scanned(shards, tmp_path)
    more = scanned(shards, tmp_path, validation=0.5)
    assert len(more.held_out) > len(first.held_out) + 10
    other = scanned(shards, tmp_path, seed=1)
    assert len({found.shards.digest for found in (first, more, other)}) == 3
    write_shard(shards / "train-000.tar", numbered(40, 500))  # as large as before, but newer
    os.utime(shards / "train-000.tar", (5, 5))
    again = scanned(shards, tmp_path)
    assert again.shards.digest != first.shards.digest
    assert not np.array_equal(again.shards.calibration, first.shards.calibration)


def test_labels_may_end_as_strings_of_c_do(tmp_path):
    samples = [(key, image, "cat\0" if label else "dog") for key, image, label in numbered(40, classes=2)]
    write_shard(tmp_path / "shards" / "000.tar", samples)
    assert scanned(tmp_path / "shards", tmp_path, validation=0.3).held_out.classes == ("cat", "dog")


def test_labels_of_samples_that_are_set_aside_are_no_classes(tmp_path):
    samples = [(f"{i:04d}", png(i), "ab"[i % 2]) for i in range(30)] + [("broken", b"nothing", "c")]
    write_shard(tmp_path / "shards" / "000.tar", samples)
    assert scanned(tmp_path / "shards", tmp_path).held_out.classes == ("a", "b")


def test_a_sample_among_many_is_named_when_it_is_set_aside(tmp_path):
    """Names are kept in chunks of 256 samples, whatever the shards."""
    many = [(f"many/{i:04d}", png(i, 4), i % 2) for i in range(600)]
    write_shard(tmp_path / "shards" / "test-0.tar", [("t", many[255][1], 1)])
    write_shard(tmp_path / "shards" / "train-0.tar", many[:300])
    write_shard(tmp_path / "shards" / "train-1.tar", [*many[300:], ("again", many[256][1], 1)])
    found = scanned(tmp_path / "shards", tmp_path)
    folder = tmp_path / "shards"
    assert [(fault.path, fault.reason) for fault in found.faults] == [
        (f"{folder}/train-0.tar/many/0255.png", "leak"),
        (f"{folder}/train-0.tar/many/0256.png", "contradiction"),
        (f"{folder}/train-1.tar/again.png", "contradiction"),
    ]


def test_shards_without_any_sample_are_an_error(tmp_path):
    write_shard(tmp_path / "shards" / "train-0.tar", [])
    write_shard(tmp_path / "shards" / "train-1.tar", [])
    with pytest.raises(DataError, match="no usable training samples"):
        scanned(tmp_path / "shards", tmp_path)


def test_a_sample_takes_about_a_hundred_bytes():
    """Sets larger than the disk have tens of millions of samples."""
    tracemalloc.start()
    try:
        columns = Columns()
        for number in range(20_000):
            if number % 1000 == 0:
                columns.begin(f"train-{number}.tar")
            content = number if number % 10 else number % 3000  # some of them again
            columns.add(Seen(TRAIN, str(number % 1000), f"/{number:08d}.jpg", content.to_bytes(DIGEST_BYTES, "big")))
        columns.set_repeated_aside()
        columns.digest()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert not columns.faults
    assert peak / 20_000 < 200  # 650 as an object each


def test_what_killed_scans_left_is_removed_after_a_day(shards, tmp_path):
    cache = tmp_path / "cache"
    for name, age_s in ((".old.writing-1", 90_000), (".young.writing-2", 60)):
        (cache / name / "test").mkdir(parents=True)
        for path in (cache / name / "test", cache / name):
            os.utime(path, times=(time.time() - age_s,) * 2)
    scanned(shards, tmp_path)
    assert [folder.name for folder in cache.glob(".*.writing-*")] == [".young.writing-2"]


def test_a_long_scan_does_not_look_like_one_that_was_killed(shards, tmp_path):
    """Though it may write nothing for days, where other shards are named for validation and test."""
    ages = []

    def advance(_):
        (folder,) = (tmp_path / "cache").glob(".*.writing-*")
        ages.append(time.time() - folder.stat().st_mtime)
        os.utime(folder, times=(time.time() - 90_000,) * 2)

    scanned(shards, tmp_path, validation=0.0, test=0.0, advance=advance)
    assert len(ages) == 3
    assert max(ages) < 3600
