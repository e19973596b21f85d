"""Which settings can be tuned, what is worth tuning by default, and the experiment that a point of the space is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from service.errors import ConfigurationError
from training.config import Experiment, load_experiment
from training.models import create, describe
from training.optimise import peak_rate, proven_decay
from training.tune_config import Choices, Range, Value

STRENGTH = "augment_strength"

_SECTIONS = ("augment.", "optimiser.", "schedule.", "model.options.")
_SETTINGS = (
    "input.size", "input.train_size", "input.resize", "input.shorter_side", "loop.balance", "loop.batch_size",
    "loop.ema_decay", "loop.label_smoothing", "model.name", "transfer.freeze_norm", "transfer.probe",
    "transfer.spread", "transfer.strategy",
)  # fmt: skip

# What `augment_strength` multiplies, and the largest value of each.
_STRENGTHS = {
    "rotation_degrees": 180.0, "translation": 0.5, "scale": 1.0, "crop_padding": 64, "brightness": 0.95,
    "contrast": 0.95, "saturation": 0.95, "erasing": 1.0, "mixup": 10.0, "cutmix": 10.0,
}  # fmt: skip
_LEAST_CROP_AREA = 0.05

_OPTION = "model.options."
_INPUT = "input."
_HEAVY_DROPOUT = 0.5


def default_space(experiment: Experiment) -> dict[str, Range | Choices]:
    """What is worth searching for this architecture, around proven values; the experiment's own are always inside.

    Only what does not change the cost of the model in service: neither its width nor the image size.
    """
    own, batch = experiment.optimiser, experiment.loop.batch_size
    unset = experiment.model_copy(update={"optimiser": own.model_copy(update={"learning_rate": None})})
    proven, rate = peak_rate(unset), peak_rate(experiment)
    own_decay, most = proven_decay(own), 0.3 if own.name == "adamw" else 0.01
    found: dict[str, Range | Choices] = {
        "optimiser.learning_rate": Range(low=min(proven / 20, rate), high=max(proven * 5, rate), log=True),
        "loop.batch_size": Choices(choices=tuple(sorted({max(2, batch // 2), batch, 2 * batch}))),
    }
    if own_decay > 0:
        decay = Range(low=min(most / 1000, own_decay), high=max(most, own_decay), log=True)
        found["optimiser.weight_decay"] = decay
    found |= _option_space(experiment)
    if any(getattr(experiment.augment, name) for name in _STRENGTHS) or experiment.augment.crop_area < 1:
        found[STRENGTH] = Range(low=0, high=2)
    if experiment.transfer.weights is not None and experiment.transfer.strategy != "linear-probe":
        spread = experiment.transfer.spread
        found["transfer.spread"] = Range(low=min(3.0, spread), high=max(300.0, spread), log=True)
    return found


def _option_space(experiment: Experiment) -> dict[str, Range | Choices]:
    """Dropout where the architecture has it, and its switches, unless trained weights decide about these."""
    found: dict[str, Range | Choices] = {}
    for option in describe(experiment.model.name).options:
        value = experiment.model.options.get(option.name, option.default)
        if option.name == "dropout":
            most = 0.8 if option.default >= _HEAVY_DROPOUT else 0.5
            found[_OPTION + option.name] = Range(low=0, high=max(most, value))
        elif isinstance(option.default, bool) and option.name != "small_images" and not experiment.transfer.weights:
            found[_OPTION + option.name] = Choices(choices=(False, True))
    return found


def check_space(experiment: Experiment, space: Mapping[str, Range | Choices]) -> None:
    """Tries the outermost values of each dimension by itself.

    Raises:
        ConfigurationError: a key that cannot be tuned, or a value that the experiment or the architecture refuses.
    """
    for key, dimension in space.items():
        if key != STRENGTH and key not in _SETTINGS and not key.startswith(_SECTIONS):
            raise ConfigurationError(
                f"tune.space.{key} cannot be tuned; what can: {STRENGTH}, {', '.join(_SETTINGS)}, and everything "
                f"below {', '.join(section.rstrip('.') for section in _SECTIONS)}"
            )
        for value in _ends(experiment, key, dimension):
            try:
                _check_model(settled(experiment, {key: value}))
            except ConfigurationError as error:
                raise ConfigurationError(f"tune.space.{key}: {error}") from error


def _ends(experiment: Experiment, key: str, dimension: Range | Choices) -> tuple[Value, ...]:
    """The outermost values of a range, or all choices."""
    if isinstance(dimension, Choices):
        return dimension.choices
    if not _kinds(experiment, key) & {int, float}:
        raise ConfigurationError(f"tune.space.{key} is not a number; write {{choices: [...]}}")
    if not is_whole(experiment, key):
        return dimension.low, dimension.high
    if any(value % 1 for value in (dimension.low, dimension.high, dimension.step or 1)):
        raise ConfigurationError(f"tune.space.{key} takes whole numbers only")
    return int(dimension.low), int(dimension.high)


def _check_model(experiment: Experiment) -> None:
    """Whether the architecture takes the options; built without memory."""
    import torch

    with torch.device("meta"):
        create(experiment.model.name, 2, experiment.input.channels or 1, **experiment.model.options)


def _kinds(experiment: Experiment, key: str) -> set[Any]:
    """Python types of a setting's values."""
    if key == STRENGTH:
        return {float}
    if key.startswith(_OPTION):
        options = describe(experiment.model.name).options
        return {type(option.default) for option in options if f"{_OPTION}{option.name}" == key} or {float}
    section, _, name = key.partition(".")
    owner: Any = Experiment.model_fields[section].annotation
    field = owner.model_fields.get(name)
    if field is None:
        return {float}  # an unknown setting; trying its values tells so
    parts = get_args(field.annotation) or (field.annotation,)
    return {get_args(part)[0] if get_args(part) else part for part in parts}


def is_whole(experiment: Experiment, key: str) -> bool:
    """Whether a setting takes whole numbers only."""
    kinds = _kinds(experiment, key)
    return int in kinds and float not in kinds and bool not in kinds


def own_values(experiment: Experiment, space: Mapping[str, Range | Choices]) -> dict[str, Value] | None:
    """The point of the space where the experiment itself stands; None if it stands outside."""
    found = {key: _own_value(experiment, key) for key in space}
    return found if all(space[key].holds(value) for key, value in found.items()) else None


def _own_value(experiment: Experiment, key: str) -> Any:
    if key == STRENGTH:
        return 1.0
    if key == "optimiser.learning_rate":
        return peak_rate(experiment)
    if key == "optimiser.weight_decay":
        return proven_decay(experiment.optimiser)
    if key.startswith(_INPUT):
        return _own_input(experiment, key.removeprefix(_INPUT))
    if key.startswith(_OPTION):
        name = key.removeprefix(_OPTION)
        defaults = {option.name: option.default for option in describe(experiment.model.name).options}
        return experiment.model.options.get(name, defaults.get(name))
    section, _, name = key.partition(".")
    return getattr(getattr(experiment, section), name)


def _own_input(experiment: Experiment, name: str) -> Any:
    """What is not set is the architecture's own."""
    config = experiment.input
    own = describe(experiment.model.name).input_for(experiment.model.options)
    size = config.size or own.height
    unset = {
        "size": size,
        "train_size": size,
        "resize": own.resize.mode,
        "shorter_side": own.resize.shorter_side and round(own.resize.shorter_side * size / own.height),
    }
    value = getattr(config, name)
    return unset.get(name) if value is None else value


def settled(experiment: Experiment, values: Mapping[str, Value]) -> Experiment:
    """The experiment of one trial. Fractional numbers are rounded to 4 digits, so that files stay readable.

    Raises:
        ConfigurationError: a value is unknown or out of its range.
    """
    tried = {key: rounded(value) for key, value in values.items()}
    strength = tried.pop(STRENGTH, 1.0)
    if not isinstance(strength, int | float):
        raise ConfigurationError(f"{STRENGTH} is a number, not {strength!r}")
    tree = experiment.model_dump()
    if strength != 1:
        tree["augment"] |= _strengthened(tree["augment"], strength)
    return load_experiment(None, {**tree, **tried})


def _strengthened(augment: Mapping[str, Any], strength: float) -> dict[str, Any]:
    scaled = {name: rounded(min(augment[name] * strength, most)) for name, most in _STRENGTHS.items()}
    area = max(1 - (1 - augment["crop_area"]) * strength, _LEAST_CROP_AREA)
    return {**scaled, "crop_padding": round(scaled["crop_padding"]), "crop_area": rounded(area)}


def rounded(value: Any) -> Any:
    """The value that a trial uses for what the search suggests."""
    return float(f"{value:.4g}") if isinstance(value, float) else value
