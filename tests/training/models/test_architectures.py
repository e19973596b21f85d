"""Every architecture: the numbers that define it, sizes, learning and export."""

import hashlib
import itertools
import re

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torch.nn import functional

from service.artifact import InputSpec
from service.errors import ConfigurationError
from training.graph import Servable, to_onnx
from training.models import TrainingOutputs, create, describe, names, within

# Parameters and the first digits of the SHA-256 over the sorted lines "name shape" of the state dict at 1000 classes,
# from torchvision 0.29.
TORCHVISION = [
    ("alexnet", {}, 61_100_840, "12a60b133d7b54dc"),
    ("vgg11", {}, 132_863_336, "67a7eb563529a90c"),
    ("vgg11_bn", {}, 132_868_840, "fed2755038a74a3e"),
    ("vgg13", {}, 133_047_848, "06fdc111ee6d2ed8"),
    ("vgg13_bn", {}, 133_053_736, "1320c3bf26ac7c28"),
    ("vgg16", {}, 138_357_544, "26a44a8d3cab16c6"),
    ("vgg16_bn", {}, 138_365_992, "e238651c9f050805"),
    ("vgg19", {}, 143_667_240, "2ae6c231664ee367"),
    ("vgg19_bn", {}, 143_678_248, "091b7131554bd4ea"),
    ("resnet18", {}, 11_689_512, "867b8d8ae95f5a28"),
    ("resnet34", {}, 21_797_672, "d6dbfa48843359d6"),
    ("resnet50", {}, 25_557_032, "2d5b8870b35e1530"),
    ("resnet101", {}, 44_549_160, "83dfe6275c4f12d9"),
    ("resnet152", {}, 60_192_808, "f11957010a75631a"),
    ("resnext50_32x4d", {}, 25_028_904, "d244da4517087cbb"),
    ("resnext101_32x8d", {}, 88_791_336, "2769c97a01e491d3"),
    ("resnext101_64x4d", {}, 83_455_272, "5619a876105ebe46"),
    ("wide_resnet50_2", {}, 68_883_240, "4facef4f573fef70"),
    ("wide_resnet101_2", {}, 126_886_696, "c3229706cc9819c7"),
    ("googlenet", {}, 6_624_904, "5782b0243eeef78f"),
    ("googlenet", {"aux": True}, 13_004_888, "014a9157e8afb3c4"),
    ("inception_v3", {}, 23_834_568, "7319ac97ba5bb65a"),
    ("inception_v3", {"aux": True}, 27_161_264, "00e4a5a95f23b9cb"),
]

# Logits of the first of two images, from torchvision 0.29 with seed 3 and float64: weights are drawn in the same order
# from the same distributions and the computation is the same. Dropout is off; the last two are in training mode, since
# without batch statistics their signal vanishes or explodes.
SEEDED = [
    ("alexnet", {}, 64, False, [0.0112356, -0.0101973, 0.0078321, -0.0231882]),
    ("vgg11_bn", {}, 64, False, [0.0304811, 0.1002870, -0.0393014, -0.0062162]),
    ("resnet18", {}, 64, False, [-0.2611362, -0.3285236, 0.0789539, 0.1811504]),
    ("resnet50", {}, 64, False, [-0.6925296, -1.8453202, -0.0429977, 3.7660025]),
    ("resnext50_32x4d", {}, 64, False, [0.0291293, 0.0196912, -0.0467795, 0.0237436]),
    ("wide_resnet50_2", {}, 64, False, [-4.7886244, -5.0142439, 3.7559663, 7.0181053]),
    ("googlenet", {"aux": True, "dropout": 0, "aux_dropout": 0}, 64, True, [-0.1209547, 0.1116966]),
    ("inception_v3", {"dropout": 0}, 139, True, [0.2905111, 0.1751719, 1.5345687, -0.7000158]),
]
GOOGLENET_AUX = [[-0.0081165, -0.0262254], [-0.0534688, 0.0300448]]


# One architecture per family and form, with options that keep it small.
SMALL = {"small_images": True, "width": 0.25}
FAMILIES = {
    "convnet": ("convnet", {"width": 0.5, "dropout": 0.0}),
    "lenet5": ("lenet5", {"dropout": 0.0}),
    "classic lenet5": ("lenet5", {"classic": True, "dropout": 0.0}),
    "alexnet": ("alexnet", {**SMALL, "dropout": 0.0}),
    "vgg11": ("vgg11", {**SMALL, "dropout": 0.0}),
    "vgg11_bn": ("vgg11_bn", {**SMALL, "dropout": 0.0}),
    "resnet18": ("resnet18", {**SMALL, "zero_init": True, "dropout": 0.0}),
    "resnet8": ("resnet8", {"width": 0.5, "dropout": 0.0}),
    "resnext50": ("resnext50_32x4d", {"width": 0.25, "dropout": 0.0}),
    "googlenet": ("googlenet", {**SMALL, "width": 0.125, "aux": True, "dropout": 0.0, "aux_dropout": 0.0}),
    "inception_v3": ("inception_v3", {**SMALL, "width": 0.125, "aux": True, "dropout": 0.0}),
}
by_family = pytest.mark.parametrize(("name", "options"), FAMILIES.values(), ids=FAMILIES)


# Deeper ones differ from these in nothing but the number of blocks.
SHALLOW = [name for name in names() if not re.search("13|16|19|34|101|152", name)]


def combinations(name):
    """All settings of the options that are not numbers."""
    switches = [option.name for option in describe(name).options if isinstance(option.default, bool)]
    return [
        dict(zip(switches, values, strict=True)) for values in itertools.product((False, True), repeat=len(switches))
    ]


def on_meta(name, num_classes=1000, in_channels=3, **options):
    with torch.device("meta"):
        return create(name, num_classes, in_channels, **options)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def logits(answer):
    return answer.logits if isinstance(answer, TrainingOutputs) else answer


def wave(size):
    return torch.sin(torch.arange(2 * 3 * size * size, dtype=torch.float32) * 0.37).reshape(2, 3, size, size)


@pytest.mark.parametrize(("name", "options", "parameters", "digest"), TORCHVISION)
def test_names_and_shapes_are_those_of_torchvision(name, options, parameters, digest):
    model = on_meta(name, **options)
    lines = sorted(f"{key} {list(tensor.shape)}" for key, tensor in model.state_dict().items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == digest
    assert count(model) == parameters


@pytest.mark.parametrize(("name", "parameters"), [("convnet", 93_322), ("lenet5", 61_706)])
def test_the_small_networks_have_their_parameters(name, parameters):
    assert count(create(name, 10, 1)) == parameters


@pytest.mark.parametrize(("name", "options", "size", "training", "wanted"), SEEDED)
def test_seeded_weights_give_the_logits_of_torchvision(name, options, size, training, wanted):
    torch.manual_seed(3)
    with torch.no_grad():
        answer = create(name, **options).train(training)(wave(size))
    if isinstance(answer, TrainingOutputs):
        for head, first in zip(answer.aux_logits, GOOGLENET_AUX, strict=True):
            assert head[0, :2].tolist() == pytest.approx(first, abs=2e-4, rel=1e-2)
    assert logits(answer)[0, : len(wanted)].tolist() == pytest.approx(wanted, abs=2e-4, rel=1e-2)


@pytest.mark.parametrize("name", names())
def test_the_description_is_true(name):
    entry = describe(name)
    classes = entry.config.num_classes
    model = on_meta(name, classes, entry.channels)
    assert count(model) == entry.parameters
    assert model.get_submodule(entry.stem).in_channels == entry.channels
    assert model.get_submodule(entry.head).out_features == classes
    assert len(entry.mean) == len(entry.std) == entry.channels
    assert model.eval()(torch.empty(2, *entry.input.shape[2:], *entry.input.shape[:2], device="meta")).shape == (
        2,
        classes,
    )
    # The stem is the first to see the image, the head the last.
    convolutions = [key for key, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    linear = [key for key, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert (convolutions[0], linear[-1]) == (entry.stem, entry.head)


@pytest.mark.parametrize("name", names())
def test_every_parameter_is_in_one_stage_or_in_an_auxiliary_head(name):
    entry = describe(name)
    for options in combinations(name):
        for key in on_meta(name, **options).state_dict():
            stages = [index for index, stage in enumerate(entry.stages) if within(key, stage)]
            is_aux = within(key, {head.partition(".")[0] for head in entry.aux_heads})
            assert len(stages) == (0 if is_aux else 1), key
    assert within(f"{entry.stem}.weight", entry.stages[0])
    assert within(f"{entry.head}.weight", entry.stages[-1])


@pytest.mark.parametrize(
    ("name", "head"), [("googlenet", "aux1.fc2"), ("googlenet", "aux2.fc2"), ("inception_v3", "AuxLogits.fc")]
)
def test_the_last_layers_of_auxiliary_heads_are_known(name, head):
    assert head in describe(name).aux_heads
    assert on_meta(name, 7, aux=True).get_submodule(head).out_features == 7


@pytest.mark.parametrize("name", SHALLOW)
def test_the_smallest_size_works_and_one_pixel_less_does_not(name):
    for options in combinations(name):
        model = on_meta(name, 10, 3, **options)
        least = model.config.min_size
        answer = model.train()(torch.empty(2, 3, least, least, device="meta"))
        assert logits(answer).shape == (2, 10)
        model.check_input(least, least)
        if least == 1:
            continue
        with pytest.raises(
            ConfigurationError, match=f"{least - 1}x{least}.*too small for {name}.*at least {least}x{least}"
        ):
            model.check_input(least - 1, least)
        with pytest.raises(ConfigurationError, match="too small"):
            model(torch.empty(2, 3, least, least - 1, device="meta"))


# ResNets take any size; GoogLeNet's bound is torchvision's, for the sake of what its weights were trained for.
@pytest.mark.parametrize("name", [name for name in SHALLOW if "resne" not in name and name != "googlenet"])
def test_the_smallest_size_is_not_larger_than_needed(name):
    for options in combinations(name):
        model = on_meta(name, 10, 3, **options).eval()
        less = model.config.min_size - 1
        model.check_batch = lambda _: None
        with pytest.raises(RuntimeError):
            model(torch.empty(1, 3, less, less, device="meta"))


@pytest.mark.parametrize(("shape", "complaint"), [((2, 1, 32, 32), "N, 3, H, W"), ((3, 32, 32), r"not \[3, 32, 32\]")])
def test_a_batch_of_another_form_is_refused(shape, complaint):
    with pytest.raises(ConfigurationError, match=complaint):
        create("lenet5", 10, 3)(torch.zeros(shape))


@pytest.mark.parametrize("name", SHALLOW)
def test_sizes_between_give_logits_too(name):
    entry = describe(name)
    model = on_meta(name, 5, 4, width=0.5).eval()
    height, width = entry.min_size + 9, entry.min_size + 20
    assert model(torch.empty(3, 4, height, width, device="meta")).shape == (3, 5)


@pytest.mark.parametrize("name", SHALLOW)
def test_width_changes_the_parameters_about_quadratically(name):
    half, full, double = (count(on_meta(name, 10, width=width)) for width in (0.5, 1.0, 2.0))
    assert 0.2 < half / full < 0.35
    assert 3.0 < double / full < 4.1


@pytest.mark.parametrize("name", [name for name in SHALLOW if "small_images" in describe(name).config.options()])
def test_small_images_keep_more_resolution_or_need_fewer_units(name):
    seen = {}
    for small in (False, True):
        model = on_meta(name, 10, small_images=small)
        last = model.get_submodule([key for key, module in model.named_modules() if isinstance(module, nn.Conv2d)][-1])
        last.register_forward_hook(lambda _, __, out, small=small: seen.update({small: out.shape[-1]}))
        size = max(32, describe(name).min_size)
        model.eval()(torch.empty(1, 3, size, size, device="meta"))
    if name.startswith("vgg"):
        assert count(on_meta(name, 10, small_images=True)) < count(on_meta(name, 10)) / 5
    else:
        assert seen[True] >= 2 * seen[False]
    assert describe(name).input_for({"small_images": True}).shape == (32, 32, 3)
    assert describe(name).input_for({"small_images": False}) == describe(name).input


@by_family
def test_dropout_acts_in_training_only(name, options, digits_at):
    images = digits_at(32, 1)[0][:4]
    torch.manual_seed(0)
    for dropout in (0.0, 0.5):
        model = create(name, 10, 1, **options | {"dropout": dropout})
        assert torch.equal(logits(model(images)), logits(model(images))) == (dropout == 0)
        model.eval()
        assert torch.equal(model(images), model(images))


def test_auxiliary_dropout_leaves_the_main_head_alone(digits_at):
    images = digits_at(32, 1)[0][:4]
    model = create("googlenet", 10, 1, **FAMILIES["googlenet"][1] | {"aux_dropout": 0.5})
    one, other = model(images), model(images)
    assert torch.equal(one.logits, other.logits)
    assert not torch.equal(one.aux_logits[0], other.aux_logits[0])


def test_classic_lenet_is_smooth_and_odd_in_its_first_layer():
    torch.manual_seed(0)
    classic, modern = create("lenet5", 10, 1, classic=True), create("lenet5", 10, 1)
    modern.load_state_dict(classic.state_dict())
    images = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    assert not torch.allclose(classic(images), modern(images))
    assert (classic.activation(torch.tensor([-2.0, 2.0])) == torch.tensor([-2.0, 2.0]).tanh()).all()


def test_residual_branches_can_start_at_zero():
    for name, norm in (("resnet18", "bn2"), ("resnet50", "bn3")):
        zeroed, usual = (create(name, 10, width=0.125, zero_init=zero) for zero in (True, False))
        assert zeroed.get_submodule(f"layer3.1.{norm}").weight.abs().max() == 0
        assert usual.get_submodule(f"layer3.1.{norm}").weight.min() == 1


@pytest.mark.parametrize(("name", "weight", "heads"), [("googlenet", 0.3, 2), ("inception_v3", 0.4, 1)])
def test_auxiliary_heads_answer_in_training_only(name, weight, heads):
    model = create(name, 10, 3, aux=True, small_images=True, width=0.125)
    images = torch.randn(2, 3, 32, 32)
    answer = model(images)
    assert isinstance(answer, TrainingOutputs)
    assert [tuple(head.shape) for head in (answer.logits, *answer.aux_logits)] == [(2, 10)] * (heads + 1)
    assert model.aux_weight == weight
    assert isinstance(model.eval()(images), torch.Tensor)
    assert isinstance(create(name, 10, 3, small_images=True, width=0.125)(images), torch.Tensor)
    assert create("resnet18", 10, width=0.125).aux_weight == 0


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_half_is_what_imagenet_statistics_and_transform_input_amount_to(name):
    """torchvision: x = (p - mean) / std, then x * (std / 0.5) + (mean - 0.5) / 0.5."""
    entry, imagenet = describe(name), describe("resnet50")
    pixels = np.random.default_rng(0).random((5, 3))
    normalised = (pixels - imagenet.mean) / imagenet.std
    transformed = normalised * (np.array(imagenet.std) / 0.5) + (np.array(imagenet.mean) - 0.5) / 0.5
    np.testing.assert_allclose((pixels - entry.mean) / entry.std, transformed, atol=1e-12)


def test_normalisation_for_other_channels_is_the_average():
    assert describe("resnet50").normalization(3) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert describe("resnet50").normalization(1) == ((0.449,), (0.226,))
    assert describe("lenet5").normalization(3) == ((0.5,) * 3, (0.5,) * 3)


@by_family
def test_a_few_steps_learn_a_tiny_batch(name, options, digits_at):
    torch.manual_seed(0)
    model = create(name, 10, 1, **options)
    images, labels = digits_at(max(12, model.config.min_size), 1)
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    # Deep networks without normalisation take their time to leave the plateau at ln(10).
    plain = name in {"alexnet", "vgg11"}
    for _ in range(40 if plain else 15):
        answer = model(images)
        loss = functional.cross_entropy(logits(answer), labels)
        losses.append(loss.item())
        for head in answer.aux_logits if isinstance(answer, TrainingOutputs) else ():
            loss = loss + model.aux_weight * functional.cross_entropy(head, labels)
        optimiser.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimiser.step()
    assert losses[-1] < (0.9 if plain else 0.7) * losses[0]


# `test_served` takes the other forms all the way into the service.
@pytest.mark.parametrize(("name", "options"), [FAMILIES[key] for key in ("alexnet", "googlenet", "inception_v3")])
def test_it_exports_with_any_batch_and_plain_operators(name, options, digits_at):
    torch.manual_seed(0)
    size = 36
    spec = InputSpec(height=size, width=size, channels=1)
    servable = Servable(create(name, 10, 1, **options), mean=(0.5,), std=(0.5,), temperature=1.0)
    graph = to_onnx(servable, spec)
    assert not {"Gather", "GatherND", "Where", "Loop", "If", "Dropout"} & {node.op_type for node in graph.graph.node}
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = ((digits_at(size, 1)[0] + 1) * 127.5).byte().permute(0, 2, 3, 1)
    for batch in (1, 2, 7):
        found = session.run(["logits"], {"image": pixels[:batch].numpy()})[0]
        wanted = servable(pixels[:batch])[0].numpy()
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())
