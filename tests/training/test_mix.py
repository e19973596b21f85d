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
