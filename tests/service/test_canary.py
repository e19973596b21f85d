"""The canary passes what is right, and refuses what is off, not finite, or decoded differently."""

import numpy as np
import pytest
import toys
from variants import register

from service import artifact, canary
from service.artifact import InputSpec, Resize
from service.errors import ArtifactError


@pytest.fixture
def version(tmp_path):
    return artifact.load(toys.write_version(tmp_path))


def test_the_right_engine_passes_with_its_difference(version):
    assert canary.check(version, toys.ToyEngine()) < 1e-5


def test_an_engine_with_smaller_batches_than_the_canary_passes(version):
    engine = toys.ToyEngine(buckets=(1, 2))

    assert canary.check(version, engine) < 1e-5
    assert [len(batch) for batch in engine.batches] == [2, 1]


def test_the_difference_is_the_largest_of_all_images(version):
    class Off(toys.ToyEngine):
        def infer(self, chunks):
            outputs = super().infer(chunks)
            outputs.probabilities[-1, 3] += 0.015
            return outputs

    assert canary.check(version, Off()) == pytest.approx(0.015, abs=1e-4)


def test_an_engine_that_is_off_is_refused_with_figures(version):
    class Off(toys.ToyEngine):
        def infer(self, chunks):
            outputs = super().infer(chunks)
            outputs.probabilities[0, 3] += 0.05
            return outputs

    with pytest.raises(ArtifactError, match=r"off by 0\.05.*ToyProvider.*allowed are 0\.02"):
        canary.check(version, Off())


def test_an_answer_that_is_not_a_number_is_refused(version):
    with pytest.raises(ArtifactError, match="nan"):
        canary.check(version, toys.ToyEngine(nan_at=85))


def test_a_version_that_promises_something_else_is_refused(tmp_path):
    version = artifact.load(toys.write_version(tmp_path, canary_shift=0.1))

    with pytest.raises(ArtifactError, match=r"off by 0\.1"):
        canary.check(version, toys.ToyEngine())


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda path: path.write_bytes(b"no image"), r"85\.png is not what it was"),
        (lambda path: path.unlink(), r"85\.png cannot be read"),
    ],
)
def test_a_canary_image_that_has_changed_or_gone_says_so(version, harm, words):
    harm(version.path / "canary" / "85.png")

    with pytest.raises(ArtifactError, match=words):
        canary.check(version, toys.ToyEngine())


def test_a_canary_image_that_never_was_one_is_the_version_s_fault(version):
    image = version.path / "canary" / "85.png"
    image.write_bytes(b"no image")
    register(version.path, "fp32", "canary/85.png")

    with pytest.raises(ArtifactError, match=r"grey/1: a canary image cannot be used"):
        canary.check(artifact.load(version.path), toys.ToyEngine())


def test_the_images_come_as_the_model_sees_them(tmp_path):
    spec = InputSpec(height=6, width=4, channels=3, resize=Resize(mode="stretch"))
    version = artifact.load(toys.write_version(tmp_path, spec=spec))

    pixels = canary.pixels(version)

    assert (pixels.shape, pixels.dtype) == ((3, 6, 4, 3), np.uint8)
    assert [int(image.mean()) for image in pixels] == [0, 85, 255]
