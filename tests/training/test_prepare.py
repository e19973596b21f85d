import io
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from rich.console import Console

from service.artifact import InputSpec, Resize
from service.errors import ConfigurationError, DataError
from service.preprocess import preprocess
from training.config import Experiment, InputConfig
from training.display import Display
from training.distributed import Group
from training.models import create, describe
from training.pixels import channel_statistics
from training.prepare import input_spec, prepare, train_spec

SPEC = InputSpec(height=224, width=224, channels=3, resize=Resize(shorter_side=256))


def experiment(**changes):
    return Experiment.model_validate({"input": {"size": 24, "train_size": 16}, **changes})


def prepared(settings, folder, cache, display=None):
    display = display or Display(Console(file=io.StringIO()))
    return prepare(settings, describe("lenet5"), folder, cache, display, Group())


def test_training_images_are_smaller_with_the_same_view():
    spec = train_spec(InputConfig(train_size=176), SPEC)
    assert spec.shape == (176, 176, 3)
    assert spec.resize == Resize(shorter_side=201)  # 256 * 176 / 224
    stretched = train_spec(InputConfig(train_size=176), InputSpec(height=224, width=224, channels=3))
    assert (stretched.shape, stretched.resize.shorter_side) == ((176, 176, 3), None)


def test_the_size_follows_the_options_of_the_model(digit_folder, tmp_path):
    settings = Experiment.model_validate({"model": {"name": "resnet18", "options": {"small_images": True}}})
    cache = Display(Console(file=io.StringIO()))
    data = prepare(settings, describe("resnet18"), digit_folder, tmp_path, cache, Group())
    assert data.spec.shape == (32, 32, 1)


@pytest.mark.parametrize("size", [None, 224])
def test_without_another_size_there_is_one(size):
    assert train_spec(InputConfig(train_size=size), SPEC) is None


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_each_part_is_decoded_at_its_size(digit_folder, tmp_path, cache):
    data = prepared(experiment(data={"cache": cache}), digit_folder, tmp_path)
    assert (data.batch_spec.height, data.spec.height) == (16, 24)
    for part, spec in (("train", data.batch_spec), ("validation", data.spec), ("test", data.spec)):
        examples, files = data.examples(part), data.files(part)
        assert len(examples) == len(files) == {"train": 240}.get(part, 30)
        for place in (0, len(files) - 1):
            wanted = preprocess(files[place].read_bytes(), spec)
            np.testing.assert_array_equal(examples.images[examples.indices[place]], wanted)
            assert data.dataset.classes[examples.part_labels[place]] == files[place].parent.name


def test_the_split_is_that_of_one_size(digit_folder, tmp_path):
    two = prepared(experiment(), digit_folder, tmp_path)
    one = prepared(experiment(input={"size": 24}), digit_folder, tmp_path)
    assert two.digest() == one.digest()
    for part in ("train", "validation", "test"):
        assert two.files(part) == one.files(part)
    np.testing.assert_array_equal(two.calibration(50), one.calibration(50))
    assert two.training_sample(50).shape == (50, 16, 16, 1)


def test_both_sizes_are_cached_for_the_next_run(digit_folder, tmp_path):
    settings = experiment(data={"cache": "disk"}, export={"calibration_images": 10})
    first = prepared(settings, digit_folder, tmp_path)
    files = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/pixels.npy")}
    assert sorted(np.load(file, mmap_mode="r").shape for file in files) == [(70, 24, 24, 1), (300, 16, 16, 1)]
    again = prepared(settings, digit_folder, tmp_path)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/pixels.npy")} == files
    np.testing.assert_array_equal(first.calibration(10), again.calibration(10))


def test_images_that_vanish_between_the_two_readings_are_said_so(digit_folder, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(digit_folder, images)

    class Vanishing(Display):
        readings = 0

        @contextmanager
        def reading(self, files, what="images"):
            self.readings += 1
            if self.readings == 2:
                shutil.rmtree(images / "3")
            with super().reading(files, what) as advance:
                yield advance

    with pytest.raises(DataError, match=r"3/\d+\.png could be read a moment ago"):
        prepared(experiment(), images, tmp_path / "cache", Vanishing(Console(file=io.StringIO())))


def ready(digit_folder, tmp_path, **tree):
    settings = Experiment.model_validate({"model": {"name": "lenet5"}, "input": {"size": 16}, **tree})
    return prepare(settings, describe("lenet5"), digit_folder, tmp_path, Display(Console(file=io.StringIO())), Group())


def test_pixels_are_normalised_by_the_training_part_alone(digit_folder, tmp_path):
    data = ready(digit_folder, tmp_path, data={"validation": 0.3, "test": 0.3})
    trained = channel_statistics(data.dataset.images, data.split.train)
    assert (data.normalise.mean, data.normalise.std) == trained
    assert trained != channel_statistics(data.dataset.images, data.dataset.usable)


def test_pixels_are_normalised_as_the_weights_were_where_there_are_some(digit_folder, tmp_path):
    state = {"model": create("lenet5", 3, 1).state_dict(), "mean": (0.25,), "std": (0.5,)}
    torch.save(state, tmp_path / "best.pt")
    data = ready(digit_folder, tmp_path, transfer={"weights": str(tmp_path / "best.pt")})
    assert (data.normalise.mean, data.normalise.std) == ((0.25,), (0.5,))


def test_int8_is_calibrated_with_training_images_of_all_classes(digit_folder, tmp_path):
    data = ready(digit_folder, tmp_path)
    trained = {image.tobytes() for image in data.dataset.images[data.split.train]}
    sample = data.calibration(60)
    assert {image.tobytes() for image in sample} <= trained
    place = {
        image.tobytes(): int(data.dataset.labels[row])
        for row, image in zip(data.split.train, data.dataset.images[data.split.train], strict=True)
    }
    assert {place[image.tobytes()] for image in sample} == set(range(10))


def test_the_shorter_side_keeps_its_proportion_to_the_size():
    entry = describe("resnet18")
    spec = input_spec(InputConfig(size=112), entry, 3, {})
    assert (spec.height, spec.resize.shorter_side) == (112, 128)
    assert input_spec(InputConfig(size=112, shorter_side=120), entry, 3, {}).resize.shorter_side == 120


def test_a_shorter_side_is_of_a_crop():
    with pytest.raises(ConfigurationError, match=r"input\.shorter_side is of a crop, and images are stretched"):
        input_spec(InputConfig(shorter_side=40), describe("lenet5"), 1, {})
