"""Versions in a place that is mirrored. A `file://` URL takes the way of a bucket's."""

import errno
import multiprocessing
import os
import shutil
import time
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
import toys
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from service import artifact, mirror
from service.errors import ArtifactError, ConfigurationError, ConvoyError, OutOfReachError
from service.sources import LocalSource, RemoteSource


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


class Failing(LocalFileSystem):
    """Cannot list a folder."""

    protocol = "failing"
    broken: ClassVar = ""

    def ls(self, path, detail=False, **options):
        if self.broken and str(path).rstrip("/").endswith(self.broken):
            raise OSError(110, "503 SlowDown")
        return super().ls(path, detail=detail, **options)


@pytest.mark.parametrize("broken", ["bucket", "grey", "grey/1"])
def test_what_cannot_be_listed_is_not_gone(bucket, tmp_path, monkeypatch, broken):
    fsspec.register_implementation("failing", Failing, clobber=True)
    source = RemoteSource(f"failing://{bucket}", tmp_path / "cache")
    assert source.models() == {"grey": [1]}

    monkeypatch.setattr(Failing, "broken", broken)
    with pytest.raises(ConfigurationError, match="SlowDown"):
        source.models()


@pytest.mark.parametrize("broken", ["grey/1", "grey/1/canary"])
def test_a_fingerprint_that_cannot_be_had_is_none(bucket, tmp_path, monkeypatch, broken):
    fsspec.register_implementation("failing", Failing, clobber=True)
    source = RemoteSource(f"failing://{bucket}", tmp_path / "cache")
    assert source.fingerprint("grey", 1)

    monkeypatch.setattr(Failing, "broken", broken)
    with pytest.raises(OutOfReachError, match="SlowDown"):
        source.fingerprint("grey", 1)


def test_a_local_version_that_cannot_be_looked_at_is_out_of_reach(bucket, monkeypatch):
    scandir = os.scandir

    def stale(path):
        if str(path).endswith("canary"):
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", stale)
    with pytest.raises(OutOfReachError, match="Stale file handle"):
        LocalSource(bucket).fingerprint("grey", 1)


def test_one_directory_that_cannot_be_reached_hides_no_other(bucket, monkeypatch):
    toys.write_version(bucket, "aaa", 1)
    stat = os.stat

    def dead(path, *args, **options):
        if str(path).endswith("/aaa"):
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected", str(path))
        return stat(path, *args, **options)

    monkeypatch.setattr(os, "stat", dead)
    assert LocalSource(bucket).models() == {"grey": [1]}


class Overtaken(LocalFileSystem):
    """While it downloads, another process is faster."""

    protocol = "overtaken"
    other: ClassVar = lambda: None

    def get_file(self, rpath, lpath, **options):
        super().get_file(rpath, lpath, **options)
        other, Overtaken.other = Overtaken.other, lambda: None
        other()


def test_of_two_processes_with_one_cache_the_second_leaves_the_copy_of_the_first(bucket, tmp_path, monkeypatch):
    fsspec.register_implementation("overtaken", Overtaken, clobber=True)
    source = RemoteSource(f"overtaken://{bucket}", tmp_path / "cache")
    first = []
    monkeypatch.setattr(Overtaken, "other", lambda: first.append(source.fetch("grey", 1).stat().st_ino))
    copy = source.fetch("grey", 1)

    assert artifact.load(copy)
    assert first == [copy.stat().st_ino]


def test_while_a_copy_is_put_in_its_place_another_process_waits(bucket, tmp_path):
    """Two processes that start together, as two servers on one machine do."""
    context = multiprocessing.get_context("spawn")
    for attempt in range(3):
        begin, found = context.Barrier(2), context.Queue()
        arguments = (f"file://{bucket}", tmp_path / f"cache{attempt}", begin, found)
        pair = [context.Process(target=fetched, args=arguments) for _ in range(2)]
        for process in pair:
            process.start()
        assert [found.get(timeout=60) for _ in pair] == ["whole", "whole"]
        for process in pair:
            process.join()


def fetched(url, cache, begin, found):
    source = RemoteSource(url, cache)
    begin.wait()
    try:
        copy = source.fetch("grey", 1)
        for _ in range(50):
            artifact.load(copy)
    except (ConvoyError, OSError) as error:
        found.put(repr(error))
    else:
        found.put("whole")


def test_a_version_that_was_replaced_takes_the_place_of_its_copy(bucket, source):
    source.fetch("grey", 1)
    shutil.rmtree(bucket / "grey" / "1")
    toys.write_version(bucket, "grey", 1, classes=4)

    assert len(artifact.load(source.fetch("grey", 1)).manifest.classes) == 4
    assert [path.name for path in source.fetch("grey", 1).parent.iterdir()] == ["1"]


def test_what_killed_downloads_left_is_removed_and_what_others_write_is_not(bucket, source, tmp_path):
    model = source.fetch("grey", 1).parent
    toys.write_version(bucket, "grey", 2)
    with mirror.staging(model.parent, "grey", 3) as busy:
        dead, young = model / ".2.writing-dead", model / ".2.writing-young"
        dead.mkdir()
        young.mkdir()
        for path in (busy, dead):
            os.utime(path, (0, time.time() - 600))
        source.fetch("grey", 2)

        assert (busy.exists(), dead.exists(), young.exists()) == (True, False, True)


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


def test_symbolic_links_are_followed(source, bucket, tmp_path_factory):
    """As in volumes of Kubernetes, and where a repository is put together of links."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    version = toys.write_version(elsewhere, "grey", 2)
    (bucket / "grey" / "2").symlink_to(version)
    toys.write_version(bucket, "grey", 3)
    manifest = bucket / "grey" / "3" / artifact.MANIFEST
    manifest.rename(elsewhere / "manifest.json")
    manifest.symlink_to(elsewhere / "manifest.json")
    toys.write_version(elsewhere, "other", 1)
    (bucket / "other").symlink_to(elsewhere / "other")
    (bucket / "broken").symlink_to(elsewhere / "nowhere")

    assert source.models() == {"grey": [1, 2, 3], "other": [1]}
    before = source.fingerprint("grey", 2)
    assert before
    (version / "model.onnx").write_bytes(b"changed")
    assert source.fingerprint("grey", 2) != before
    assert source.fetch("grey", 3).is_dir()


def test_what_is_hidden_or_written_otherwise_is_no_version(source, bucket):
    for other in ("grey/04", "grey/0", "grey/x", ".trash/3"):
        shutil.copytree(bucket / "grey" / "1", bucket / other)

    assert source.models() == {"grey": [1]}


def test_copies_of_what_is_neither_present_nor_served_go(source, bucket):
    for number in (2, 3):
        toys.write_version(bucket, "grey", number)
    one, two, three = (source.fetch("grey", number) for number in (1, 2, 3))
    for number in (1, 2):
        shutil.rmtree(bucket / "grey" / str(number))
    source.tidy({"grey": [3]}, {("grey", 2)})

    assert [path.exists() for path in (one, two, three)] == [False, True, True]


def test_a_copy_of_what_was_published_since_the_look_stays(source, bucket):
    """Another server with the same cache has fetched it; this one has been loading for minutes since it looked."""
    looked = source.models()
    toys.write_version(bucket, "grey", 2)
    fetched = source.fetch("grey", 2)
    source.tidy(looked, ())

    assert fetched.exists()


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


@pytest.mark.parametrize("remote", [False, True])
def test_files_that_are_replaced_by_others_of_their_size_look_different(bucket, source, remote):
    looked_at = source if remote else LocalSource(bucket)
    before = looked_at.fingerprint("grey", 1)
    assert looked_at.fingerprint("grey", 1) == before
    file = bucket / "grey" / "1" / artifact.MODEL
    file.write_bytes(bytes(file.stat().st_size))
    os.utime(file, (1, 1))

    assert looked_at.fingerprint("grey", 1) != before
