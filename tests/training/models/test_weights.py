import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from service.errors import TrainingError
from training import checkpoint
from training.models import WeightsMismatchError, adapt_input_channels, create, load_weights

NARROW = {"width": 0.125}


def resnet(seed=0, classes=10, channels=3, **options):
    torch.manual_seed(seed)
    return create("resnet18", classes, channels, **NARROW | options)


@pytest.fixture
def saved(tmp_path):
    """A file of a narrow ResNet-18 and its state; a function changes the state before it is written."""

    def save(change=lambda state: state, name="net.pth", model=None):
        state = change(dict((model or resnet(seed=1)).state_dict()))
        torch.save(state, tmp_path / name)
        return tmp_path / name, state

    return save


def without(*names):
    return lambda state: {key: tensor for key, tensor in state.items() if not key.endswith(names)}


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_everything_is_loaded_and_reported(saved):
    path, state = saved()
    model = resnet()
    report = load_weights(model, path)
    assert equal(model.state_dict(), state)
    assert report.loaded == tuple(state)
    assert (report.adapted, report.replaced, report.skipped, report.verified) == ((), (), (), False)
    assert report.path == path


def test_safetensors_and_checkpoints_of_training_load_alike(tmp_path):
    source = resnet(seed=1)
    save_file(source.state_dict(), tmp_path / "net.safetensors")
    checkpoint.save(tmp_path / "best.pt", {"model": source.state_dict(), "epoch": 3})
    for name in ("net.safetensors", "best.pt"):
        model = resnet()
        load_weights(model, str(tmp_path / name))
        assert equal(model.state_dict(), source.state_dict())


def named(change):
    return lambda state: {change(key): tensor for key, tensor in state.items()}


@pytest.mark.parametrize("before", ["module.", "_orig_mod.", "module._orig_mod.", "backbone.", "net.model."])
def test_what_stands_before_every_name_is_left_out(saved, before):
    path, _ = saved(named(lambda key: before + key))
    model = resnet()
    report = load_weights(model, path, adapt_input=True)
    assert equal(model.state_dict(), resnet(seed=1).state_dict())
    assert report.loaded == tuple(model.state_dict())
    assert report.adapted == report.skipped == ()


def test_a_part_that_only_some_names_begin_with_is_a_difference(saved):
    path, _ = saved(named(lambda key: key if key.startswith("fc.") else f"backbone.{key}"))
    with pytest.raises(WeightsMismatchError, match=r"unknown to the model \(backbone\.conv1\.weight"):
        load_weights(resnet(), path)


@pytest.mark.parametrize("part", ["fc", "layer1"])
def test_a_part_of_the_model_is_not_taken_for_a_wrapper(saved, part):
    path, _ = saved(lambda state: {key: tensor for key, tensor in state.items() if key.startswith(f"{part}.")})
    with pytest.raises(WeightsMismatchError) as caught:
        load_weights(resnet(), path)
    assert caught.value.unexpected == ()
    assert "conv1.weight" in caught.value.missing


def test_a_file_of_one_layer_is_no_wrapper(saved):
    path, _ = saved(lambda state: {"head.weight": state["fc.weight"], "bias": state["fc.bias"]})
    with pytest.raises(WeightsMismatchError, match=r"unknown to the model \(head\.weight, bias\)"):
        load_weights(resnet(), path)


def test_differences_are_listed_both_ways_and_the_model_stays(saved):
    def change(state):
        state["extra.weight"] = torch.ones(1)
        state["conv1.weight"] = torch.zeros(8, 3, 3, 3)
        del state["layer1.0.bn1.bias"]
        return state

    path, _ = saved(change)
    model = resnet()
    before = snapshot(model)
    with pytest.raises(WeightsMismatchError) as caught:
        load_weights(model, path)
    assert caught.value.missing == ("layer1.0.bn1.bias",)
    assert caught.value.unexpected == ("extra.weight",)
    assert caught.value.mismatched == ("conv1.weight",)
    assert str(caught.value) == (
        f"{path} does not fit this resnet18: 1 missing in the file (layer1.0.bn1.bias); 1 unknown to the model "
        "(extra.weight); 1 of another shape (conv1.weight float32[8, 3, 3, 3] for float32[8, 3, 7, 7])"
    )
    assert equal(model.state_dict(), before)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"architecture": "resnet18", "options": {"width": 0.25}}, "resnet18 (the file is of one with "),
        ({"architecture": "resnet34", "options": {"width": 0.25}}, "resnet18 (the file is of resnet34): "),
        ({"architecture": "resnet18", "options": resnet().config.options()}, "resnet18: "),
        ({"architecture": 18, "options": None}, "resnet18: "),
    ],
)
def test_a_checkpoint_that_says_what_model_it_is_of_is_told_with_that(tmp_path, said, told):
    path = tmp_path / "best.pt"
    checkpoint.save(path, {"model": resnet(classes=7).state_dict(), **said})
    with pytest.raises(WeightsMismatchError) as caught:
        load_weights(resnet(), path)
    assert f"does not fit this {told}" in str(caught.value)
    assert ("model.options.width=0.25" in str(caught.value)) == ("one with" in told)


def test_a_long_list_is_shortened_in_the_message_only(saved):
    path, state = saved(named(lambda key: f"x{key}"))
    with pytest.raises(WeightsMismatchError, match=r"layer1\.0\.bn1\.weight and 114 more") as caught:
        load_weights(resnet(), path)
    assert len(caught.value.missing) == len(caught.value.unexpected) == len(state) == 122


def test_another_number_of_classes_is_a_difference(saved):
    path, _ = saved(model=resnet(classes=7))
    with pytest.raises(WeightsMismatchError, match=r"fc.weight float32\[7, 64\] for float32\[10, 64\]") as caught:
        load_weights(resnet(), path)
    assert caught.value.mismatched == ("fc.weight", "fc.bias")


def test_a_file_that_torchvision_publishes_for_another_architecture_is_recognised(saved):
    path, _ = saved(name="resnet50-0676ba61.pth")
    with pytest.raises(WeightsMismatchError, match=r"not fit this vgg11 \(the file is torchvision's resnet50\):"):
        load_weights(create("vgg11", 10, **NARROW), path, check_hash=False)


def test_a_damaged_file_changes_nothing(saved):
    path, _ = saved(name="resnet18-f37072fd.pth")
    model = resnet()
    before = snapshot(model)
    with pytest.raises(TrainingError, match="its name says f37072fd"):
        load_weights(model, path)
    assert equal(model.state_dict(), before)
    load_weights(model, path, check_hash=False)
    assert not equal(model.state_dict(), before)


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "googlenet", "inception_v3"])
def test_files_from_before_the_counters_of_batches_load(tmp_path, name):
    options = NARROW | ({"small_images": True} if name != "resnet18" else {})
    state = without(".num_batches_tracked")(create(name, 10, **options).state_dict())
    torch.save(state, tmp_path / "net.pth")
    model = create(name, 10, **options)
    report = load_weights(model, tmp_path / "net.pth")
    assert set(report.loaded) == set(state)
    assert set(report.replaced) == model.state_dict().keys() - state.keys()
    assert report.replaced


def test_single_missing_counters_are_a_difference(saved):
    path, _ = saved(without("layer1.0.bn1.num_batches_tracked"))
    with pytest.raises(WeightsMismatchError) as caught:
        load_weights(resnet(), path)
    assert caught.value.missing == ("layer1.0.bn1.num_batches_tracked",)


@pytest.mark.parametrize(("name", "heads"), [("googlenet", ("aux1.", "aux2.")), ("inception_v3", ("AuxLogits.",))])
def test_auxiliary_heads_of_the_file_are_dropped_where_the_model_has_none(saved, name, heads):
    torch.manual_seed(1)
    with_aux, plain = (create(name, 10, aux=aux, small_images=True, **NARROW) for aux in (True, False))
    path, state = saved(model=with_aux)
    report = load_weights(plain, path)
    assert report.skipped == tuple(key for key in state if key.startswith(heads))
    assert report.skipped
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(plain.eval()(images), with_aux.eval()(images))
    load_weights(with_aux, path)
    path, _ = saved(model=plain)
    with pytest.raises(WeightsMismatchError) as caught:
        load_weights(with_aux, path)
    assert caught.value.missing == tuple(key for key in state if key.startswith(heads))


def test_what_is_ignored_keeps_its_values(saved):
    path, state = saved(model=resnet(seed=1, classes=1000))
    model = resnet()
    before = snapshot(model)
    report = load_weights(model, path, ignore=("fc",))
    assert report.replaced == report.skipped == ("fc.weight", "fc.bias")
    assert set(report.loaded) == state.keys() - {"fc.weight", "fc.bias"}
    assert torch.equal(model.fc.weight, before["fc.weight"])
    assert torch.equal(model.conv1.weight, state["conv1.weight"])


def test_a_prefix_ends_at_a_dot(saved):
    path, _ = saved()
    report = load_weights(resnet(), path, ignore=("layer1.0.conv", "layer1.1.conv1"))
    assert report.replaced == ("layer1.1.conv1.weight",)


def test_the_stem_is_adapted_on_demand(saved):
    path, state = saved()
    gray = resnet(channels=1)
    with pytest.raises(WeightsMismatchError, match=r"conv1.weight float32\[8, 3, 7, 7\] for float32\[8, 1, 7, 7\]"):
        load_weights(gray, path)
    report = load_weights(gray, path, adapt_input=True)
    assert report.adapted == ("conv1.weight",)
    assert "conv1.weight" in report.loaded
    assert torch.equal(gray.conv1.weight, state["conv1.weight"].sum(1, keepdim=True))
    assert load_weights(resnet(), path, adapt_input=True).adapted == ()


@pytest.mark.parametrize(("before", "after"), [(3, 1), (3, 6), (1, 3), (1, 4)])
def test_the_response_to_equal_channels_stays(before, after):
    weight = torch.randn(5, before, 3, 3, dtype=torch.float64)
    gray = torch.randn(2, 1, 9, 9, dtype=torch.float64)
    state = {"stem.weight": weight, "stem.bias": torch.zeros(5)}
    adapted = adapt_input_channels(state, "stem", after)
    assert adapted["stem.bias"] is state["stem.bias"]
    assert state["stem.weight"] is weight
    response = functional.conv2d(gray.expand(-1, after, -1, -1), adapted["stem.weight"])
    torch.testing.assert_close(response, functional.conv2d(gray.expand(-1, before, -1, -1), weight))


def test_more_channels_repeat_the_old_ones_in_turn():
    weight = torch.randn(5, 3, 3, 3)
    adapted = adapt_input_channels({"stem.weight": weight}, "stem", 4)["stem.weight"]
    torch.testing.assert_close(adapted, torch.cat((weight, weight[:, :1]), 1) * 3 / 4)


def test_weights_without_that_stem_are_compared_by_name(saved):
    def wrapped(state):
        return {f"model.{name}": tensor for name, tensor in state.items()} | {"criterion.weight": torch.ones(10)}

    path, _ = saved(wrapped)
    with pytest.raises(WeightsMismatchError, match=r"missing in the file \(conv1\.weight") as caught:
        load_weights(resnet(channels=1), path, adapt_input=True)
    assert {"model.conv1.weight", "criterion.weight"} < set(caught.value.unexpected)


def test_values_that_are_not_finite_are_refused(saved):
    def poison(name):
        def change(state):
            return {**state, name: torch.full_like(state[name], float("nan"))}

        return change

    path, _ = saved(poison("layer1.0.conv1.weight"))
    with pytest.raises(TrainingError, match=r"values that are not finite in layer1\.0\.conv1\.weight"):
        load_weights(resnet(), path)
    path, _ = saved(poison("fc.weight"))
    load_weights(resnet(), path, ignore=("fc",))  # what is not used may be anything


def test_half_precision_is_converted_and_whole_numbers_are_refused(saved):
    path, state = saved(lambda state: {n: t.half() if t.is_floating_point() else t for n, t in state.items()})
    model = resnet()
    load_weights(model, path)
    assert model.conv1.weight.dtype == torch.float32
    assert torch.equal(model.conv1.weight, state["conv1.weight"].float())
    path, _ = saved(lambda state: {**state, "fc.bias": state["fc.bias"].to(torch.int8)})
    with pytest.raises(WeightsMismatchError, match=r"fc.bias int8\[10\] for float32\[10\]"):
        load_weights(resnet(), path)
