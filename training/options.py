"""The flags of `convoy train` that stand for settings: one table, from which the command line is made.

A flag that is not given leaves the experiment file's value, and `--set` reaches the settings that have no flag.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click

from service.errors import ConfigurationError

F = TypeVar("F", bound=Callable[..., Any])

_FRACTION = click.FloatRange(0, 1, max_open=True)
_POSITIVE = click.FloatRange(0, min_open=True)
_COUNT = click.IntRange(min=1)
_NUMBER = click.IntRange(min=0)

# Flag, setting, type (None: a switch), help.
_FLAGS: tuple[tuple[str, str, click.ParamType[Any] | None, str], ...] = (
    ("--name", "name", click.STRING, "The model's name in the repository (default: the name of the DATA folder)."),
    ("--model", "model.name", click.STRING, "Architecture (default lenet5); `convoy zoo` lists them."),
    ("--epochs", "loop.epochs", _COUNT, "Passes over the training images (default 30)."),
    ("--batch-size", "loop.batch_size", click.IntRange(min=2), "Images per step (default 64)."),
    (
        "--accumulate",
        "loop.accumulate",
        _COUNT,
        "Compute each batch in so many pieces, to save memory; a step still takes --batch-size images.",
    ),
    ("--image-size", "input.size", _COUNT, "Height and width in pixels (default: the architecture's)."),
    ("--train-size", "input.train_size", _COUNT, "Height and width of the training images (default: --image-size)."),
    ("--channels", "input.channels", click.Choice([1, 3]), "1 gray or 3 RGB (default: what the images are)."),
    ("--validation", "data.validation", _FRACTION, "Fraction that chooses the best epoch (default 0.1)."),
    ("--test", "data.test", _FRACTION, "Fraction held out for the final figures (default 0.1)."),
    ("--split-seed", "data.split_seed", _NUMBER, "Decides which images are held out (default 0)."),
    ("--cache", "data.cache", click.Choice(["auto", "memory", "disk"]), "Where decoded images are kept."),
    ("--optimiser", "optimiser.name", click.Choice(["sgd", "adam", "adamw"]), "Default adamw; sgd is Nesterov's."),
    ("--learning-rate", "optimiser.learning_rate", _POSITIVE, "Peak of the schedule; --find-lr looks for one."),
    (
        "--weight-decay",
        "optimiser.weight_decay",
        click.FloatRange(min=0),
        "Default 0.01 for adamw, else 5e-4.",
    ),
    ("--clip-norm", "optimiser.clip_norm", _POSITIVE, "Largest norm of the gradient (default: no limit)."),
    ("--schedule", "schedule.name", click.Choice(["one-cycle", "cosine", "constant"]), "Default one-cycle."),
    (
        "--warmup",
        "schedule.warmup",
        _FRACTION,
        "Fraction of the steps in which the rate rises (default 0.3, of other schedules than one-cycle 0.05).",
    ),
    ("--label-smoothing", "loop.label_smoothing", _FRACTION, "Default 0."),
    ("--ema-decay", "loop.ema_decay", _FRACTION, "Of the averaged weights (default 0.99); 0: no average."),
    ("--balance", "loop.balance", click.Choice(["none", "weights", "sampler"]), "Against classes of unequal size."),
    (
        "--patience",
        "loop.patience",
        _COUNT,
        "Stop after so many epochs without a better one, counted in the last phase.",
    ),
    ("--rotation", "augment.rotation_degrees", click.FloatRange(0, 180), "Largest rotation (default 12 degrees)."),
    ("--translation", "augment.translation", click.FloatRange(0, 0.5), "Largest shift, of the side (default 0.1)."),
    ("--scale", "augment.scale", click.FloatRange(0, 1), "Largest change of size (default 0.1)."),
    ("--crop-padding", "augment.crop_padding", click.IntRange(0, 64), "Shift by up to so many whole pixels."),
    ("--horizontal-flip", "augment.horizontal_flip", None, "Mirror half of the images; wrong for digits and text."),
    ("--vertical-flip", "augment.vertical_flip", None, "Turn half of the images upside down."),
    ("--trivial-augment", "augment.trivial_augment", None, "One random operation per image (TrivialAugment)."),
    ("--erasing", "augment.erasing", click.FloatRange(0, 1), "Probability that a rectangle is blanked."),
    ("--mixup", "augment.mixup", click.FloatRange(0), "Blend pairs of images; 0.2 is usual."),
    ("--cutmix", "augment.cutmix", click.FloatRange(0), "Paste rectangles of other images; 1 is usual."),
    ("--weights", "transfer.weights", click.Path(), "Start from this checkpoint (.pth, .pt, .safetensors)."),
    (
        "--strategy",
        "transfer.strategy",
        click.Choice(["linear-probe", "fine-tune", "lp-ft", "gradual"]),
        "How to learn from --weights (default lp-ft: the head first, then everything).",
    ),
    ("--freeze-norm", "transfer.freeze_norm", None, "BatchNorm keeps the statistics of --weights."),
    (
        "--precision",
        "loop.precision",
        click.Choice(["auto", "float32", "bfloat16", "float16"]),
        "Of the forward pass; auto measures whether bfloat16 is faster.",
    ),
    ("--compile", "loop.compile", None, "Let torch.compile generate the kernels."),
    ("--deterministic", "loop.deterministic", None, "Refuse operations whose result varies from run to run."),
    ("--threads", "loop.threads", _COUNT, "CPU threads of PyTorch."),
    ("--tensorboard", "loop.tensorboard", None, "Write TensorBoard events beside log.csv."),
    ("--seed", "loop.seed", _NUMBER, "Of weights, order and augmentation (default 0)."),
)


def setting_options(command: F) -> F:
    """Adds the table's flags, and `--set`, to a click command."""
    command = click.option(
        "--set",
        "assignments",
        multiple=True,
        metavar="KEY=VALUE",
        help="Any other setting, such as transfer.spread=10; `convoy train --print-settings` lists them.",
    )(command)
    for flag, _, kind, text in reversed(_FLAGS):
        if kind is None:
            command = click.option(f"{flag}/--no-{flag[2:]}", default=None, help=text)(command)
        else:
            command = click.option(flag, type=kind, help=text)(command)
    return command


def overrides_of(flags: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Settings by dotted key: those of the flags that were given, then those of `--set`.

    Raises:
        ConfigurationError: an assignment has no `=`, or its value is no YAML.
    """
    given = {setting: flags[flag[2:].replace("-", "_")] for flag, setting, _, _ in _FLAGS}
    return {setting: value for setting, value in given.items() if value is not None} | dict(map(_parse, assignments))


def _parse(assignment: str) -> tuple[str, Any]:
    import yaml

    from service import strict_yaml

    key, separator, text = assignment.partition("=")
    if not separator or not key:
        raise ConfigurationError(f"--set {assignment}: write KEY=VALUE, such as --set loop.epochs=5")
    try:
        return key, strict_yaml.parse(text)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"--set {assignment}: the value is no YAML") from error
