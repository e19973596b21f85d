"""Training's commands: options to an experiment, an experiment to a model version.

Imported by `convoy --help`, with or without the `training` extra: everything heavy is imported inside the command.
"""

from __future__ import annotations

import importlib.util
import shlex
import signal
from pathlib import Path
from typing import Any

import click

from service.errors import ConfigurationError
from service.exits import Exit
from training.options import overrides_of, setting_options

_EXTRA = ("torch", "onnx", "onnxscript", "sklearn", "safetensors", "matplotlib", "psutil")


@click.command(short_help="Train a classifier on a folder of images and export it.")
@click.argument("data", type=click.Path(path_type=Path), required=False)
@click.option(
    "--repository",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("models"),
    show_default=True,
    help="Model repository: the version appears as REPOSITORY/NAME/<number>/.",
)
@click.option(
    "--runs",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs"),
    show_default=True,
    help="Checkpoints, logs and settings go to RUNS/NAME/<number>/.",
)
@click.option("--config", help="Experiment file, or the name of one of those that come along; flags override it.")
@click.option("--resume", is_flag=True, help="Go on with the newest run in RUNS/NAME that has a checkpoint.")
@click.option(
    "--resume-if-any",
    is_flag=True,
    help="The same if there is one with a checkpoint, else start; for jobs that are run again as they are. Of a run "
    "that is published already, nothing is done until settings or images change.",
)
@click.option("--find-lr", is_flag=True, help="Do not train: raise the learning rate until it breaks, and plot.")
@click.option("--print-settings", is_flag=True, help="Do not train: print every setting, as an experiment file.")
@setting_options
@click.pass_context
def train(
    context: click.Context,
    /,
    data: Path | None,
    repository: Path,
    runs: Path,
    config: str | None,
    *,
    resume: bool,
    resume_if_any: bool,
    find_lr: bool,
    print_settings: bool,
    assignments: tuple[str, ...],
    **flags: Any,
) -> None:
    """Train on DATA and export a model version.

    DATA holds one folder of images per class; or train, val and test folders of such; or it is a CSV or Parquet file
    with columns path, label and perhaps split; or tar shards in the WebDataset layout. Without a split of its own a
    stratified part is held out. Broken files are reported and left out, the best epoch is kept, checked and exported
    to ONNX.

    SIGTERM and Ctrl-C write a checkpoint first; --resume ends with the weights of a run that was never interrupted. It
    refuses other settings than those the run was started with, but for the export's.
    Several processes: torchrun --nproc-per-node 2 --max-restarts 3 -m service train DATA ...; if one of them is lost,
    torchrun starts them again, and they go on from the last checkpoint.

    \b
    Examples:
      convoy train photos --model resnet18 --epochs 20 --horizontal-flip
      convoy train photos --model resnet50 --weights resnet50-11ad3fa6.pth --epochs 10
      convoy train digits --config digits-lenet --name digits --repository models
      convoy train --config photos-transfer --print-settings > mine.yaml
    """
    if data is None and not print_settings:
        raise click.UsageError("Missing argument 'DATA'.", context)
    require_extra()
    from training.config import check_transfer, find_experiment, load_experiment
    from training.display import console_of_process
    from training.folders import as_yaml, has_changed, name_for, newest_run, published, settings_of
    from training.interrupt import InterruptedRunError
    from training.run import run, search_learning_rate

    overrides = overrides_of(flags, assignments)
    file = find_experiment(config) if config else None
    experiment = load_experiment(file, overrides, name_for(data) if data else None)
    if print_settings or data is None:
        click.echo(as_yaml(experiment), nl=False)
        return
    folder = _begun(runs / experiment.name, needed=resume, wanted=resume_if_any)
    done = published(folder, repository) if folder and resume_if_any else None
    display = console_of_process()
    if folder and done and not has_changed(folder, experiment, data):
        display.say(f"{folder} is published as {done}, with these settings and images; nothing is to be done")
        return
    folder = None if done else folder
    if folder:
        experiment = settings_of(folder, file, overrides)
    check_transfer(experiment, overrides)
    if folder and (newer := newest_run(runs / experiment.name)) != folder:
        display.say(f"{newer} has no checkpoint; going on with {folder}")
    if find_lr:
        search_learning_rate(experiment, data, runs, display)
        return
    try:
        result = run(experiment, data, repository, runs, display, resume=folder)
    except InterruptedRunError as stopped:
        if stopped.folder:
            display.say(f"Stopped; the checkpoint is in {stopped.folder}. Go on with the same command and --resume")
        else:
            display.say("Stopped before the first checkpoint; start again with the same command")
        context.exit(Exit.CTRL_C if stopped.signal == signal.SIGINT else Exit.INTERRUPTED)
    display.say(f"\nWrote {result.version}")
    display.say(f"Logs and checkpoints: {result.folder}; model card: {result.version / 'card.html'}")
    display.say("Next:")
    display.say(f"  convoy serve --repository {shlex.quote(str(repository))}")
    display.say(f"  convoy classify IMAGE --server localhost:8500 --model {experiment.name}")


def _begun(parent: Path, *, needed: bool, wanted: bool) -> Path | None:
    """The run to go on with: the newest with a checkpoint if that is asked for, or this one, started again."""
    from training.distributed import restarted
    from training.folders import LAST, begun_run, latest_run

    if needed:
        return latest_run(parent, LAST)
    if wanted:
        return begun_run(parent, LAST)
    began = restarted()
    return None if began is None else begun_run(parent, LAST, began)


@click.command(short_help="Draw what augmentation does to images.")
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("augment-preview.png"),
    show_default=True,
    help="Picture to write.",
)
@click.option("--rows", type=click.IntRange(1, 64), default=8, show_default=True, help="Images.")
@click.option("--columns", type=click.IntRange(2, 64), default=9, show_default=True, help="Versions of each.")
@click.option("--config", help="Experiment file or name, as for `convoy train`.")
@setting_options
def augment_preview(
    data: Path,
    output: Path,
    *,
    rows: int,
    columns: int,
    config: str | None,
    assignments: tuple[str, ...],
    **flags: Any,
) -> None:
    """Write a grid of augmented images of DATA; the first column is the originals.

    Takes the flags of `convoy train`, so that what is drawn is what that command would train on.

    \b
    Examples:
      convoy augment-preview photos/ --output augmented.png
      convoy augment-preview photos/ --config photos-transfer --rotation 30
    """
    require_extra()
    from training.config import find_experiment, load_experiment
    from training.display import console_of_process
    from training.preview import write_preview

    experiment = load_experiment(find_experiment(config) if config else None, overrides_of(flags, assignments))
    count = write_preview(experiment, data, output, rows=rows, columns=columns)
    console_of_process().say(f"Wrote {output}: {count} images, originals on the left")


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
    """Train LeNet on 1,797 real handwritten digits, serve it, and classify the held-out ones over gRPC.

    \b
    Examples:
      convoy demo
      convoy demo --folder /tmp/digits --train-only
    """
    require_extra()
    from training.demo import demo as run_demo
    from training.display import console_of_process

    run_demo(folder, console_of_process().console, train_only=train_only)


def require_extra() -> None:
    """Says what to install where training's libraries are missing.

    Raises:
        ConfigurationError: one of them cannot be found.
    """
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"training needs {', '.join(missing)}, which the service does without: in Convoy's checkout, "
            "pip install '.[training]'"
        )
