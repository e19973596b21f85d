"""Versions in a place that is mirrored. A `file://` URL takes the way of a bucket's."""

import shutil
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
import toys
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from service import artifact
from service.errors import ArtifactError, ConfigurationError, OutOfReachError
from service.sources import RemoteSource


@pytest.fixture
def bucket(tmp_path):
    toys.write_version(tmp_path / "bucket", "grey", 1)
    return tmp_path / "bucket"


@pytest.fixture
def source(bucket, tmp_path):
    return RemoteSource(f"file://{bucket}", tmp_path / "cache")


def test_a_version_is_copied_once(source, bucket, monkeypatch):
    first = source.fetch("grey", 1)
    monkeypatch.setattr(source, "_download", pytest.fail)

    assert source.fetch("grey", 1) == first
    assert artifact.load(first).manifest == artifact.load(bucket / "grey" / "1").manifest


@pytest.mark.parametrize("harm", [lambda path: path.write_bytes(b"rot"), lambda path: path.unlink()])
def test_a_damaged_copy_is_fetched_again(source, harm):
    harm(source.fetch("grey", 1) / artifact.MODEL)

    assert artifact.load(source.fetch("grey", 1))


def test_an_upload_under_way_is_half_copied_and_looks_different_when_it_goes_on(source, bucket, tmp_path):
    whole = toys.write_version(tmp_path / "elsewhere", "grey", 2)
    target = bucket / "grey" / "2"
    target.mkdir()
    shutil.copy(whole / artifact.MANIFEST, target)
    before = source.fingerprint("grey", 2)
    with pytest.raises(ArtifactError, match="half-copied") as caught:
        source.fetch("grey", 2)
    shutil.copytree(whole, target, dirs_exist_ok=True)

    assert not isinstance(caught.value, OutOfReachError)
    assert before
    assert source.fingerprint("grey", 2) != before
    assert artifact.load(source.fetch("grey", 2))


def test_a_place_out_of_reach_is_told_apart_and_leaves_nothing_behind(source, tmp_path, monkeypatch):
    def lost(*_):
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(source, "_download", lost)
    with pytest.raises(OutOfReachError, match="reset by peer"):
        source.fetch("grey", 1)

    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


class Unsteady(LocalFileSystem):
    """Its connections break in the midst of models."""

    protocol = "unsteady"

    def get_file(self, rpath, lpath, **options):
        super().get_file(rpath, lpath, **options)
        if rpath.endswith(artifact.MODEL):
            with Path(lpath).open("r+b") as file:
                file.truncate(100)


def test_a_download_that_is_cut_short_is_told_apart_from_damage(bucket, source, tmp_path):
    fsspec.register_implementation("unsteady", Unsteady, clobber=True)
    with pytest.raises(OutOfReachError, match=r"model\.onnx was cut short after 100 bytes"):
        RemoteSource(f"unsteady://{bucket}", tmp_path / "cache").fetch("grey", 1)
    for harm in (b"rot", (bucket / "grey" / "1" / artifact.MODEL).read_bytes()[::-1]):
        (bucket / "grey" / "1" / artifact.MODEL).write_bytes(harm)
        with pytest.raises(ArtifactError, match="damaged or half-copied") as caught:
            source.fetch("grey", 1)
        assert not isinstance(caught.value, OutOfReachError)


class Cleaner(LocalFileSystem):
    """While it is at work, somebody clears the cache."""

    protocol = "cleaner"

    def get_file(self, rpath, lpath, **options):
        shutil.rmtree(Path(lpath).parent)
        super().get_file(rpath, lpath, **options)


def test_a_cache_that_is_cleared_under_a_download_is_no_fault_of_the_version(bucket, tmp_path):
    fsspec.register_implementation("cleaner", Cleaner, clobber=True)
    with pytest.raises(OutOfReachError, match="somebody cleared"):
        RemoteSource(f"cleaner://{bucket}", tmp_path / "cache").fetch("grey", 1)


def test_a_place_that_is_lost_is_not_an_empty_one(source, bucket):
    bucket.rename(bucket.with_name("moved"))
    with pytest.raises(ConfigurationError, match=r"the repository file://.* does not exist"):
        source.models()

    bucket.mkdir()
    assert source.models() == {}


class Objects(MemoryFileSystem):
    """A store without folders: a prefix is there as long as something lies below it."""

    protocol = "objects"
    store: ClassVar = {}
    pseudo_dirs: ClassVar = []

    @classmethod
    def _strip_protocol(cls, path):
        return path.removeprefix("objects://").strip("/")


def test_a_bucket_without_versions_is_empty_and_no_bucket_is_an_error(tmp_path):
    fsspec.register_implementation("objects", Objects, clobber=True)
    Objects().pipe_file("bucket/other/file", b"")

    assert RemoteSource("objects://bucket/models", tmp_path).models() == {}
    with pytest.raises(ConfigurationError, match="the repository objects://buket/models does not exist"):
        RemoteSource("objects://buket/models", tmp_path).models()


def test_a_version_that_is_gone_has_no_fingerprint(source):
    assert source.fingerprint("grey", 7) == ()


def test_what_is_hidden_or_written_otherwise_is_no_version(source, bucket):
    for other in ("grey/04", "grey/0", "grey/x", ".trash/3"):
        shutil.copytree(bucket / "grey" / "1", bucket / other)

    assert source.models() == {"grey": [1]}


def test_copies_of_what_is_neither_present_nor_served_go(source, bucket):
    for number in (2, 3):
        toys.write_version(bucket, "grey", number)
    one, two, three = (source.fetch("grey", number) for number in (1, 2, 3))
    source.tidy({"grey": [3]}, {("grey", 2)})

    assert [path.exists() for path in (one, two, three)] == [False, True, True]


def test_places_of_like_names_have_mirrors_of_their_own(tmp_path):
    copies = []
    for place in ("models-a", "models_a"):
        toys.write_version(tmp_path / place)
        copies.append(RemoteSource(f"file://{tmp_path / place}", tmp_path / "cache").fetch("grey", 1))

    assert copies[0] != copies[1]


def test_a_place_is_no_pattern(tmp_path):
    toys.write_version(tmp_path / "r1")
    (tmp_path / "r[1]").mkdir()
    source = RemoteSource(f"file://{tmp_path / 'r[1]'}", tmp_path / "cache")
    assert source.models() == {}
    toys.write_version(tmp_path / "r[1]", "other")

    assert source.models() == {"other": [1]}
