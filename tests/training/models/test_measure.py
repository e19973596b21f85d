import pytest

from service.errors import ConfigurationError
from training.models.measure import measure

# 10^9 multiply-adds at the default input, as torchvision 0.29 states them.
PUBLISHED = [
    ("alexnet", 0.714),
    ("vgg16_bn", 15.47),
    ("resnet18", 1.814),
    ("resnet50", 4.089),
    ("resnext50_32x4d", 4.23),
    ("wide_resnet50_2", 11.398),
    ("googlenet", 1.498),
    ("inception_v3", 5.713),
]


@pytest.mark.parametrize(("name", "wanted"), PUBLISHED)
def test_cost_is_the_published_one(name, wanted):
    assert measure(name).multiply_adds / 1e9 == pytest.approx(wanted, abs=6e-4)


def test_cost_of_lenet_can_be_counted_by_hand():
    convolutions = 28 * 28 * 6 * 25 + 10 * 10 * 16 * 6 * 25
    linear = 400 * 120 + 120 * 84 + 84 * 10
    cost = measure("lenet5")
    assert (cost.multiply_adds, cost.parameters) == (convolutions + linear, 61_706)
    assert cost.input.shape == (32, 32, 1)


def test_options_and_classes_count():
    assert measure("resnet18", small_images=True).input.shape == (32, 32, 3)
    assert measure("resnet18").parameters - measure("resnet18", num_classes=10).parameters == 990 * 513
    assert measure("resnet18", width=0.5).multiply_adds < 0.35 * measure("resnet18").multiply_adds
    # Auxiliary heads have parameters, and no cost where the model answers.
    assert measure("googlenet", aux=True).parameters == 13_004_888
    assert measure("googlenet", aux=True).multiply_adds == measure("googlenet").multiply_adds


def test_an_unknown_option_is_refused():
    with pytest.raises(ConfigurationError, match="resnet18 has no option 'aux'"):
        measure("resnet18", aux=True)
