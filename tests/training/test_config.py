import pytest

from service.errors import ConfigurationError
from training.config import Experiment, find_experiment, load_experiment, read_yaml
from training.models import describe
from training.transfer import plan

NAMES = (
    "digits-lenet",
    "mnist-lenet5",
    "mnist-convnet",
    "cifar10-resnet",
    "imagenet-resnet50-transfer",
    "photos-transfer",
)


def test_flags_override_the_file_which_overrides_the_defaults(tmp_path):
    file = tmp_path / "experiment.yaml"
    file.write_text("loop: {epochs: 7, batch_size: 32}\n")
    experiment = load_experiment(file, {"loop.epochs": 3, "augment.rotation_degrees": 0})
    assert (experiment.loop.epochs, experiment.loop.batch_size, experiment.loop.seed) == (3, 32, 0)
    assert experiment.augment.rotation_degrees == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loop: {epohcs: 3}", r"loop\.epohcs is not a setting"),
        ("loop: {epochs: 0}", r"loop\.epochs = 0: input should be greater"),
        ("optimiser: {name: lion}", r"optimiser\.name = 'lion'"),
        ("name: a b", "may hold letters, digits"),
        ("augment: {crop_padding: 4, crop_area: 0.5}", "augment: crop_padding and crop_area are two ways to crop"),
        ("just text", "no experiment file"),
        ("export: {variants: [int4]}", r"export\.variants\.0 = 'int4'"),
        ("export: {accuracy_budget_points: -1}", r"export\.accuracy_budget_points = -1"),
        ("export: {opset: 17}", r"export\.opset is not a setting"),
        ("input: {train_size: 0}", r"input\.train_size = 0"),
        ("augment: {rotation: 3}", r"augment\.rotation is not a setting; did you mean augment\.rotation_degrees\?"),
        ("optimiser: {lr: 0.1}", r"did you mean optimiser\.learning_rate\?"),
        ("optimizer: {name: sgd}", r"optimizer is not a setting; did you mean optimiser\?"),
        ("loops: {epochs: 3}", r"did you mean loop\?"),
        ("epochs: 3", r"did you mean loop\.epochs\?"),
        ("augment: {mixup: .inf}", r"augment\.mixup = inf: input should be a finite number"),
        ("optimiser: {weight_decay: .nan}", r"optimiser\.weight_decay = nan"),
        ("augment: {mixup: yes}", "augment: mixup takes no yes"),
        ("loop: {epochs: false}", "loop: epochs takes no no"),
        ("loop: [1, 2", "cannot be read"),
        ("loop: {epochs: 1}\nname: x\nloop: {seed: 2}", "loop occurs twice"),
        ("loop: 3", "loop = 3"),
    ],
)
def test_says_which_setting_is_wrong_and_where(tmp_path, text, message):
    file = tmp_path / "experiment.yaml"
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=message) as error:
        load_experiment(file, {})
    assert str(file) in str(error.value)


def test_a_section_that_is_all_comments_has_its_defaults(tmp_path):
    file = tmp_path / "experiment.yaml"
    file.write_text("augment:\n  # rotation_degrees: 5\nloop:\n")
    assert load_experiment(file, {"loop.epochs": 3}) == load_experiment(None, {"loop.epochs": 3})
    file.write_text("lop:\n")
    with pytest.raises(ConfigurationError, match="lop is not a setting"):
        load_experiment(file, {})


def test_numbers_may_have_an_exponent(tmp_path):
    """To YAML 1.1, 1e-3 without a point is text."""
    file = tmp_path / "experiment.yaml"
    file.write_text("a: [1e-3, 2E+2, -1.5e0, .5e1]\nb: 1e-3x\n")

    assert read_yaml(file) == {"a": [0.001, 200.0, -1.5, 5.0], "b": "1e-3x"}


def test_an_override_below_a_value_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="name is a single value"):
        load_experiment(None, {"name": "x", "name.first": "y"})


def test_what_is_stored_is_read_back():
    experiment = Experiment.model_validate(
        {"transfer": {"weights": "some/file.pth"}, "model": {"options": {"width": 0.5}}}
    )
    assert Experiment.model_validate(experiment.model_dump(mode="json")) == experiment


def test_unknown_experiments_are_answered_with_the_known_ones():
    with pytest.raises(ConfigurationError, match="digits-lenet"):
        find_experiment("digits-lenett")


@pytest.mark.parametrize("name", NAMES)
def test_the_experiments_that_come_along_are_valid_and_explain_themselves(name):
    file = find_experiment(name)
    experiment = load_experiment(file, {})
    plan(experiment, describe(experiment.model.name))
    header = "".join(line for line in file.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"--config {name}" in header
    assert "Time:" in header
    assert "Expected:" in header
