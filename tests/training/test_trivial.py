import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from training.draws import Column, draws
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
