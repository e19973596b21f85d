import numpy as np
import pytest
import torch

from training.config import AugmentConfig
from training.mix import Mixer


@pytest.fixture
def batch():
    return torch.rand(6, 3, 12, 10), torch.arange(6)


def test_nothing_is_mixed_by_default(batch):
    inputs, labels = batch
    mixed = Mixer(AugmentConfig(), 0)(inputs, labels, 0)
    assert mixed.inputs is inputs
    assert mixed.partners is None


def test_mixup_blends_with_the_share_of_the_target(batch):
    inputs, labels = batch
    mixed = Mixer(AugmentConfig(mixup=0.4), 0)(inputs, labels, 5)
    expected = mixed.share * inputs + (1 - mixed.share) * inputs[mixed.partners]
    torch.testing.assert_close(mixed.inputs, expected)
    assert 0 <= mixed.share <= 1
    assert (mixed.partners != labels).all()


def test_the_share_of_cutmix_is_the_area_that_stayed(batch):
    inputs, labels = batch
    mixer = Mixer(AugmentConfig(cutmix=1.0), 0)
    shares = set()
    for step in range(20):
        mixed = mixer(inputs, labels, step)
        stayed = (mixed.inputs == inputs).all(1)
        came = (mixed.inputs == inputs[mixed.partners]).all(1)
        assert (stayed | came).all()
        assert stayed[0].float().mean().item() == pytest.approx(mixed.share)
        shares.add(round(mixed.share, 3))
    assert len(shares) > 10


def test_a_step_is_mixed_the_same_way_again(batch):
    mixer = Mixer(AugmentConfig(mixup=0.2, cutmix=1.0), 3)
    for step in range(10):
        assert torch.equal(mixer(*batch, step).inputs, mixer(*batch, step).inputs)
    shares = {mixer(*batch, step).share for step in range(10)}
    assert len(shares) > 5


def test_a_single_image_has_no_partner(batch):
    inputs, labels = batch
    assert Mixer(AugmentConfig(mixup=1.0), 0)(inputs[:1], labels[:1], 0).partners is None


def test_mixup_draws_its_share_from_a_symmetric_beta():
    inputs, labels = torch.zeros(2, 1, 4, 4), torch.arange(2)
    shares = np.array([Mixer(AugmentConfig(mixup=0.3), 0)(inputs, labels, step).share for step in range(2000)])
    assert shares.mean() == pytest.approx(0.5, abs=0.03)
    assert shares.var() == pytest.approx(0.25 / (2 * 0.3 + 1), abs=0.015)


def test_a_box_of_cutmix_has_the_drawn_area_and_the_proportions_of_the_image():
    height, width = 60, 30
    inputs = torch.stack([torch.zeros(1, height, width), torch.ones(1, height, width)])
    areas = []
    for step in range(1500):
        mixed = Mixer(AugmentConfig(cutmix=1.0), 0)(inputs, torch.arange(2), step)
        came = mixed.inputs[0, 0] > 0
        rows, columns = (came.any(axis).nonzero().flatten() for axis in (1, 0))
        if len(rows) and rows.min() > 0 and rows.max() < height - 1 and columns.min() > 0 and columns.max() < width - 1:
            assert len(rows) / height == pytest.approx(len(columns) / width, abs=2 / width)
        areas.append(1 - mixed.share)
    random = np.random.default_rng(1)
    side, centre = np.sqrt(1 - random.beta(1, 1, 100_000)), random.random((2, 100_000))
    spans = np.minimum(1, centre + side / 2) - np.maximum(0, centre - side / 2)
    assert np.mean(areas) == pytest.approx(spans.prod(0).mean(), abs=0.02)


def test_either_kind_is_drawn_where_both_are_on():
    inputs, labels = torch.rand(2, 1, 40, 40), torch.arange(2)
    mixer = Mixer(AugmentConfig(mixup=1.0, cutmix=1.0), 0)
    cut = [bool((m.inputs == inputs).any()) for m in (mixer(inputs, labels, step) for step in range(100))]
    assert 30 < sum(cut) < 70
