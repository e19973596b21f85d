import pytest
import torch

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
