"""What is particular to the eight-layer network: its whitening stem and where it pools."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images
from torch.nn import functional

from training.graph import Servable, to_onnx
from training.models import create, describe


@pytest.fixture(scope="module")
def photos():
    """54 pieces of two real photos: float32[54, 3, 32, 32] in -1..1."""
    whole = np.stack([image[:384:2, :576:2] for image in load_sample_images().images])  # [2, 192, 288, 3]
    pieces = torch.from_numpy(whole).unfold(1, 32, 32).unfold(2, 32, 32)  # [2, 6, 9, 3, 32, 32]
    return pieces.reshape(-1, 3, 32, 32).float() / 127.5 - 1


def test_the_stem_starts_with_uncorrelated_outputs_of_one_variance(photos):
    model = create("resnet8", 10)
    model.adapt_to(photos)
    with torch.no_grad():
        answers = model.stem(photos)  # [54, 24, 31, 31]
    covariance = torch.cov(answers.transpose(0, 1).flatten(1))
    directions = covariance[:12, :12]
    # Neighbouring pixels are so alike that some directions hardly vary; those are not blown up to noise.
    assert 0.95 < directions.diagonal().max() < 1.001
    assert directions.diagonal().min() > 0.02
    assert (directions - torch.diag(directions.diagonal())).abs().max() < 0.01
    torch.testing.assert_close(answers[:, 12:], -answers[:, :12])


def test_the_stem_stays_finite_on_images_of_one_colour():
    model = create("resnet8", 10, 1)
    model.adapt_to(torch.ones(4, 1, 32, 32))
    assert model.stem.weight.isfinite().all()


def test_normalising_before_the_pooling_changes_no_number(photos):
    """The model trains with pooling first; in evaluation it normalises first. Both are one function."""
    torch.manual_seed(0)
    model = create("resnet8", 10)
    model.adapt_to(photos)
    for _ in range(3):
        model(photos)  # moves the statistics away from 0 and 1
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_()  # shifts of either sign
    widen = model.eval().stage1.widen
    x = functional.relu(model.stem(photos))
    pooled_first = functional.relu(widen.norm(functional.max_pool2d(widen.conv(x), 2)))
    torch.testing.assert_close(widen(x), pooled_first)


def test_with_mirror_an_image_and_its_mirror_image_get_one_answer_after_training(photos):
    torch.manual_seed(0)
    plain, mirrored = create("resnet8", 10), create("resnet8", 10, mirror=True)
    mirrored.load_state_dict(plain.state_dict())
    assert torch.equal(plain(photos), mirrored(photos))
    plain.eval(), mirrored.eval()
    torch.testing.assert_close(mirrored(photos), (plain(photos) + plain(photos.flip(3))) / 2)
    torch.testing.assert_close(mirrored(photos.flip(3)), mirrored(photos))
    assert not torch.allclose(plain(photos.flip(3)), plain(photos))


def test_the_widening_convolutions_start_as_the_identity(photos):
    stage = create("resnet8", 10).stage2
    x = torch.rand(2, 64, 15, 15)
    torch.testing.assert_close(stage.widen.conv(x)[:, :64], x)


@pytest.mark.parametrize("mirror", [False, True])
def test_normalisation_is_folded_into_the_exported_convolutions(mirror):
    entry = describe("resnet8")
    model = create("resnet8", 10, mirror=mirror)
    graph = to_onnx(Servable(model, entry.mean, entry.std, temperature=1.0), entry.input)
    operators = [node.op_type for node in graph.graph.node]
    assert operators.count("Conv") == 7
    assert "BatchNormalization" not in operators


def test_the_head_sees_the_maximum_over_the_image_and_its_logits_are_scaled_down():
    torch.manual_seed(0)
    model, x = create("resnet8", 10, width=0.25).eval(), torch.randn(3, 3, 32, 32)
    features = model.stage3(model.stage2(model.stage1(functional.relu(model.stem(x)))))
    torch.testing.assert_close(model(x), 0.125 * features.flatten(2).max(2).values @ model.fc.weight.T)
