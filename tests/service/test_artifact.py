"""The model version on disk: what is read and what is refused."""

import hashlib
import json
import os
import resource
import time
from contextlib import contextmanager

import pytest
import toys
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from service import artifact
from service.artifact import InputSpec, Resize
from service.errors import ArtifactError, OutOfReachError


@pytest.fixture
def version(tmp_path):
    return toys.write_version(tmp_path)


def rewrite(path, **changes):
    """Changes fields of the manifest on disk."""
    file = path / artifact.MANIFEST
    raw = json.loads(file.read_text())
    raw.update(changes)
    file.write_text(json.dumps(raw))


def test_what_was_published_is_read_back(version):
    loaded = artifact.load(version)

    assert (loaded.manifest.name, loaded.manifest.version, len(loaded.manifest.classes)) == ("grey", 1, 10)
    assert loaded.digest == artifact.file_entry(version / artifact.MODEL).sha256
    assert loaded.canary_images() == [toys.grey_png(level) for level in (0, 85, 255)]


@pytest.mark.parametrize(("gently", "rests"), [(True, 4), (False, 0)])
def test_hashing_gently_rests_after_each_piece_and_finds_the_same(tmp_path, monkeypatch, gently, rests):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    file = tmp_path / "model.onnx"
    file.write_bytes(os.urandom((3 << 19) + 7))

    found = artifact.file_entry(file, gently=gently)

    assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert found.size_bytes == (3 << 19) + 7
    assert len(slept) == rests


def test_a_directory_without_a_manifest_is_no_version(tmp_path):
    with pytest.raises(ArtifactError, match=r"no manifest\.json.*convoy train"):
        artifact.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "not json", "[]", "null", '"x"'])
def test_a_manifest_that_is_no_object_is_refused(version, text):
    (version / artifact.MANIFEST).write_text(text)

    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        artifact.load(version)


def test_a_manifest_in_another_encoding_is_refused(version):
    (version / artifact.MANIFEST).write_bytes(b"\xff\xfe{\x00}\x00")

    with pytest.raises(ArtifactError, match="cannot be read"):
        artifact.load(version)


def test_a_newer_schema_says_so(version):
    rewrite(version, schema_version=2)

    with pytest.raises(ArtifactError, match="schema version 2"):
        artifact.load(version)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"surprise": 1}, "surprise"),
        ({"name": "../evil"}, "name"),
        ({"version": 0}, "version"),
        ({"temperature": 0}, "temperature"),
        ({"classes": ["a"] * 10}, "same name"),
        ({"classes": ["one"]}, "classes"),
        ({"variants": []}, "variants"),
        ({"variants": [{"name": "int8", "file": "model.onnx"}]}, "fp32"),
        ({"files": {}}, "not listed"),
        ({"input": {"height": 0, "width": 8}}, "height"),
        ({"input": {"height": 8, "width": 8, "channels": 2}}, "channels"),
    ],
)
def test_a_manifest_that_breaks_the_schema_names_the_field(version, changes, words):
    rewrite(version, **changes)

    with pytest.raises(ArtifactError, match=words):
        artifact.load(version)


@pytest.mark.parametrize("path", ["/etc/passwd", "../grey/1/model.onnx", "a/../../b", "c:\\x"])
def test_a_file_outside_of_the_version_is_refused(version, path):
    raw = json.loads((version / artifact.MANIFEST).read_text())
    rewrite(version, files={**raw["files"], path: {"sha256": "0" * 64, "size_bytes": 1}})

    with pytest.raises(ArtifactError, match="points outside of the version's directory"):
        artifact.load(version)


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "half of \ud83d"},
        {"metrics": {"top-1 \ud83d": 1.0}},
        {"data": {"source": {"a": ["\ud83d"]}}},
        {"weights": {"source": "\ud83d"}},
    ],
)
def test_a_text_that_no_answer_can_hold_is_refused(version, changes):
    rewrite(version, **changes)

    with pytest.raises(ArtifactError, match="text that cannot be sent"):
        artifact.load(version)


def test_a_class_that_no_answer_can_hold_is_refused(version):
    raw = json.loads((version / artifact.MANIFEST).read_text())
    rewrite(version, classes=["half of \ud83d", *raw["classes"][1:]])

    with pytest.raises(ArtifactError, match="no text that can be sent") as caught:
        artifact.load(version)
    str(caught.value).encode()


@pytest.mark.parametrize("path", ["", "a\0b", "half of \ud83d"])
def test_a_file_that_no_system_can_name_is_refused(version, path):
    raw = json.loads((version / artifact.MANIFEST).read_text())
    rewrite(version, files={**raw["files"], path: {"sha256": "0" * 64, "size_bytes": 1}})

    with pytest.raises(ArtifactError, match="is no path of a file") as caught:
        artifact.load(version)
    str(caught.value).encode()


@contextmanager
def no_file_can_be_opened():
    """The process has as many files open as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_cannot_be_read_now_is_told_apart_from_damage(version):
    loaded = artifact.load(version)
    for read in (lambda: artifact.unverified(version), lambda: artifact.verify(loaded), loaded.canary_images):
        with no_file_can_be_opened(), pytest.raises(OutOfReachError, match="Too many open files"):
            read()
        artifact.load(version)  # nothing is wrong with it


def test_a_changed_byte_is_found(version):
    file = version / artifact.MODEL
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)

    with pytest.raises(ArtifactError, match=r"model\.onnx does not match.*half-copied"):
        artifact.load(version)


def test_a_half_copied_file_is_found(version):
    file = version / artifact.MODEL
    file.write_bytes(file.read_bytes()[:100])

    with pytest.raises(ArtifactError, match="size 100 for"):
        artifact.load(version)


def test_a_missing_file_is_found(version):
    (version / "canary" / "85.png").unlink()

    with pytest.raises(ArtifactError, match=r"85\.png") as caught:
        artifact.load(version)
    assert not isinstance(caught.value, OutOfReachError)


def test_canary_images_that_are_others_now_are_no_canary(version):
    """Somebody publishes over the version in service; the model in memory is still what it was."""
    loaded = artifact.load(version)
    (version / loaded.manifest.canary.images[1]).write_bytes(toys.grey_png(255))

    with pytest.raises(ArtifactError, match="not what it was"):
        loaded.canary_images()


def test_a_directory_of_another_number_is_refused(version):
    with pytest.raises(ArtifactError, match="the manifest says version 1, the directory says 2"):
        artifact.load(version.rename(version.parent / "2"))


def signature(element="tensor(uint8)", shape=("N", 8, 8, 1), outputs=("logits", "probabilities"), out=("N", 10)):
    return {"image": (element, list(shape))}, {name: ("tensor(float)", list(out)) for name in outputs}


def test_a_graph_that_keeps_the_contract_passes(version):
    artifact.check_signature(artifact.load(version).manifest, *signature())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"element": "tensor(float)"}, r"image is tensor\(float\).*tensor\(uint8\)"),
        ({"shape": (1, 8, 8, 1)}, "fixed batch"),
        ({"shape": ()}, "fixed batch"),
        ({"shape": ("N", 9, 8, 1)}, r"\[N, 8, 8, 1\]"),
        ({"outputs": ("logits",)}, "outputs"),
        ({"outputs": ("logits", "probabilities", "extra")}, "extra"),
        ({"out": ("N", 11)}, "for 10 labels"),
    ],
)
def test_a_graph_that_breaks_the_contract_is_refused(version, change, words):
    with pytest.raises(ArtifactError, match=words):
        artifact.check_signature(artifact.load(version).manifest, *signature(**change))


def test_versions_are_numbers_in_order_and_nothing_else(tmp_path):
    for name in ("10", "9", "1", "01", "0", "x", ".2.writing-abc", "3.bak"):
        (tmp_path / name).mkdir()
    (tmp_path / "7").write_text("a file")

    assert artifact.versions(tmp_path) == [1, 9, 10]
    assert artifact.versions(tmp_path / "missing") == []


def test_a_crop_larger_than_the_resize_is_refused():
    with pytest.raises(ValidationError, match="shorter_side"):
        InputSpec(height=224, width=224, resize=Resize(shorter_side=200))


@given(
    height=st.integers(1, 500),
    width=st.integers(1, 500),
    channels=st.sampled_from([1, 3]),
    mode=st.sampled_from(["crop", "stretch"]),
)
def test_an_input_describes_itself(height, width, channels, mode):
    spec = InputSpec(height=height, width=width, channels=channels, resize=Resize(mode=mode))

    assert spec.nbytes == height * width * channels
    assert f"{width}x{height}" in spec.describe()


@pytest.mark.parametrize("path", ["/etc/passwd", "../grey/1/model.onnx", "a/../../b", "c:\\x"])
def test_a_path_that_leads_out_is_refused_by_the_schema(version, path):
    files = json.loads((version / artifact.MANIFEST).read_text())["files"]
    entry = {"sha256": hashlib.sha256(b"").hexdigest(), "size_bytes": 0}
    rewrite(version, files={**files, path: entry})
    with pytest.raises(ArtifactError, match="points outside of the version's directory"):
        artifact.read_manifest(version)


def test_a_variant_may_have_a_tolerance_of_its_own(version):
    raw = json.loads((version / artifact.MANIFEST).read_text())
    raw["variants"][0]["canary_tolerance"] = 0.25
    rewrite(version, variants=raw["variants"])
    manifest = artifact.read_manifest(version)
    assert (manifest.tolerance("model.onnx"), manifest.tolerance("other")) == (0.25, manifest.canary.tolerance)
