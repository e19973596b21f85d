import torch
from torch import nn

from training.models import create
from training.threads import limited_to, thread_count


def test_small_steps_take_one_thread_and_large_ones_all():
    lenet = create("lenet5", 10, 1)
    with limited_to(2):
        assert thread_count(lenet, (32, 32, 1), 64) == 1
        assert thread_count(lenet, (32, 32, 1), 1024) == 2
        assert thread_count(create("resnet18", 10), (32, 32, 3), 64) == 2


def test_counting_leaves_the_model_alone():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    thread_count(net.train(), (8, 8, 1), 4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert net.training


def test_the_limit_ends_with_the_block():
    before = torch.get_num_threads()
    with limited_to(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
