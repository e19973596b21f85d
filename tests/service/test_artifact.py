import json
import os
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service import artifact
from service.artifact import Canary, InputSpec, Manifest, Resize, Variant
from service.errors import ArtifactError


def manifest_of(files, **changes):
    fields = {
        "name": "m",
        "version": 1,
        "created": artifact.now(),
        "architecture": "lenet5",
        "classes": ("cat", "dog"),
        "input": InputSpec(height=8, width=8, channels=1),
        "files": files,
        "variants": (Variant(name="fp32", file="model.onnx"),),
        "canary": Canary(images=("canary/00.png",), probabilities=((0.25, 0.75),)),
    }
    return Manifest(**{**fields, **changes})


def filled(path):
    (path / "canary").mkdir(parents=True)
    (path / "model.onnx").write_bytes(b"graph" * 1000)
    (path / "canary" / "00.png").write_bytes(b"image")
    return artifact.list_files(path)


@pytest.fixture
def published(tmp_path):
    staging = artifact.staging_dir(tmp_path, "m", 1)
    return artifact.publish(staging, tmp_path, manifest_of(filled(staging)))


def test_what_was_published_loads_as_it_was(published):
    version = artifact.load(published)

    assert published.name == "1"
    assert version.manifest.classes == ("cat", "dog")
    assert version.canary_images() == [b"image"]
    assert version.digest == version.manifest.files["model.onnx"].sha256


def test_an_existing_version_is_never_overwritten(tmp_path, published):
    before = (published / "manifest.json").read_bytes()
    staging = artifact.staging_dir(tmp_path, "m", 1)

    with pytest.raises(ArtifactError, match="cannot be published"):
        artifact.publish(staging, tmp_path, manifest_of(filled(staging)))
    assert (published / "manifest.json").read_bytes() == before


def test_staging_directories_belong_to_one_writer_and_are_no_versions(tmp_path, published):
    first, second = (artifact.staging_dir(tmp_path, "m", 2) for _ in range(2))

    assert first != second
    assert first.exists()
    assert artifact.versions(tmp_path / "m") == [1]


def test_only_what_crashed_long_ago_is_cleared_away(tmp_path):
    old, young = (artifact.staging_dir(tmp_path, "m", 1) for _ in range(2))
    (old / "model.onnx").write_bytes(b"half")
    yesterday = time.time() - 25 * 3600
    os.utime(old, (yesterday, yesterday))

    artifact.staging_dir(tmp_path, "m", 1)

    assert not old.exists()
    assert young.exists()


def test_versions_are_numbers_in_order(tmp_path):
    for name in ("10", "9", "1", "0", "01", "latest", ".3.writing-x"):
        (tmp_path / name).mkdir()
    (tmp_path / "7").write_text("a file")

    assert artifact.versions(tmp_path) == [1, 9, 10]
    assert artifact.versions(tmp_path / "missing") == []


@pytest.mark.parametrize("damage", [b"graph" * 999, b"Graph" * 1000, b""])
def test_a_damaged_file_is_found_by_size_or_digest(published, damage):
    (published / "model.onnx").write_bytes(damage)

    with pytest.raises(ArtifactError, match=r"model\.onnx does not match the manifest"):
        artifact.load(published)


def test_a_missing_file_is_named(published):
    (published / "canary" / "00.png").unlink()

    with pytest.raises(ArtifactError, match=r"00\.png is listed in the manifest but cannot be read"):
        artifact.load(published)


def test_a_version_under_another_number_is_refused(published):
    moved = published.rename(published.parent / "2")

    with pytest.raises(ArtifactError, match="the manifest says version 1, the directory says 2"):
        artifact.load(moved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema version 2, but this program reads version 1"),
        ({"name": "../m"}, "name: "),
        ({"classes": ["cat", "cat"]}, "two classes have the same name"),
        ({"classes": ["cat"]}, "classes: "),
        ({"unknown": 1}, "unknown: "),
        ({"temperature": 0}, "temperature: "),
        ({"canary": {"images": ["canary/00.png"], "probabilities": [[1.0]]}}, "1 probabilities for 2 classes"),
        ({"canary": {"images": ["canary/00.png"], "probabilities": []}}, "1 images but 0 rows"),
        ({"canary": {"images": ["x.png"], "probabilities": [[0.5, 0.5]]}}, "x.png is used but not listed"),
        ({"variants": [{"name": "int8", "file": "model.onnx"}]}, "the first variant has to be fp32"),
        ({"input": {"height": 8, "width": 8, "resize": {"shorter_side": 7}}}, "shorter_side 7 is smaller"),
    ],
)
def test_a_manifest_that_breaks_the_schema_is_refused_with_the_field(published, change, message):
    file = published / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))

    with pytest.raises(ArtifactError, match=message):
        artifact.load(published)


@pytest.mark.parametrize("path", ["/etc/passwd", "../secret", "canary/../../secret", "canary\\00.png"])
def test_paths_that_leave_the_directory_are_refused(published, path):
    file = published / "manifest.json"
    raw = json.loads(file.read_text())
    raw["files"][path] = raw["files"]["model.onnx"]
    file.write_text(json.dumps(raw))

    with pytest.raises(ArtifactError, match="points outside"):
        artifact.load(published)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "is not JSON"), (b"\xff\xfe", "cannot be read"), (b"[]", "schema version None")],
)
def test_a_manifest_that_is_no_manifest_is_refused(published, content, message):
    (published / "manifest.json").write_bytes(content)

    with pytest.raises(ArtifactError, match=message):
        artifact.load(published)


def test_a_directory_without_a_manifest_is_no_version(tmp_path):
    with pytest.raises(ArtifactError, match=r"is not a model version: it has no manifest\.json"):
        artifact.load(tmp_path)


def test_a_variant_may_have_a_tolerance_of_its_own(tmp_path):
    files = filled(tmp_path)
    files["model.int8.onnx"] = files["model.fp16.onnx"] = files["model.onnx"]
    variants = (
        Variant(name="fp32", file="model.onnx"),
        Variant(name="int8", file="model.int8.onnx", canary_tolerance=0.08),
        Variant(name="fp16", file="model.fp16.onnx"),
    )

    manifest = manifest_of(files, variants=variants)

    assert manifest.tolerance("model.onnx") == 0.02
    assert manifest.tolerance("model.int8.onnx") == 0.08
    assert manifest.tolerance("model.fp16.onnx") == 0.02


INPUTS = {"image": ("tensor(uint8)", ["batch", 8, 8, 1])}
OUTPUTS = {name: ("tensor(float)", ["batch", 2]) for name in ("logits", "probabilities")}


def test_a_graph_that_keeps_the_contract_passes(published):
    artifact.check_signature(artifact.load(published).manifest, INPUTS, OUTPUTS)


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ({"data": INPUTS["image"]}, OUTPUTS, r"inputs are \['data'\]"),
        (INPUTS, {"logits": OUTPUTS["logits"]}, r"outputs are \['logits'\]"),
        ({"image": ("tensor(float)", ["batch", 8, 8, 1])}, OUTPUTS, r"image is tensor\(float\)"),
        ({"image": ("tensor(uint8)", [4, 8, 8, 1])}, OUTPUTS, r"fixed batch of \[4\]"),
        ({"image": ("tensor(uint8)", ["batch", 8, 8, 3])}, OUTPUTS, r"the manifest says \[N, 8, 8, 1\]"),
        (INPUTS, {**OUTPUTS, "logits": ("tensor(float)", ["batch", 3])}, "for 2 labels"),
    ],
)
def test_a_graph_that_breaks_the_contract_is_refused(published, inputs, outputs, message):
    with pytest.raises(ArtifactError, match=message):
        artifact.check_signature(artifact.load(published).manifest, inputs, outputs)


@settings(deadline=None)  # the first example pays for imports
@given(
    st.builds(
        InputSpec,
        height=st.integers(1, 8192),
        width=st.integers(1, 8192),
        channels=st.sampled_from([1, 3]),
        resize=st.builds(Resize, mode=st.sampled_from(["crop", "stretch"])),
    )
)
def test_an_input_survives_json_and_describes_itself(spec):
    assert InputSpec.model_validate_json(spec.model_dump_json()) == spec
    assert spec.nbytes == spec.height * spec.width * spec.channels
    assert f"{spec.width}x{spec.height}" in spec.describe()
