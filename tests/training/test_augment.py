import pytest
import torch

from training.augment import Augmenter
from training.config import AugmentConfig
from training.draws import Column, draws
from training.pixels import unit_range

STILL = {"rotation_degrees": 0, "translation": 0, "scale": 0}
EVERYTHING = {
    "rotation_degrees": 20,
    "crop_area": 0.5,
    "horizontal_flip": True,
    "brightness": 0.3,
    "contrast": 0.3,
    "saturation": 0.3,
    "trivial_augment": True,
    "erasing": 0.5,
}


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (40, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_nothing_asked_for_is_nothing_done(images):
    assert torch.equal(Augmenter(AugmentConfig(**STILL))(images, draws(40, 0, 0)), unit_range(images))


def test_everything_at_once_stays_in_range_and_repeats(images):
    augment = Augmenter(AugmentConfig(**EVERYTHING))
    first = augment(images, draws(40, 7, 3))
    assert first.shape == (40, 3, 16, 16)
    assert first.min() >= 0
    assert first.max() <= 1
    assert torch.equal(first, augment(images, draws(40, 7, 3)))
    assert not torch.equal(first, augment(images, draws(40, 7, 4)))
    assert not torch.equal(first, augment(images, draws(40, 8, 3)))


def test_the_input_is_not_changed(images):
    before = images.clone()
    Augmenter(AugmentConfig(**EVERYTHING))(images, draws(40, 0, 0))
    assert torch.equal(images, before)


def test_erasing_blanks_a_rectangle_of_the_drawn_size(images):
    uniform = draws(40, 0, 0)
    erased = Augmenter(AugmentConfig(**STILL, erasing=0.5))(images, uniform)
    changed = (erased != unit_range(images)).any(1)
    chosen = uniform[:, Column.ERASE] < 0.5
    assert torch.equal(changed.any(2).any(1), chosen)
    for mask, image in zip(changed[chosen], erased[chosen], strict=True):
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        assert mask.sum() == len(rows) * len(columns)
        assert 0.01 <= mask.float().mean() <= 0.45
        assert image[:, mask].std(1).max() < 1e-6


def test_colour_strength_bounds_the_change(images):
    augmented = Augmenter(AugmentConfig(**STILL, brightness=0.1))(images, draws(40, 0, 0))
    ratio = augmented[unit_range(images) > 0.1] / unit_range(images)[unit_range(images) > 0.1]
    assert ratio.max() <= 1.1 + 1e-5
    assert ratio.min() >= 0.9 - 1e-5
