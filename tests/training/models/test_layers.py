import pytest
import torch
from torch.nn import functional

from training.models.layers import pool_to, scaled


@pytest.mark.parametrize("size", [1, 3, 5, 6, 7])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 9), (5, 5), (7, 13), (12, 6), (14, 21)])
def test_pooling_equals_adaptive_pooling(size, height, width):
    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(height))
    torch.testing.assert_close(pool_to(x, size), functional.adaptive_avg_pool2d(x, size), atol=1e-6, rtol=1e-6)


def test_pooling_has_a_gradient():
    x = torch.randn(1, 2, 9, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: pool_to(y, 7), x)


@pytest.mark.parametrize(
    ("channels", "width", "multiple", "wanted"),
    [
        (64, 1.0, 8, 64),
        (66, 1.0, 8, 66),
        (64, 0.5, 8, 32),
        (64, 0.3, 8, 16),
        (16, 0.1, 8, 8),
        (6, 0.1, 1, 1),
        (6, 2, 1, 12),
    ],
)
def test_widths_are_multiples_and_never_nothing(channels, width, multiple, wanted):
    assert scaled(channels, width, multiple) == wanted
