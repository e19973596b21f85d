import pytest
import torch
from torch import nn

from training.config import Experiment, OptimiserConfig
from training.optimise import Average, build_optimiser, peak_rate, proven_decay
from training.phases import Phase


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_decay_spares_biases_and_normalisation(net, name):
    optimiser = build_optimiser(Phase("all", 1).groups(net), OptimiserConfig(name=name, weight_decay=0.1))
    decayed = {id(p) for group in optimiser.param_groups if group["weight_decay"] for p in group["params"]}
    every = {id(p) for group in optimiser.param_groups for p in group["params"]}
    assert decayed == {id(net[0].weight), id(net[3].weight)}
    assert every == {id(p) for p in net.parameters()}


def test_sgd_is_nesterovs():
    reference, ours = nn.Linear(3, 3), nn.Linear(3, 3)
    ours.load_state_dict(reference.state_dict())
    theirs = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    mine = build_optimiser(Phase("all", 1).groups(ours), OptimiserConfig(name="sgd", weight_decay=0.0))
    for group in mine.param_groups:
        group["lr"] = 0.1
    x = torch.ones(2, 3)
    for _ in range(5):
        for model, optimiser in ((reference, theirs), (ours, mine)):
            optimiser.zero_grad()
            model(x).square().sum().backward()
            optimiser.step()
    torch.testing.assert_close(ours.weight, reference.weight)


def test_the_average_follows_and_forgets_the_start(net):
    average, start = Average(net, 0.9), net[0].bias.detach().clone()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(3.0)
    net[1].num_batches_tracked.fill_(7)
    average.update(0)
    torch.testing.assert_close(average.model[0].bias, 0.1 * start + 0.9 * 3)
    for step in range(1, 200):
        average.update(step)
    torch.testing.assert_close(average.model[0].weight, net[0].weight, atol=1e-4, rtol=0)
    assert average.model[1].num_batches_tracked == 7
    assert not any(p.requires_grad for p in average.model.parameters())


def test_a_given_rate_is_taken_and_others_are_proven():
    def peak(**tree):
        return peak_rate(Experiment.model_validate(tree))

    assert peak(optimiser={"learning_rate": 0.123}) == 0.123
    assert peak() == 4e-3
    assert peak(model={"name": "resnet18"}) == 1e-3
    assert peak(optimiser={"name": "sgd"}) == 0.05
    assert peak(transfer={"weights": "x.pth"}) == 2e-3


@pytest.mark.parametrize(("name", "decay"), [("adamw", 0.01), ("adam", 5e-4), ("sgd", 5e-4)])
def test_decay_in_the_gradient_is_weaker_than_apart_from_it(name, decay):
    assert proven_decay(OptimiserConfig(name=name)) == decay
    assert proven_decay(OptimiserConfig(name=name, weight_decay=0.02)) == 0.02
    optimiser = build_optimiser(Phase("all", 1).groups(nn.Linear(2, 2)), OptimiserConfig(name=name))
    assert {group["weight_decay"] for group in optimiser.param_groups} == {0.0, decay}


@pytest.mark.parametrize(("name", "theirs"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_adam_is_pytorchs_with_the_betas_that_were_asked_for(name, theirs):
    torch.manual_seed(0)
    ours, plain = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    plain.load_state_dict(ours.state_dict())
    mine = build_optimiser(Phase("all", 1).groups(ours), OptimiserConfig(name=name, weight_decay=0.1, momentum=0.8))
    mine.param_groups[0]["lr"] = 0.1
    other = theirs(plain.parameters(), lr=0.1, betas=(0.8, 0.999), weight_decay=0.1)
    for step in range(5):
        for model, optimiser in ((ours, mine), (plain, other)):
            optimiser.zero_grad()
            model(torch.arange(6.0).view(2, 3) - step).square().sum().backward()
            optimiser.step()
    torch.testing.assert_close(ours.weight, plain.weight)


def test_the_average_has_the_statistics_of_batchnorm_and_its_decay_rises():
    net = nn.Sequential(nn.BatchNorm2d(2))
    average = Average(net, 0.99)
    expected = net[0].running_mean.clone()
    for step in range(60):
        net[0].running_mean.add_(1.0)
        average.update(step)
        decay = min(0.99, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * net[0].running_mean
    torch.testing.assert_close(average.model[0].running_mean, expected)


def test_proven_rate_of_sgd_from_weights_is_smaller():
    tree = {"optimiser": {"name": "sgd"}, "transfer": {"weights": "x.pth"}}
    assert peak_rate(Experiment.model_validate(tree)) == 0.01
