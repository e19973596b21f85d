import numpy as np
import pytest
import torch
from torch import nn

from training.batches import Examples
from training.distributed import Group
from training.evaluate import evaluate
from training.pixels import Normaliser, unit_range

NORMALISE = Normaliser((0.5,), (0.25,))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 7), nn.Dropout(0.5))


@pytest.mark.parametrize("count", [1, 255, 256, 257])
def test_every_image_counts_once_whatever_the_batches(net, count):
    images = np.random.default_rng(0).integers(0, 256, (count + 5, 4, 4, 1), dtype=np.uint8)
    labels = np.random.default_rng(1).integers(0, 7, count + 5)
    rows = np.arange(5, count + 5)
    found = evaluate(net, Examples(images, labels, rows), NORMALISE)
    net.eval()
    with torch.no_grad():
        logits = net(NORMALISE(unit_range(torch.from_numpy(images[rows]))))
    torch.testing.assert_close(torch.from_numpy(found.logits), logits)
    assert found.accuracy == pytest.approx((logits.argmax(1).numpy() == labels[rows]).mean())
    expected = nn.functional.cross_entropy(logits, torch.from_numpy(labels[rows])).item()
    assert found.loss == pytest.approx(expected, rel=1e-5)
    assert found.per_class().support.sum() == count
    assert found.top5 >= found.accuracy


@pytest.mark.parametrize(("at_once", "world", "most"), [(16, 1, 16), (7, 1, 7), (16, 4, 4), (2, 8, 1), (4096, 1, 256)])
def test_no_more_images_are_in_memory_than_training_has(net, at_once, world, most):
    images = np.random.default_rng(0).integers(0, 256, (300, 4, 4, 1), dtype=np.uint8)
    examples = Examples(images, np.zeros(300, np.int64), np.arange(300))
    sizes = []
    net.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))

    class Alone(Group):
        def gather(self, part):
            return np.concatenate([part, np.zeros((300 - len(part), part.shape[1]), part.dtype)])

        def share(self, tensors):
            pass

    evaluate(net, examples, NORMALISE, at_once=at_once, group=Alone(0, world))

    assert max(sizes) == most


def test_modes_are_put_back_module_by_module(net):
    net.train()
    net[1].eval()
    evaluate(
        net, Examples(np.zeros((3, 4, 4, 1), dtype=np.uint8), np.zeros(3, dtype=np.int64), np.arange(3)), NORMALISE
    )
    assert net.training
    assert not net[1].training
    assert net[3].training
