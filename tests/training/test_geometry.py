import math

import numpy as np
import pytest
import torch
from PIL import Image

from training.config import AugmentConfig
from training.draws import Column, draws
from training.geometry import Geometry
from training.pixels import unit_range
from training.trivial import Operation, geometric_operations

STILL = {"rotation_degrees": 0, "translation": 0, "scale": 0}


def uniform(count=1, **columns):
    """Draws that change nothing, but for the given columns."""
    values = torch.full((count, len(Column)), 0.5)
    values[:, [Column.OPERATION, Column.MAGNITUDE]] = 0.0
    for name, value in columns.items():
        values[:, Column[name]] = value
    return values


def photo(height=24, width=24, channels=3):
    """A smooth picture, uint8[1, H, W, C], on which resampling by whole pixels or right angles is exact."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    planes = [(x * 7 + y * 3 + 40 * c) % 256 for c in range(channels)]
    return torch.stack(planes, dim=-1).to(torch.uint8)[None]


def resampled(config, draw, images):
    return Geometry(config).resample(unit_range(images), draw)[0]


def test_a_draw_in_the_middle_changes_nothing():
    images = photo()
    config = AugmentConfig(rotation_degrees=45, translation=0.3, scale=0.5)
    torch.testing.assert_close(resampled(config, uniform(), images), unit_range(images)[0], atol=1e-5, rtol=0)


def test_a_quarter_turn_is_exact():
    images = photo()
    turned = resampled(AugmentConfig(**{**STILL, "rotation_degrees": 90}), uniform(ANGLE=1.0), images)
    torch.testing.assert_close(turned, torch.rot90(unit_range(images)[0], 1, (1, 2)), atol=1e-4, rtol=0)


def test_rotation_keeps_squares_square_in_wide_images():
    images = torch.zeros(1, 40, 80, 1, dtype=torch.uint8)
    images[:, 12:28, 32:48] = 255  # a square of 16x16 in the middle
    config = AugmentConfig(**{**STILL, "rotation_degrees": 90, "fill": "zeros"})
    turned = resampled(config, uniform(ANGLE=1.0), images)
    torch.testing.assert_close(turned, unit_range(images)[0], atol=1e-4, rtol=0)


def test_translation_moves_by_a_fraction_of_the_side():
    images = photo(20, 20)
    config = AugmentConfig(**{**STILL, "translation": 0.25})
    moved = resampled(config, uniform(SHIFT_X=1.0), images)
    torch.testing.assert_close(moved[:, :, :15], unit_range(images)[0][:, :, 5:], atol=1e-4, rtol=0)


def test_scale_reaches_its_bounds_in_both_directions():
    matrix = Geometry(AugmentConfig(**{**STILL, "scale": 0.5})).matrices
    shape = torch.Size([1, 1, 10, 10])
    assert matrix(uniform(SCALE=1.0), shape)[0, 0, 0].item() == pytest.approx(1 / 1.5)
    assert matrix(uniform(SCALE=0.0), shape)[0, 0, 0].item() == pytest.approx(1.5)


@pytest.mark.parametrize(("flag", "column", "axis"), [("horizontal_flip", "FLIP_X", 2), ("vertical_flip", "FLIP_Y", 1)])
def test_flips_are_exact_on_both_ways(flag, column, axis):
    images = photo(12, 16)
    draw = uniform(**{column: 0.1})
    gathered = Geometry(AugmentConfig(**STILL, **{flag: True})).gather(images, draw)
    assert torch.equal(gathered, images.flip(axis))
    turned = resampled(AugmentConfig(**{**STILL, "rotation_degrees": 1e-6, flag: True}), draw, images)
    torch.testing.assert_close(turned, unit_range(images.flip(axis))[0], atol=1e-4, rtol=0)


def test_flips_are_off_by_default():
    config = AugmentConfig()
    matrices = Geometry(config).matrices(draws(500, 0, 0), torch.Size([500, 1, 8, 8]))
    assert torch.linalg.det(matrices[:, :, :2]).min() > 0


@pytest.mark.parametrize("fill", ["zeros", "border", "reflection"])
def test_whole_pixel_shifts_agree_with_numpy_padding(fill):
    images = photo(9, 7)
    mode = {"zeros": "constant", "border": "edge", "reflection": "symmetric"}[fill]
    padded = np.pad(images[0].numpy(), ((3, 3), (3, 3), (0, 0)), mode=mode)
    config = AugmentConfig(**STILL, crop_padding=3, fill=fill)
    for row, value_y in enumerate(np.linspace(0.05, 0.95, 7)):
        draw = uniform(CROP_X=0.99, CROP_Y=float(value_y))
        shift_y, shift_x = int(value_y * 7), 6
        assert row == shift_y
        expected = padded[shift_y : shift_y + 9, shift_x : shift_x + 7]
        np.testing.assert_array_equal(Geometry(config).gather(images, draw)[0].numpy(), expected)


@pytest.mark.parametrize("fill", ["zeros", "border", "reflection"])
def test_each_image_has_a_crop_and_flips_of_its_own_even_if_the_padding_is_wider_than_it(fill):
    padding, height, width = 12, 5, 4
    images = torch.randint(
        0, 256, (60, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    config = AugmentConfig(**STILL, crop_padding=padding, horizontal_flip=True, vertical_flip=True, fill=fill)
    uniform = draws(60, 3, 0)

    gathered = Geometry(config).gather(images, uniform).numpy()

    mode = {"zeros": "constant", "border": "edge", "reflection": "symmetric"}[fill]
    padded = np.pad(images.numpy(), ((0, 0), (padding, padding), (padding, padding), (0, 0)), mode=mode)
    for image, drawn, found in zip(padded, uniform.numpy(), gathered, strict=True):
        top, left = (int(drawn[column] * (2 * padding + 1)) for column in (Column.CROP_Y, Column.CROP_X))
        window = image[top : top + height, left : left + width]
        window = window[::-1] if drawn[Column.FLIP_Y] < 0.5 else window
        window = window[:, ::-1] if drawn[Column.FLIP_X] < 0.5 else window
        np.testing.assert_array_equal(found, window)


def test_a_crop_of_the_area_is_an_enlarged_part_of_the_image():
    images = photo(64, 64)
    config = AugmentConfig(**STILL, crop_area=0.25)
    draw = uniform(AREA=0.0, CROP_X=0.0, CROP_Y=0.0)
    crop = resampled(config, draw, images)
    left_top = Image.fromarray(images[0].numpy()).crop((0, 0, 32, 32)).resize((64, 64), Image.Resampling.BILINEAR)
    error = (crop.permute(1, 2, 0).numpy() * 255 - np.asarray(left_top, dtype=np.float32))[4:-4, 4:-4]
    assert np.abs(error).mean() < 2


def test_crops_stay_inside_of_the_image():
    config = AugmentConfig(**STILL, crop_area=0.1)
    matrices = Geometry(config).matrices(draws(2000, 0, 0), torch.Size([2000, 3, 64, 64]))
    reach = matrices[:, [0, 1], [0, 1]].abs() + matrices[:, :, 2].abs()
    assert reach.max() <= 1 + 1e-5
    assert matrices[:, 0, 0].min() < math.sqrt(0.15)


def test_an_image_has_its_fate_whatever_its_batch():
    images = torch.randint(0, 256, (6, 16, 16, 3), dtype=torch.uint8)
    draw = draws(6, 1, 2)
    geometry = Geometry(AugmentConfig(rotation_degrees=30, trivial_augment=True))
    together = geometry.resample(unit_range(images), draw)
    alone = torch.cat([geometry.resample(unit_range(images[i : i + 1]), draw[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)


def drawn(operation, magnitude=1.0, direction=0.9):
    return uniform(OPERATION=(operation + 0.5) / len(Operation), MAGNITUDE=magnitude, DIRECTION=direction)


@pytest.mark.parametrize("fill", ["zeros", "border", "reflection"])
def test_whole_pixel_shifts_are_the_same_where_other_changes_resample(fill):
    """Both ways to move have to agree in every direction: rows by the draw of rows, columns by that of columns."""
    images = torch.randint(0, 256, (30, 9, 7, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plain = AugmentConfig(**STILL, crop_padding=3, fill=fill)
    turning = AugmentConfig(**{**STILL, "rotation_degrees": 1e-6}, crop_padding=3, fill=fill)
    row = draws(30, 0, 0)
    gathered = unit_range(Geometry(plain).gather(images, row))
    torch.testing.assert_close(Geometry(turning).resample(unit_range(images), row), gathered, atol=1e-3, rtol=0)


def test_crops_lie_anywhere_and_have_the_aspect_that_is_promised():
    config = AugmentConfig(**STILL, crop_area=0.2)
    matrices = Geometry(config).matrices(draws(4000, 0, 0), torch.Size([4000, 3, 64, 64]))
    x, y = matrices[:, 0, 2], matrices[:, 1, 2]
    assert abs(torch.corrcoef(torch.stack([x, y]))[0, 1]) < 0.1
    aspect = matrices[:, 0, 0] / matrices[:, 1, 1]
    inner = (matrices[:, 0, 0] < 0.99) & (matrices[:, 1, 1] < 0.99)
    assert aspect[inner].max() == pytest.approx(4 / 3, abs=0.01)
    assert aspect[inner].min() == pytest.approx(3 / 4, abs=0.01)
    area = matrices[:, 0, 0] * matrices[:, 1, 1]
    assert area.min() == pytest.approx(0.2, abs=0.01)
    assert area.mean() == pytest.approx(0.6, abs=0.02)


def test_the_operation_of_trivial_augment_is_composed_with_the_other_changes():
    both = AugmentConfig(**{**STILL, "rotation_degrees": 40}, horizontal_flip=True, trivial_augment=True)
    alone = both.model_copy(update={"trivial_augment": False})
    shape = torch.Size([1, 1, 12, 20])
    row = drawn(Operation.TRANSLATE_X)
    row[:, Column.ANGLE], row[:, Column.FLIP_X] = 0.9, 0.1

    def square(matrix):
        return torch.cat([matrix[0], torch.tensor([[0.0, 0, 1]])])

    expected = square(Geometry(alone).matrices(row, shape)) @ square(geometric_operations(row, 12 / 20))
    torch.testing.assert_close(square(Geometry(both).matrices(row, shape)), expected)
