import io
import tarfile
from dataclasses import replace

import pytest
import torch
from PIL import Image
from rich.console import Console
from tar_shards import add, numbered, png, scanned, seen, source_of, write_shard

from service import artifact
from service.errors import ConfigurationError, DataError
from training.config import Experiment
from training.display import Display
from training.distributed import Group
from training.listing import TEST, TRAIN, VALIDATION
from training.models import create, describe
from training.prepare import prepare
from training.run import run
from training.shard_scan import count_shard_channels
from training.shards import find_shards, is_sharded, part_of, read_shard


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


def test_finds_shards_in_folders_and_lists(shards, tmp_path):
    assert is_sharded(shards)
    assert [url.rsplit("/", 1)[1] for url in find_shards(shards)] == ["train-000.tar", "train-001.tar", "train-002.tar"]
    listed = tmp_path / "list.txt"
    listed.write_text("# mine\nshards/train-001.tar\n\nmemory://x/val-0.tar\n")
    assert find_shards(listed) == [str(tmp_path / "shards/train-001.tar"), "memory://x/val-0.tar"]
    listed.write_text("\n")
    with pytest.raises(DataError, match="lists no shards"):
        find_shards(listed)


def test_what_a_mac_puts_beside_each_shard_is_no_shard(shards):
    (shards / "._train-000.tar").write_bytes(b"Mac OS X")
    assert len(find_shards(shards)) == 3
    for shard in shards.glob("train*"):
        shard.unlink()
    assert not is_sharded(shards)


def test_a_list_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "list.txt").symlink_to("/proc/self/mem")
    with pytest.raises(DataError, match=r"list\.txt cannot be read: "):
        find_shards(tmp_path / "list.txt")


@pytest.mark.parametrize(
    ("name", "part"), [("train-1.tar", TRAIN), ("val_1.tar", VALIDATION), ("test.tar", TEST), ("x/00001.tar", TRAIN)]
)
def test_the_name_of_a_shard_says_its_part(name, part):
    assert part_of(name) == part


def test_a_list_of_shards_may_begin_with_a_byte_order_mark(shards):
    (shards / "list.txt").write_text("train-000.tar\n", encoding="utf-8-sig")

    assert find_shards(shards / "list.txt") == [str(shards / "train-000.tar")]


def test_a_shard_that_is_cut_between_two_files_is_no_whole_one(shards):
    shard = shards / "train-001.tar"
    with tarfile.open(shard) as archive:
        cut = archive.getmembers()[30].offset
    shard.write_bytes(shard.read_bytes()[:cut])

    with pytest.raises(DataError, match=r"train-001\.tar cannot be read: it is cut short"):
        list(read_shard(str(shard)))


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


@pytest.mark.parametrize("count", [20, 28, 32])
def test_a_shard_that_is_written_meanwhile_ends_the_run_with_its_name(shards, tmp_path, count):
    source = source_of(scanned(shards, tmp_path).shards)
    write_shard(shards / "train-001.tar", numbered(count))
    with pytest.raises(DataError, match=rf"train-001\.tar has {count} samples, and had 30"):
        list(source.batches(0, 0))


def test_processes_count_the_same_steps_of_shards(tmp_path):
    write_shard(tmp_path / "shards" / "000.tar", numbered(35))
    found = scanned(tmp_path / "shards", tmp_path, validation=0.0, test=0.0).shards
    sources = [source_of(found, group=Group(rank, 2)) for rank in range(2)]  # 16 + 16 + 3, and 3 are too few for two
    for source in sources:
        assert source.steps == 2
        assert min(len(batch.labels) for batch in source.batches(0, 0)) >= 2


def test_each_sample_is_changed_in_its_own_way_in_each_epoch(shards, tmp_path):
    found = scanned(shards, tmp_path).shards

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
    for number in range(6):
        write_shard(tmp_path / "shards" / f"train-{number:03d}.tar", numbered(20, 100 * number))
    found, origin = scanned(tmp_path / "shards", tmp_path).shards, {}
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


def prepared(folder, tmp_path, **tree):
    settings = Experiment.model_validate({"input": {"size": 16}, **tree})
    return prepare(settings, describe("lenet5"), folder, tmp_path / "cache", Display(Console(quiet=True)), Group())


@pytest.fixture
def parts(tmp_path):
    """A shard for each part: 30 samples to train on, 12 of validation, 9 to test."""
    for first, part, count in ((0, "train", 30), (100, "val", 12), (200, "test", 9)):
        write_shard(tmp_path / "parts" / f"{part}-0.tar", numbered(count, first))
    return tmp_path / "parts"


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


def test_tiny_images_of_shards_are_left_out_of_the_training_part_too(parts, tmp_path):
    write_shard(parts / "train-0.tar", [*numbered(30), ("tiny", png(99, side=2), 0)])
    data = prepared(parts, tmp_path, data={"min_side_pixels": 4})
    assert len(data.train_labels()) == 30
    assert [fault.reason for fault in data.faults] == ["tiny"]
