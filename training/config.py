"""Every choice of a training run, declared once: frozen, validated, and stored with the model it made.

An experiment file is YAML with these sections. Precedence: flags, then the file, then the defaults below. The
defaults are the recipe for small images (`training/experiments/digits-lenet.yaml` says what it reaches).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from service import strict_yaml, validation
from service.artifact import NAME_PATTERN
from service.errors import ConfigurationError

_EXPERIMENTS = Path(__file__).with_name("experiments")

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Side = Annotated[int, Field(ge=1, le=8192)]
VariantName = Literal["int8", "fp16", "trt-int8"]

# What other programs call settings.
_SHORT = {"lr": "learning_rate", "wd": "weight_decay", "bs": "batch_size"}


class Section(BaseModel):
    """Frozen, and a misspelt key is an error. So is `yes` for a number, which would count as 1."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_number_is_a_truth(cls, given: Any) -> Any:
        for name, value in given.items() if isinstance(given, Mapping) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field and bool not in (field.annotation, *get_args(field.annotation)):
                raise ValueError(f"{name} takes no {'yes' if value else 'no'}; leave it out, or give its value")
        return given


class DataConfig(Section):
    """What is read and how it is split.

    `validation`, `test`: fractions of each class held out, unless the data come with their own split. `split_seed`
    decides which images those are. `min_side_pixels`: smaller images are reported and left out. `cache`: where the
    decoded pixels are kept; `auto` is memory up to a quarter of what is free, else a file in the run's folder.
    `shuffle_buffer`: with tar shards, the number of encoded images that are shuffled among each other.
    """

    validation: Fraction = 0.1
    test: Fraction = 0.1
    split_seed: Annotated[int, Field(ge=0)] = 0
    min_side_pixels: Count = 4
    cache: Literal["auto", "memory", "disk"] = "auto"
    shuffle_buffer: Count = 2000


class ModelConfig(Section):
    """Architecture and its options, as `training.models.create` takes them."""

    name: str = "lenet5"
    options: Mapping[str, bool | int | float] = {}


class InputConfig(Section):
    """What the model sees. None is the architecture's, or for `channels` what the images are.

    `size`: height and width in pixels. `shorter_side`: what an image is scaled to before the centre crop; None: in the
    architecture's proportion to `size`. `train_size`: height and width of the training images, where they are not to
    be those of `size`; the view stays the same. Smaller ones train faster, and since random crops show objects larger
    than the centre crop does, often more accurately (Touvron et al., "Fixing the train-test resolution discrepancy",
    arXiv:1906.06423). Validation, test and export are always at `size`.
    """

    size: Side | None = None
    train_size: Side | None = None
    channels: Literal[1, 3] | None = None
    resize: Literal["crop", "stretch"] | None = None
    shorter_side: Side | None = None


class AugmentConfig(Section):
    """Random changes of the training images; each is drawn uniformly and anew for every image and epoch.

    `rotation_degrees`: up to so far to either side. `translation`: up to this fraction of the side. `scale`: between
    1 / (1 + scale) and 1 + scale. `crop_padding`: shift by up to so many whole pixels. `crop_area`: cut a rectangle of
    this fraction of the area up to all of it, aspect ratio 3:4 to 4:3, and enlarge it. `fill`: what lies outside of
    the image. `brightness`, `contrast`, `saturation`: factor between 1 - x and 1 + x. `trivial_augment`: one operation
    of TrivialAugment per image. `erasing`: probability that a rectangle is blanked. `mixup`, `cutmix`: parameter of the
    Beta distribution, 0 is off. Flips change the meaning of digits and text and are off unless asked for.
    """

    rotation_degrees: Annotated[float, Field(ge=0, le=180)] = 12.0
    translation: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    scale: Annotated[float, Field(ge=0, le=1)] = 0.1
    crop_padding: Annotated[int, Field(ge=0, le=64)] = 0
    crop_area: Annotated[float, Field(gt=0, le=1)] = 1.0
    horizontal_flip: bool = False
    vertical_flip: bool = False
    fill: Literal["zeros", "border", "reflection"] = "border"
    brightness: Fraction = 0.0
    contrast: Fraction = 0.0
    saturation: Fraction = 0.0
    trivial_augment: bool = False
    erasing: Annotated[float, Field(ge=0, le=1)] = 0.0
    mixup: NotNegative = 0.0
    cutmix: NotNegative = 0.0

    @model_validator(mode="after")
    def _one_crop(self) -> Self:
        if self.crop_padding and self.crop_area < 1:
            raise ValueError("crop_padding and crop_area are two ways to crop; set one of them")
        return self


class OptimiserConfig(Section):
    """How weights follow gradients.

    `learning_rate`: the peak of the schedule; None takes a proven one (`training.optimise`), and so for `weight_decay`,
    which spares biases and normalisation layers. `momentum` is that of Nesterov SGD, and the first beta of Adam and
    AdamW. `clip_norm`: largest norm of the whole gradient; None does not clip.
    """

    name: Literal["sgd", "adam", "adamw"] = "adamw"
    learning_rate: Positive | None = None
    weight_decay: NotNegative | None = None
    momentum: Fraction = 0.9
    clip_norm: Positive | None = None


class ScheduleConfig(Section):
    """How the learning rate moves.

    `warmup`: fraction of all steps in which it rises; None: 0.3 of a cycle, 0.05 of the others. `final`: what it falls
    to, over the peak.
    """

    name: Literal["one-cycle", "cosine", "constant"] = "one-cycle"
    warmup: Fraction | None = None
    final: Fraction = 0.0


class LoopConfig(Section):
    """The loop.

    `batch_size`: images per step, over all processes; `accumulate`: in so many pieces per process, to save memory.
    `ema_decay`: of the averaged weights; 0 keeps none. `balance`: against classes of different size, weigh the loss or
    draw rare classes more often. `precision`: `auto` measures whether bfloat16 is worth it. `deterministic`: refuse
    operations that are not repeatable. `patience`: stop after so many epochs of the last phase without a better one.
    `stuck_epochs`: stop with advice after so many epochs in a row whose loss is that of guessing; 0 never.
    `checkpoint_steps`: write `last.pt` also within epochs, every so many steps. `threads`: of PyTorch's operators;
    None: one for small steps, else all.
    """

    epochs: Count = 30
    batch_size: Annotated[int, Field(ge=2)] = 64
    accumulate: Count = 1
    label_smoothing: Fraction = 0.0
    ema_decay: Fraction = 0.99
    balance: Literal["none", "weights", "sampler"] = "none"
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    compile: bool = False
    deterministic: bool = False
    patience: Count | None = None
    stuck_epochs: Annotated[int, Field(ge=0)] = 5
    checkpoint_steps: Count | None = None
    threads: Count | None = None
    tensorboard: bool = False
    seed: Annotated[int, Field(ge=0)] = 0

    @property
    def images_at_once(self) -> int:
        """Images of a step that are in memory together, over all processes."""
        return math.ceil(self.batch_size / self.accumulate)


class TransferConfig(Section):
    """Starting from trained weights.

    `weights`: checkpoint file; None trains from scratch. `strategy`: `linear-probe` trains the head only; `fine-tune`
    everything; `lp-ft` the head first, then everything (Kumar et al., arXiv:2202.10054); `gradual` unfreezes stage
    after stage from the head down (Howard and Ruder, arXiv:1801.06146). `probe`: fraction of the epochs for the head
    alone. `spread`: the first stage learns so many times slower than the head. `freeze_norm`: BatchNorm keeps the
    statistics it came with. `licence`: of the weights; goes into the manifest, and need not be
    given of those that torchvision publishes.
    """

    weights: Path | None = None
    strategy: Literal["linear-probe", "fine-tune", "lp-ft", "gradual"] = "lp-ft"
    probe: Annotated[float, Field(gt=0, lt=1)] = 0.25
    spread: Annotated[float, Field(ge=1)] = 100.0
    freeze_norm: bool = False
    licence: str = "unspecified"


class ExportConfig(Section):
    """What is written beside the float model, and what proves it.

    `variants`: smaller formats to try; each is kept only if it is accurate enough and measured faster, `trt-int8`
    without a measurement where there is no TensorRT. `accuracy_budget_points`: top-1 points (hundredths) that a variant
    may lose on the held-out images. `largest_batch`: ONNX Runtime has to agree with PyTorch on batches of 1, 2, 7 and
    this. `calibration_images`: training images for the ranges of int8; TensorRT's form takes 128 of them at most, tar
    shards give 512 at most. `canary_images`: held-out images of different classes that go into the version, by which
    the service checks itself.
    """

    variants: tuple[VariantName, ...] = ("int8", "fp16")
    accuracy_budget_points: Annotated[float, Field(ge=0, le=100)] = 0.5
    largest_batch: Annotated[int, Field(ge=1, le=1024)] = 64
    calibration_images: Annotated[int, Field(ge=1, le=8192)] = 512
    canary_images: Annotated[int, Field(ge=1, le=64)] = 8


class Experiment(Section):
    """A whole run. `name`: the model's name in the repository."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)] = "model"
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    input: InputConfig = InputConfig()
    augment: AugmentConfig = AugmentConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    loop: LoopConfig = LoopConfig()
    transfer: TransferConfig = TransferConfig()
    export: ExportConfig = ExportConfig()


def find_experiment(name: str) -> Path:
    """A file of that path, or the experiment of that name that comes with Convoy.

    Raises:
        ConfigurationError: there is neither.
    """
    file = Path(name)
    ours = _EXPERIMENTS / f"{name}.yaml"
    if file.is_file() or not ours.is_file():
        if not file.is_file():
            known = ", ".join(sorted(entry.stem for entry in _EXPERIMENTS.glob("*.yaml")))
            raise ConfigurationError(f"there is no experiment file {name}; those that come along are {known}")
        return file
    return ours


def load_experiment(file: Path | None, overrides: Mapping[str, Any], name: str | None = None) -> Experiment:
    """Reads an experiment file and lays overrides over it.

    Args:
        file: YAML; None takes the defaults.
        overrides: values by dotted key, such as {"loop.epochs": 5}.
        name: of the model where neither gives one.

    Raises:
        ConfigurationError: the file cannot be read, is no YAML mapping, or a value is unknown or out of its range.
    """
    tree = read_yaml(file) if file else {}
    tree.pop("tune", None)  # what `convoy tune` varies (training.search_space) is no part of a single run
    for key, value in overrides.items():
        _put(tree, key, value)
    if name is not None:
        tree.setdefault("name", name)
    try:
        return Experiment.model_validate(tree)
    except ValidationError as error:
        where = f"{file}: " if file else ""
        raise ConfigurationError(where + "; ".join(_fault(dict(e)) for e in error.errors())) from error


def check_transfer(experiment: Experiment, flags: Mapping[str, Any]) -> None:
    """Whoever says with a flag how to learn from weights, and gives none, believes that there are some.

    Raises:
        ConfigurationError: that is so.
    """
    if experiment.transfer.weights is not None:
        return
    for key, value in flags.items():
        section, _, setting = key.partition(".")
        if section == "transfer" and setting != "weights" and value:
            raise ConfigurationError(
                f"{key} = {value} says how to learn from weights, and there are none; give --weights, or leave it out"
            )


def setting_names(section: type[BaseModel] = Experiment, prefix: str = "") -> Iterator[str]:
    """Dotted keys of all settings."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from setting_names(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


def read_yaml(file: Path) -> dict[str, Any]:
    """The sections of an experiment file, not yet checked.

    Raises:
        ConfigurationError: the file cannot be read, or is no YAML mapping.
    """
    try:
        tree = strict_yaml.parse(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{file} cannot be read as an experiment file: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigurationError(f"{file} is no experiment file: it has to hold sections such as `loop:` and `data:`")
    # Where all settings of a section are commented out, nothing is left of it but its name.
    return {
        name: section for name, section in tree.items() if section is not None or name not in Experiment.model_fields
    }


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    for section in sections:
        below = tree.setdefault(section, {})
        if not isinstance(below, dict):
            raise ConfigurationError(f"{key}: {section} is a single value, not a section")
        tree = below
    tree[leaf] = value


def _fault(error: Mapping[str, Any]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "string_pattern_mismatch":
        return f"{key} {error['input']!r} may hold letters, digits and ._- only, and starts with a letter or digit"
    if error["type"] == "extra_forbidden":
        near = _meant(key)
        meant = f"; did you mean {near}?" if near else ";"
        return f"{key} is not a setting{meant} `convoy train --print-settings` lists them"
    said, given = validation.message(error), validation.value(error)
    return f"{key}{given and f' = {given}'}: {said[0].lower()}{said[1:]}"


def _meant(key: str) -> str | None:
    """The setting or section whose name a mistyped one is likely to stand for."""
    section, _, name = key.rpartition(".")
    known = list(setting_names())
    if not section:  # of a section, or of a setting without its section
        near = difflib.get_close_matches(key, Experiment.model_fields, 1)
        return near[0] if near else next((each for each in known if each.endswith(f".{key}")), None)
    beside = [each for each in known if each.startswith(f"{section}.")]
    wanted = f"{section}.{_SHORT.get(name, name)}"
    begins = [each for each in beside if each.startswith(wanted)]
    near = begins or difflib.get_close_matches(wanted, beside, 1) or difflib.get_close_matches(key, known, 1)
    return near[0] if near else None
