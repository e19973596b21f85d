import pytest
import torch

from training import colour
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


@pytest.mark.parametrize(
    ("name", "column", "change"),
    [
        ("brightness", "BRIGHTNESS", colour.brightness),
        ("contrast", "CONTRAST", colour.contrast),
        ("saturation", "SATURATION", colour.saturation),
    ],
)
def test_each_change_of_colour_has_its_own_setting_and_its_own_draw(name, column, change):
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    row = torch.full((2, len(Column)), 0.5)
    row[:, Column[column]] = 1.0
    found = Augmenter(AugmentConfig(**STILL, **{name: 0.4}))(images, row)
    torch.testing.assert_close(found, change(unit_range(images), torch.tensor([1.4, 1.4])), atol=1e-6, rtol=0)


def test_what_is_erased_becomes_the_mean_colour_and_is_anywhere():
    images = torch.randint(0, 256, (1, 40, 40, 3), dtype=torch.uint8) // torch.tensor([1, 2, 4], dtype=torch.uint8)
    images = images.expand(3000, -1, -1, -1)
    erased = Augmenter(AugmentConfig(**STILL, erasing=1.0))(images, draws(3000, 0, 0))
    changed = (erased != unit_range(images)).any(1)
    mean = unit_range(images[:1]).mean((2, 3))[0]
    torch.testing.assert_close(erased[0][:, changed[0]].mean(1), mean)
    rows, columns = changed.any(2), changed.any(1)
    ratio = rows.sum(1) / columns.sum(1)
    free = (rows.sum(1) > 4) & (columns.sum(1) > 4)
    assert 2.6 < ratio[free].max() < 4  # sides of 1 to 3.3, and rounding to pixels
    area = changed.float().mean((1, 2))
    assert area.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.02)
    middle = torch.stack([(m.float() * torch.arange(40)).sum(1) / m.sum(1) for m in (rows, columns)])
    small = area < 0.1
    assert abs(torch.corrcoef(middle[:, small])[0, 1]) < 0.2
    assert middle[:, small].min() < 5
    assert middle[:, small].max() > 34
