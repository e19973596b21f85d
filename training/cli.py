"""`convoy train`: options to an experiment, an experiment to a model version.

Imported by `convoy --help`, with or without the `training` extra: everything heavy is imported inside the command.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import click

from service.errors import ConfigurationError

_EXTRA = ("torch", "onnx", "onnxscript", "sklearn", "safetensors", "matplotlib")

# Flag to the setting that it overrides; a flag that is not given leaves the experiment file's value.
_SETTINGS = {
    "name": "name",
    "model": "model.name",
    "epochs": "loop.epochs",
    "batch_size": "loop.batch_size",
    "learning_rate": "optimiser.learning_rate",
    "weight_decay": "optimiser.weight_decay",
    "optimiser": "optimiser.name",
    "label_smoothing": "loop.label_smoothing",
    "ema_decay": "loop.ema_decay",
    "seed": "loop.seed",
    "image_size": "input.size",
    "channels": "input.channels",
    "validation": "data.validation",
    "test": "data.test",
    "split_seed": "data.split_seed",
    "rotation": "augment.rotation_degrees",
    "translation": "augment.translation",
    "scale": "augment.scale",
    "horizontal_flip": "augment.horizontal_flip",
    "vertical_flip": "augment.vertical_flip",
}


@click.command(short_help="Train a classifier on a folder of images and export it.")
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--model", help="Architecture, such as lenet5 (default) or resnet18.")
@click.option("--epochs", type=click.IntRange(min=1), help="Passes over the training images (default 30).")
@click.option(
    "--repository",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("models"),
    show_default=True,
    help="Model repository: the version appears as REPOSITORY/NAME/<number>/.",
)
@click.option("--name", help="The model's name in the repository (default: the name of the DATA folder).")
@click.option("--config", type=click.Path(path_type=Path, dir_okay=False), help="Experiment file; flags override it.")
@click.option("--batch-size", type=click.IntRange(min=2), help="Images per step (default 64).")
@click.option("--learning-rate", type=click.FloatRange(min=0, min_open=True), help="Peak of the schedule.")
@click.option("--weight-decay", type=click.FloatRange(min=0), help="Spares biases and norm layers (default 0.01).")
@click.option("--optimiser", type=click.Choice(["sgd", "adam", "adamw"]), help="Default adamw.")
@click.option("--label-smoothing", type=click.FloatRange(0, 1, max_open=True), help="Default 0.")
@click.option("--ema-decay", type=click.FloatRange(0, 1, max_open=True), help="Of averaged weights; 0: none.")
@click.option("--seed", type=click.IntRange(min=0), help="Of weights, order and augmentation (default 0).")
@click.option("--image-size", type=click.IntRange(min=1), help="Height and width in pixels.")
@click.option("--channels", type=click.IntRange(1, 3), help="1 gray or 3 RGB (default: what the images are).")
@click.option("--validation", type=click.FloatRange(0, 1, max_open=True), help="Fraction that picks the best epoch.")
@click.option("--test", type=click.FloatRange(0, 1, max_open=True), help="Fraction held out for the final figures.")
@click.option("--split-seed", type=click.IntRange(min=0), help="Which images are held out (default 0).")
@click.option("--rotation", type=click.FloatRange(0, 180), help="Largest random rotation in degrees (default 12).")
@click.option("--translation", type=click.FloatRange(0, 0.5), help="Largest shift, of the side (default 0.1).")
@click.option("--scale", type=click.FloatRange(0, 1), help="Largest relative change of size (default 0.1).")
@click.option("--horizontal-flip/--no-horizontal-flip", default=None, help="Off by default: wrong for text.")
@click.option("--vertical-flip/--no-vertical-flip", default=None, help="Off by default.")
@click.option(
    "--runs",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs"),
    show_default=True,
    help="Checkpoints and settings go to RUNS/NAME/<number>/.",
)
def train(data: Path, repository: Path, runs: Path, config: Path | None, **flags: Any) -> None:
    """Train on DATA and export a model version.

    DATA holds one folder of images per class. A stratified part is held out for validation and test, broken files
    are reported and left out, the best epoch is kept, checked and exported to ONNX.

    \b
    Examples:
      convoy train photos --model resnet18 --epochs 20 --horizontal-flip
      convoy train digits --model lenet5 --name digits --repository models
    """
    require_extra()
    from rich.console import Console

    from training.config import load_experiment
    from training.display import Display
    from training.run import run

    overrides = {setting: flags[flag] for flag, setting in _SETTINGS.items() if flags[flag] is not None}
    if config is None:
        overrides.setdefault("name", data.resolve().name)
    experiment = load_experiment(config, overrides)
    display = Display(Console())
    result = run(experiment, data, repository, runs, display)
    display.say(f"\nWrote {result.version}")
    display.say("Next:")
    display.say(f"  convoy serve --repository {repository}")
    display.say(f"  convoy classify IMAGE --server localhost:8500 --model {experiment.name}")


@click.command(short_help="Train on real digits, serve the model, classify over gRPC.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(".demo"),
    show_default=True,
    help="Where the pictures, the run and the model go.",
)
@click.option("--train-only", is_flag=True, help="Stop when the model is exported.")
def demo(folder: Path, train_only: bool) -> None:
    """Train LeNet on 1,797 real handwritten digits, serve it, and classify the held-out ones over gRPC."""
    require_extra()
    from rich.console import Console

    from training.demo import demo as run_demo

    run_demo(folder, Console(), train_only=train_only)


def require_extra() -> None:
    """Says what to install where training's libraries are missing.

    Raises:
        ConfigurationError: one of them cannot be found.
    """
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"training needs {', '.join(missing)}, which the service does without: pip install 'convoy[training]'"
        )
