import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from training import colour
from training.augment import Augmenter
from training.config import AugmentConfig
from training.draws import Column, draws
from training.pixels import unit_range
from training.trivial import Operation, geometric_operations, operations, photometric_operations


def drawn(operation, magnitude=1.0, direction=0.9, count=1):
    values = torch.full((count, len(Column)), 0.5)
    values[:, Column.OPERATION] = (operation + 0.5) / len(Operation)
    values[:, Column.MAGNITUDE] = magnitude
    values[:, Column.DIRECTION] = direction
    return values


def test_all_operations_are_equally_likely():
    counts = torch.bincount(operations(draws(14_000, 0, 0)), minlength=len(Operation))
    assert counts.min() > 850
    assert counts.max() < 1150


@pytest.mark.parametrize("operation", [o for o in Operation if o <= Operation.ROTATE])
def test_geometric_operations_leave_values_and_others_leave_geometry(operation):
    images = torch.rand(1, 3, 8, 8)
    assert torch.equal(photometric_operations(images, drawn(operation)), images)
    moves = not torch.allclose(geometric_operations(drawn(operation), 1.0)[0], torch.eye(2, 3))
    assert moves == (operation is not Operation.IDENTITY)


@pytest.mark.parametrize("operation", [o for o in Operation if o > Operation.ROTATE])
def test_photometric_operations_change_values_within_range(operation):
    images = torch.rand(1, 3, 8, 8) * 0.8 + 0.1
    torch.testing.assert_close(geometric_operations(drawn(operation), 1.0)[0], torch.eye(2, 3))
    for direction in (0.1, 0.9):
        changed = photometric_operations(images, drawn(operation, direction=direction))
        assert not torch.allclose(changed, images)
        assert changed.min() >= 0
        assert changed.max() <= 1


@pytest.mark.parametrize("magnitude", [0.25, 1.0])
@pytest.mark.parametrize(("operation", "row"), [(Operation.SHEAR_X, 0), (Operation.SHEAR_Y, 1)])
def test_shear_is_about_the_corner_as_in_the_paper(operation, row, magnitude):
    """About the centre it would take half as much of the image away."""
    height, width = 32, 64
    images = torch.rand(1, 1, height, width)
    uniform = drawn(operation, magnitude=magnitude)
    shear = 0.99 * magnitude
    grid = functional.affine_grid(
        geometric_operations(uniform, height / width), [1, 1, height, width], align_corners=False
    )
    ours = functional.grid_sample(images, grid, align_corners=False)[0, 0]
    matrix = (1, shear, 0, 0, 1, 0) if row == 0 else (1, 0, 0, shear, 1, 0)
    pillow = Image.fromarray(images[0, 0].numpy()).transform(
        (width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
    )
    inside = torch.from_numpy(np.asarray(pillow).copy()) > 0
    inside[:, -2:] = inside[-2:] = False  # where the two treat the border in their own ways
    assert (ours > 0).float().mean() < 1 - 0.4 * shear * (height / width if row == 0 else width / height / 2)
    close = (ours - torch.from_numpy(np.asarray(pillow).copy())).abs()[inside] < 0.02
    assert close.float().mean() > 0.9


def test_only_the_images_that_drew_an_operation_change():
    images = torch.rand(2, 3, 8, 8)
    both = torch.cat([drawn(Operation.IDENTITY), drawn(Operation.SOLARIZE)])
    changed = photometric_operations(images, both)
    assert torch.equal(changed[0], images[0])
    assert not torch.allclose(changed[1], images[1])


def test_magnitude_zero_is_the_identity_for_blends():
    images = torch.rand(1, 3, 8, 8)
    for operation in (Operation.BRIGHTNESS, Operation.CONTRAST, Operation.SATURATION, Operation.SHARPNESS):
        torch.testing.assert_close(photometric_operations(images, drawn(operation, magnitude=0.0)), images)


@pytest.mark.parametrize("direction", [0.1, 0.9])
def test_geometric_operations_have_the_strengths_of_the_paper(direction):
    sign = -1 if direction < 0.5 else 1
    angle = sign * math.radians(135)
    rotated = geometric_operations(drawn(Operation.ROTATE, direction=direction), 1.0)[0]
    turn = torch.tensor([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]])
    torch.testing.assert_close(rotated, turn, atol=1e-5, rtol=0)
    for operation, axis in ((Operation.TRANSLATE_X, 0), (Operation.TRANSLATE_Y, 1)):
        moved = geometric_operations(drawn(operation, direction=direction), 1.0)[0]
        assert moved[axis, 2].item() == pytest.approx(sign * 2 * 32 / 224, abs=1e-5)  # of a side of 2
        assert moved[1 - axis, 2] == 0


def test_photometric_operations_are_those_of_their_names_with_the_strengths_of_the_paper():
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    blends = {
        Operation.BRIGHTNESS: colour.brightness, Operation.SATURATION: colour.saturation,
        Operation.CONTRAST: colour.contrast, Operation.SHARPNESS: colour.sharpness,
    }  # fmt: skip
    for operation, change in blends.items():
        for direction, factor in ((0.1, 0.01), (0.9, 1.99)):
            found = photometric_operations(images, drawn(operation, direction=direction))
            torch.testing.assert_close(found, change(images, torch.tensor([factor])), atol=1e-6, rtol=0)
    found = photometric_operations(images, drawn(Operation.POSTERIZE))
    torch.testing.assert_close(found, colour.posterize(images, torch.tensor([2])))
    found = photometric_operations(images, drawn(Operation.SOLARIZE, magnitude=0.25))
    torch.testing.assert_close(found, colour.solarize(images, torch.tensor([0.75])))


def test_trivial_augment_alone_turns_images():
    """It has to be sampled although no other setting moves anything."""
    images = torch.randint(0, 256, (1, 8, 8, 3), dtype=torch.uint8)
    augment = Augmenter(AugmentConfig(rotation_degrees=0, translation=0, scale=0, trivial_augment=True))
    augmented = augment(images, drawn(Operation.TRANSLATE_X))
    assert not torch.allclose(augmented, unit_range(images))
