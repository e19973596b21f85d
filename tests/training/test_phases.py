import torch
from torch import nn

from training.phases import Phase


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.body(self.stem(x)).mean((2, 3)))


PHASE = Phase("top", 1, stages=((("fc",), 1.0), (("stem",), 0.0), (("body",), 0.1)))


def test_frozen_stages_have_no_gradient_and_the_others_do():
    net = Net()
    PHASE.freeze(net)
    assert [n for n, p in net.named_parameters() if not p.requires_grad] == [
        "stem.0.weight", "stem.0.bias", "stem.1.weight", "stem.1.bias",
    ]  # fmt: skip
    Phase("all", 1).freeze(net)
    assert all(p.requires_grad for p in net.parameters())


def test_frozen_norms_keep_their_statistics_after_train():
    net = Net()
    PHASE.freeze(net)
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    for _ in range(3):
        net.train()
        PHASE.keep_frozen(net)
        net(torch.randn(8, 1, 9, 9) + 5)
    changed = {name for name, buffer in net.named_buffers() if not torch.equal(buffer, before[name])}
    assert changed == {"body.1.running_mean", "body.1.running_var", "body.1.num_batches_tracked"}


def test_all_norms_can_be_frozen_while_weights_learn():
    net = Net()
    phase = Phase("all", 1, freeze_norm=True)
    phase.freeze(net)
    net.train()
    phase.keep_frozen(net)
    assert not net.stem[1].training
    assert not net.body[1].training
    assert net.training
    assert all(p.requires_grad for p in net.parameters())


def test_groups_carry_multiples_and_leave_out_the_frozen():
    net = Net()
    PHASE.freeze(net)
    found = {(g["multiple"], g["decays"]): len(g["params"]) for g in PHASE.groups(net)}
    assert found == {(0.1, True): 1, (0.1, False): 3, (1.0, True): 1, (1.0, False): 1}


def test_names_match_whole_components():
    phase = Phase("x", 1, stages=((("layer1",), 0.5),))
    assert phase.multiple("layer1.0.weight") == 0.5
    assert phase.multiple("layer10.weight") == 1.0
