"""The model version on disk: what is read and what is refused."""

import hashlib
import json
import os
import time

import pytest
import toys

from service import artifact
from service.errors import ArtifactError


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


def test_a_variant_may_have_a_tolerance_of_its_own(version):
    raw = json.loads((version / artifact.MANIFEST).read_text())
    raw["variants"][0]["canary_tolerance"] = 0.25
    rewrite(version, variants=raw["variants"])
    manifest = artifact.read_manifest(version)
    assert (manifest.tolerance("model.onnx"), manifest.tolerance("other")) == (0.25, manifest.canary.tolerance)
