import io
import os
import shutil
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from service import artifact
from service.artifact import InputSpec
from service.errors import ConfigurationError, DataError
from service.preprocess import preprocess
from training.config import Experiment
from training.display import Display
from training.distributed import Group
from training.listing import TEST, TRAIN, VALIDATION
from training.models import create, describe
from training.prepare import prepare
from training.run import run
from training.shard_scan import count_shard_channels, scan
from training.shards import ShardSource, find_shards, is_sharded, part_of, read_shard

SPEC = InputSpec(height=16, width=16, channels=1)


def add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def png(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 20), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(file, samples):
    """`samples`: (key, encoded image or None, label or None)."""
    with tarfile.open(file, "w") as archive:
        for key, image, label in samples:
            if image is not None:
                add(archive, f"{key}.png", image)
            if label is not None:
                add(archive, f"{key}.cls", str(label).encode())
            add(archive, f"{key}.json", b"{}")


@pytest.fixture
def shards(tmp_path):
    """Three training shards of 40, 30 and 20 samples with labels 0..2."""
    folder = tmp_path / "shards"
    folder.mkdir()
    seed = 0
    for number, count in enumerate((40, 30, 20)):
        samples = [(f"s{seed + i:04d}", png(seed + i), (seed + i) % 3) for i in range(count)]
        write_shard(folder / f"train-{number:03d}.tar", samples)
        seed += count
    return folder


def scanned(source, tmp_path, **options):
    wanted = {"min_side_pixels": 1, "validation": 0.1, "test": 0.1, "seed": 0, "workers": 2, "advance": lambda _: None}
    return scan(source, SPEC, tmp_path / "cache", **{**wanted, **options})


def source_of(shards, batch_size=16, seed=0, group=None, buffer=25):
    group = group or Group()
    return ShardSource(shards, SPEC, batch_size, seed, group=group, buffer=buffer, workers=2)


def seen(batches):
    return [image.numpy().tobytes() for batch in batches for image in batch.images]


def test_samples_are_grouped_by_key_and_may_lack_parts(tmp_path):
    samples = [("a/x", b"image", "cat"), ("a/y", None, "dog"), ("b/x", b"other", None)]
    write_shard(tmp_path / "s.tar", samples)
    found = list(read_shard(str(tmp_path / "s.tar")))
    assert [(s.key, s.image, s.label) for s in found] == [
        ("a/x", b"image", "cat"), ("a/y", b"", "dog"), ("b/x", b"other", ""),
    ]  # fmt: skip


def test_what_follows_the_first_dot_says_what_a_file_is(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for name in ("k.jpg", "k.seg.png", "k.cls", "k.seg.cls", "l.seg.png", "m.json", "n.PNG", "n.jpg", "n.cls"):
            add(archive, name, name.encode())
        for name in ("o.png", "o.cls", "o.cls"):
            add(archive, name, name.encode())
    found = list(read_shard(str(tmp_path / "s.tar")))
    assert found == [
        ("k", ".jpg", b"k.jpg", "k.cls", ""),
        ("l", "", b"", "", ""),  # to be told that it has no image
        ("n", ".png", b"n.PNG", "n.cls", "image"),
        ("o", ".png", b"o.png", "o.cls", "label (.cls)"),
    ]


def test_hidden_files_between_those_of_a_sample_do_not_part_them(tmp_path):
    """As tar writes them on a Mac."""
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for name in ("./._a.png", "./a.png", "./._a.cls", "./a.cls", "./b.png", "./.DS_Store", "./b.cls"):
            add(archive, name, name.encode())
    found = [(s.key, s.image, s.label) for s in read_shard(str(tmp_path / "s.tar"))]
    assert found == [("a", b"./a.png", "./a.cls"), ("b", b"./b.png", "./b.cls")]


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


def test_finds_shards_in_folders_and_lists(shards, tmp_path):
    assert is_sharded(shards)
    assert [url.rsplit("/", 1)[1] for url in find_shards(shards)] == ["train-000.tar", "train-001.tar", "train-002.tar"]
    listed = tmp_path / "list.txt"
    listed.write_text("# mine\nshards/train-001.tar\n\nmemory://x/val-0.tar\n")
    assert find_shards(listed) == [str(tmp_path / "shards/train-001.tar"), "memory://x/val-0.tar"]
    listed.write_text("\n")
    with pytest.raises(DataError, match="lists no shards"):
        find_shards(listed)


@pytest.mark.parametrize(
    ("name", "part"), [("train-1.tar", TRAIN), ("val_1.tar", VALIDATION), ("test.tar", TEST), ("x/00001.tar", TRAIN)]
)
def test_the_name_of_a_shard_says_its_part(name, part):
    assert part_of(name) == part


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
    write_shard(shards / "val-000.tar", [(f"v{i}", png(500 + i), i % 3) for i in range(6)])
    found = scanned(shards, tmp_path, test=0.0)
    assert len(found.shards) == 90
    assert set(found.held_out.splits.tolist()) == {VALIDATION}
    assert len(found.held_out) == 6


def test_channels_are_those_of_the_images(shards, tmp_path):
    assert count_shard_channels(shards) == 1
    colours = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(colours, "PNG")
    write_shard(shards / "train-003.tar", [("c0", None, 1), ("c1", b"odd", 1), ("c2", colours.getvalue(), 1)])
    assert count_shard_channels(shards) == 3
    settings = Experiment.model_validate({"name": "coloured", "input": {"size": 16}})
    shown = Display(Console(file=io.StringIO()))
    found = prepare(settings, describe("lenet5"), shards, tmp_path / "cache", shown, Group())
    assert found.spec.channels == 3
    write_shard(tmp_path / "odd.tar", [("c1", b"odd", 1)])
    (tmp_path / "odd.txt").write_text("odd.tar\n")
    assert count_shard_channels(tmp_path / "odd.txt") == 3


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


def test_a_list_of_shards_may_begin_with_a_byte_order_mark(shards):
    (shards / "list.txt").write_text("train-000.tar\n", encoding="utf-8-sig")

    assert find_shards(shards / "list.txt") == [str(shards / "train-000.tar")]


@pytest.mark.parametrize("count", [20, 28, 32])
def test_a_shard_that_is_written_meanwhile_ends_the_run_with_its_name(shards, tmp_path, count):
    source = source_of(scanned(shards, tmp_path).shards)
    write_shard(shards / "train-001.tar", [(f"s{i:04d}", png(i), i % 3) for i in range(count)])
    with pytest.raises(DataError, match=rf"train-001\.tar has {count} samples, and had 30"):
        list(source.batches(0, 0))


def test_an_epoch_shows_every_training_sample_once(shards, tmp_path):
    source = source_of(scanned(shards, tmp_path).shards)
    first, second = seen(source.batches(0, 0)), seen(source.batches(1, 0))
    assert len(first) == len(set(first)) == len(source)
    assert sorted(first) == sorted(second)
    assert first != second
    assert first == seen(source.batches(0, 0))
    assert source.steps == -(-len(source) // 16)


def test_a_resumed_epoch_is_the_rest_and_processes_share_batches(shards, tmp_path):
    found = scanned(shards, tmp_path).shards
    whole = list(source_of(found).batches(2, 0))
    rest = list(source_of(found).batches(2, 3))
    assert len(rest) == len(whole) - 3
    for a, b in zip(whole[3:], rest, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.uniform, b.uniform)
    halves = [list(source_of(found, group=Group(rank, 2)).batches(2, 0)) for rank in range(2)]
    for batch, left, right in zip(whole, *halves, strict=True):
        assert torch.equal(torch.cat([left.images, right.images]), batch.images)
        assert left.whole == right.whole == batch.whole == len(batch.images)


def test_a_shard_that_is_no_tar_is_named(tmp_path):
    (tmp_path / "train-0.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(DataError, match=r"train-0\.tar cannot be read"):
        scanned(tmp_path, tmp_path)
    listed = tmp_path / "list.txt"
    listed.write_text("nowhere-0.tar\n")
    with pytest.raises(DataError, match=r"nowhere-0\.tar cannot be read"):
        scanned(listed, tmp_path)


def test_a_whole_run_from_shards(shards, tmp_path):
    tree = {
        "name": "sharded",
        "input": {"size": 16, "channels": 1},
        "loop": {"epochs": 2, "precision": "float32", "threads": 1, "balance": "weights"},
    }
    text = io.StringIO()
    shown = Display(Console(file=text, width=120))
    result = run(Experiment.model_validate(tree), shards, tmp_path / "models", tmp_path / "runs", shown)
    manifest = artifact.load(result.version).manifest
    counts = manifest.data["images"]
    assert sum(counts.values()) == 90
    assert "90 images" in text.getvalue()
    assert all(file.is_file() for file in result.holdout)
    sampled = Experiment.model_validate({**tree, "loop": {"balance": "sampler"}})
    with pytest.raises(ConfigurationError, match="cannot be sampled"):
        run(sampled, shards, tmp_path / "models", tmp_path / "runs", shown)


def test_a_shard_that_is_cut_between_two_files_is_no_whole_one(shards):
    shard = shards / "train-001.tar"
    with tarfile.open(shard) as archive:
        cut = archive.getmembers()[30].offset
    shard.write_bytes(shard.read_bytes()[:cut])

    with pytest.raises(DataError, match=r"train-001\.tar cannot be read: it is cut short"):
        list(read_shard(str(shard)))


def prepared(folder, tmp_path, **tree):
    settings = Experiment.model_validate({"input": {"size": 16}, **tree})
    return prepare(settings, describe("lenet5"), folder, tmp_path / "cache", Display(Console(quiet=True)), Group())


@pytest.fixture
def parts(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, (part, count) in enumerate((("train", 30), ("val", 12), ("test", 9))):
        write_shard(folder / f"{part}-0.tar", [(f"{i:03d}", png(100 * number + i), i % 3) for i in range(count)])
    return folder


def test_parts_of_shards_are_judged_as_what_they_are(parts, tmp_path):
    data = prepared(parts, tmp_path)
    assert len(data.split.validation) == 12
    assert len(data.split.test) == 9
    assert {file.parent.name for file in data.files("validation")} == {"validation"}
    assert {file.parent.name for file in data.files("test")} == {"test"}


def test_shards_are_normalised_as_the_weights_were(parts, tmp_path):
    state = {"model": create("lenet5", 3, 1).state_dict(), "mean": (0.25,), "std": (0.5,)}
    torch.save(state, tmp_path / "best.pt")
    data = prepared(parts, tmp_path, transfer={"weights": str(tmp_path / "best.pt")})
    assert (data.normalise.mean, data.normalise.std) == ((0.25,), (0.5,))
    assert data.normalise.mean != prepared(parts, tmp_path).normalise.mean


def test_only_the_parts_with_a_share_are_held_out_and_in_that_proportion(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    write_shard(folder / "000.tar", [(f"{i:04d}", png(i), i % 3) for i in range(400)])
    for number, shares in enumerate(((0.3, 0.0), (0.0, 0.3), (0.3, 0.1))):
        found = scanned(folder, tmp_path / str(number), validation=shares[0], test=shares[1])
        for part, share in ((1, shares[0]), (2, shares[1])):
            count = int((found.shards.parts[0] == part).sum())
            assert count == 0 if share == 0 else abs(count / 400 - share) < 0.07


def test_labels_that_are_numbers_are_in_the_order_of_numbers(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    write_shard(folder / "000.tar", [(f"{i:04d}", png(i), i % 12) for i in range(48)])
    found = scanned(folder, tmp_path, validation=0.2)
    assert found.held_out.classes == tuple(map(str, range(12)))
    assert found.shards.labels[0].tolist() == [i % 12 for i in range(48)]


def test_processes_count_the_same_steps_of_shards(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    write_shard(folder / "000.tar", [(f"{i:04d}", png(i), i % 3) for i in range(35)])
    found = scanned(folder, tmp_path, validation=0.0, test=0.0).shards
    sources = [source_of(found, group=Group(rank, 2)) for rank in range(2)]  # 16 + 16 + 3, and 3 are too few for two
    for source in sources:
        assert source.steps == 2
        assert min(len(batch.labels) for batch in source.batches(0, 0)) >= 2


def shard_of(folder, first=0, label=None):
    folder.mkdir(exist_ok=True)
    write_shard(folder / "000.tar", [(f"{i:04d}", png(first + i), label or str(i % 3)) for i in range(60)])
    return folder


def test_a_scan_with_other_shares_seed_or_contents_is_another_one(tmp_path):

    folder = shard_of(tmp_path / "shards")
    first = scanned(folder, tmp_path)
    more = scanned(folder, tmp_path, validation=0.5)
    assert len(more.held_out) > len(first.held_out) + 10
    other = scanned(folder, tmp_path, seed=1)
    assert len({found.shards.digest for found in (first, more, other)}) == 3
    shard_of(folder, first=500)  # as large as before, but newer
    os.utime(folder / "000.tar", (5, 5))
    assert scanned(folder, tmp_path).shards.digest != first.shards.digest
    assert not np.array_equal(scanned(folder, tmp_path).shards.calibration, first.shards.calibration)


def test_labels_of_samples_that_are_set_aside_are_no_classes(tmp_path):
    (tmp_path / "shards").mkdir()
    samples = [(f"{i:04d}", png(i), "ab"[i % 2]) for i in range(30)] + [("broken", b"nothing", "c")]
    write_shard(tmp_path / "shards" / "000.tar", samples)
    assert scanned(tmp_path / "shards", tmp_path).held_out.classes == ("a", "b")


def test_tiny_images_of_shards_are_left_out_of_the_training_part_too(tmp_path):
    import numpy as np
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(buffer, "PNG")
    folder = tmp_path / "shards"
    folder.mkdir()
    write_shard(
        folder / "train-0.tar", [(f"{i:03d}", png(i), i % 3) for i in range(30)] + [("tiny", buffer.getvalue(), 0)]
    )
    write_shard(folder / "val-0.tar", [(f"{i:03d}", png(50 + i), i % 3) for i in range(9)])
    data = prepared(folder, tmp_path, data={"min_side_pixels": 4, "test": 0.0})
    assert len(data.train_labels()) == 30
    assert [fault.reason for fault in data.faults] == ["tiny"]


def test_each_sample_is_changed_in_its_own_way_in_each_epoch(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(3):
        write_shard(
            folder / f"train-{number:03d}.tar", [(f"s{i:04d}", png(100 * number + i), i % 3) for i in range(30)]
        )
    found = scanned(folder, tmp_path).shards

    def rows(epoch):
        return {
            image.numpy().tobytes(): tuple(row.tolist())
            for batch in source_of(found).batches(epoch, 0)
            for image, row in zip(batch.images, batch.uniform, strict=True)
        }

    first, second = rows(0), rows(1)
    assert len(set(first.values())) == len(first) == len(found)
    assert all(first[image] != second[image] for image in first)


def test_samples_of_all_shards_are_mixed_and_shards_come_in_an_order_of_their_own(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    origin = {}
    for number in range(6):
        samples = [(f"s{i:04d}", png(100 * number + i), i % 3) for i in range(20)]
        write_shard(folder / f"train-{number:03d}.tar", samples)
    found = scanned(folder, tmp_path).shards
    for number, url in enumerate(found.urls):
        one = replace(
            found, urls=(url,), parts=found.parts[number : number + 1], labels=found.labels[number : number + 1]
        )
        for batch in source_of(one).batches(0, 0):
            origin |= {image.numpy().tobytes(): number for image in batch.images}

    def order(epoch):
        return [
            origin[image.numpy().tobytes()]
            for batch in source_of(found, buffer=30).batches(epoch, 0)
            for image in batch.images
        ]

    firsts = {order(epoch)[0] for epoch in range(8)}
    assert len(firsts) > 2
    for epoch in range(3):
        assert len(set(order(epoch)[:10])) > 1
        runs = sum(a != b for a, b in zip(order(epoch), order(epoch)[1:], strict=False))
        assert runs > 30
