import pytest
import yaml
from click.testing import CliRunner

from service.errors import ConfigurationError
from training.config import Experiment, find_experiment, load_experiment
from training.models import describe, names
from training.optimise import proven_decay
from training.search_space import check_space, default_space, is_whole, own_values, settled
from training.tune_cli import tune as tune_command
from training.tune_config import Choices, HyperbandConfig, Range, TuneConfig, load_tuning


def experiment(**overrides):
    return load_experiment(None, {key.replace("__", "."): value for key, value in overrides.items()})


@pytest.mark.parametrize("name", [entry for entry in names() if "resne" not in entry and "vgg" not in entry])
def test_the_default_space_fits_every_family_and_holds_its_own_settings(name):
    check_default_space(name)


@pytest.mark.parametrize("name", ["vgg11_bn", "resnet18"])
def test_the_default_space_fits_one_of_each_large_family(name):
    check_default_space(name)


def check_default_space(name):
    base = experiment(model__name=name)
    space = default_space(base)
    check_space(base, space)
    assert own_values(base, space) is not None
    has_dropout = "dropout" in {option.name for option in describe(name).options}
    assert ("model.options.dropout" in space) == has_dropout
    assert "model.options.width" not in space


def test_the_default_space_holds_a_learning_rate_that_is_far_off():
    for rate in (1e-7, 50.0):
        base = experiment(optimiser__learning_rate=rate)
        assert own_values(base, default_space(base))["optimiser.learning_rate"] == rate


def test_trained_weights_decide_about_the_architecture():
    base = load_experiment(find_experiment("photos-transfer"), {})
    space = default_space(base)
    assert "transfer.spread" in space
    assert "model.options.zero_init" not in space
    assert "model.options.zero_init" in default_space(experiment(model__name="resnet18"))


def test_without_augmentation_its_strength_is_not_tuned():
    off = experiment(augment__rotation_degrees=0, augment__translation=0, augment__scale=0)
    assert "augment_strength" not in default_space(off)


def test_strength_scales_all_augmentation_within_its_limits():
    base = experiment(augment__brightness=0.6, augment__crop_area=0.8, augment__horizontal_flip=True)
    doubled = settled(base, {"augment_strength": 2.0}).augment
    assert (doubled.rotation_degrees, doubled.translation, doubled.brightness) == (24, 0.2, 0.95)
    assert doubled.crop_area == 0.6
    assert doubled.horizontal_flip
    none = settled(base, {"augment_strength": 0.0}).augment
    assert (none.rotation_degrees, none.scale, none.crop_area, none.brightness) == (0, 0, 1, 0)
    assert settled(base, {"augment_strength": 1.0}) == base


def test_values_go_into_the_experiment_rounded():
    found = settled(experiment(), {"optimiser.learning_rate": 0.00123456789, "model.options.dropout": 0.25})
    assert found.optimiser.learning_rate == 0.001235
    assert found.model.options == {"dropout": 0.25}


def test_whole_settings_are_searched_in_whole_numbers():
    assert is_whole(experiment(), "loop.batch_size")
    assert is_whole(experiment(), "input.size")
    assert not is_whole(experiment(), "optimiser.clip_norm")
    assert not is_whole(experiment(), "model.options.dropout")
    with pytest.raises(ConfigurationError, match="whole numbers"):
        check_space(experiment(), {"loop.batch_size": Range(low=8.5, high=16.5)})


@pytest.mark.parametrize(
    ("key", "dimension", "message"),
    [
        ("data.validation", {"low": 0, "high": 0.5}, "cannot be tuned; what can: augment_strength, input.size"),
        ("loop.seed", {"low": 0, "high": 9}, "cannot be tuned"),
        ("optimiser.learnin", {"low": 0, "high": 0.5}, "optimiser.learnin is not a setting"),
        ("augment.horizontal_flip", {"low": 0, "high": 1}, "not a number; write {choices"),
        ("model.options.drop", {"low": 0, "high": 0.5}, "lenet5 has no option 'drop'; did you mean dropout"),
        ("model.options.dropout", {"low": 0, "high": 5}, "has to be from 0 to 0.95"),
        ("model.name", {"choices": ["resnet18", "resnet19"]}, "no architecture 'resnet19'"),
        ("augment.crop_padding", {"low": 0, "high": 80}, "less than or equal to 64"),
        ("augment_strength", {"choices": ["weak", "strong"]}, "is a number, not 'weak'"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused_with_its_key(key, dimension, message):
    kind = Choices if "choices" in dimension else Range
    with pytest.raises(ConfigurationError, match=f"tune.space.{key}.*{message}"):
        check_space(experiment(), {key: kind.model_validate(dimension)})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trials: 0", "tune.trials: input should be greater than or equal to 1"),
        ("trails: 3", "tune.trails is not a setting of tuning"),
        ("space: {a: {low: 2, high: 1}}", "tune.space.a: low 2 has to be less than high 1"),
        ("space: {a: {low: 0, high: 1, log: true}}", "tune.space.a: log needs low above 0"),
        ("space: {a: {low: 0, high: 1, step: 0.3}}", "tune.space.a: high has to be low plus a whole number of steps"),
        ("space: {a: {low: 0}}", "tune.space.a.high is missing"),
        ("space: {a: {low: 0, high: .inf}}", "tune.space.a.high: input should be a finite number"),
        ("space: {a: {choices: [1]}}", "tune.space.a.choices: tuple should have at least 2 items"),
        ("space: {a: {choices: [1, 1]}}", "tune.space.a: a choice is listed twice"),
        ("space: {a: {choices: [1, 2], low: 3}}", "tune.space.a.low is not a setting of tuning"),
        ("space: {a: [0.1, 1]}", "tune.space.a: write {low: ..., high: ...} for a range, or {choices: [...]}"),
        ("space: {a: 3}", "tune.space.a: input should be"),
        ("pruner: {name: median, min_epochs: 3}", "tune.pruner.median.min_epochs is not a setting of tuning"),
        ("pruner: {name: best}", "tune.pruner: input tag 'best' found using 'name' does not match"),
        ("- 3", "is no experiment file"),
    ],
)
def test_faults_of_a_space_file_are_named(tmp_path, text, message):
    file = tmp_path / "space.yaml"
    file.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        load_tuning(None, file, {})
    assert str(file) in str(caught.value)
    assert message in str(caught.value)


def test_the_section_comes_from_the_experiment_file_and_flags_go_first(tmp_path):
    file = tmp_path / "e.yaml"
    file.write_text("loop: {epochs: 3}\ntune: {trials: 7, space: {loop.batch_size: {choices: [16, 32]}}}\n")
    found = load_tuning(file, None, {"pruner": {"name": "hyperband"}, "trials": 9})
    assert (found.trials, found.pruner) == (9, HyperbandConfig(name="hyperband"))
    assert found.space == {"loop.batch_size": Choices(choices=(16, 32))}
    assert load_experiment(file, {}).loop.epochs == 3
    assert load_tuning(None, None, {}) == TuneConfig()


def test_a_setting_of_tuning_is_no_setting_of_training():
    with pytest.raises(ConfigurationError, match="tune is not a setting"):
        load_experiment(None, {"tune.trials": 3})


def test_the_printed_space_is_what_the_command_takes(tmp_path):
    done = CliRunner().invoke(tune_command, ["photos", "--model", "resnet18", "--print-space"], catch_exceptions=False)
    assert done.exit_code == 0
    file = tmp_path / "space.yaml"
    file.write_text(done.output)
    base = experiment(model__name="resnet18")
    assert dict(load_tuning(None, file, {}).space) == default_space(base)
    assert set(yaml.safe_load(done.output)["tune"]) == {"trials", "objective", "pruner", "space"}


@pytest.mark.parametrize(
    ("key", "choices", "value"),
    [
        ("input.size", (28, 32), 32),
        ("input.train_size", (24, 32), 32),
        ("input.resize", ("stretch", "crop"), "stretch"),
    ],
)
def test_the_experiment_stands_in_a_space_of_inputs_although_it_leaves_them_open(key, choices, value):
    experiment = Experiment.model_validate({"model": {"name": "lenet5"}})

    assert own_values(experiment, {key: Choices(choices=choices)}) == {key: value}


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_the_decay_that_is_chosen_stands_well_within_its_range(name):
    experiment = Experiment.model_validate({"optimiser": {"name": name}})
    found = default_space(experiment)["optimiser.weight_decay"]

    assert found.low * 5 < proven_decay(experiment.optimiser) < found.high / 5
