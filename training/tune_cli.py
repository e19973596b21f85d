"""`convoy tune`: looks for better settings, and writes them as an experiment file.

Imported by `convoy --help`, with or without the `training` extra: everything heavy is imported inside the command.
"""

from __future__ import annotations

import shlex
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from service.errors import ConfigurationError
from service.exits import Exit
from training.cli import require_extra
from training.options import overrides_of, setting_options

if TYPE_CHECKING:
    from training.config import Experiment
    from training.display import Display
    from training.tune import Outcome, Tuning
    from training.tune_config import TuneConfig


@click.command(short_help="Search for better settings, and write them as an experiment file.")
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--trials", type=click.IntRange(min=1), help="Trials of the study over all workers (default 30).")
@click.option("--timeout-s", type=click.FloatRange(0, min_open=True), help="Stop this worker after so many seconds.")
@click.option(
    "--storage",
    envvar="CONVOY_TUNE_STORAGE",
    metavar="URL",
    help="sqlite:///FILE or postgresql://USER@HOST/DATABASE (default: RUNS/NAME/tuning.db, an SQLite file). "
    "A URL with a password belongs into CONVOY_TUNE_STORAGE.",
)
@click.option("--study", help="Name of the study (default: the model's name).")
@click.option("--objective", type=click.Choice(["accuracy", "loss"]), help="Validation figure (default accuracy).")
@click.option("--pruner", type=click.Choice(["median", "hyperband", "none"]), help="Ends poor trials early.")
@click.option("--space", type=click.Path(path_type=Path, dir_okay=False), help="YAML file: a `tune:` section alone.")
@click.option("--print-space", is_flag=True, help="Write the search space as YAML, to be edited, and stop.")
@click.option(
    "--runs",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs"),
    show_default=True,
    help="Storage, checkpoints of running trials and the result go to RUNS/NAME/.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Experiment file to write; the page with the plots goes beside it (default: RUNS/NAME/tuning/STUDY.yaml).",
)
@click.option("--config", help="Experiment file or name, as for `convoy train`; may hold a `tune:` section.")
@setting_options
@click.pass_context
def tune(
    context: click.Context,
    /,
    data: Path,
    runs: Path,
    storage: str | None,
    study: str | None,
    space: Path | None,
    output: Path | None,
    config: str | None,
    *,
    print_space: bool,
    assignments: tuple[str, ...],
    **flags: Any,
) -> None:
    """Search for the settings with the best validation figure on DATA.

    Takes the data and the flags of `convoy train`; they settle what is not searched. The first trial is the experiment
    as it stands. The test part of the data is never used.

    The same command goes on with an interrupted study. Given several times at once, with one --storage, it shares the
    trials among as many workers.

    \b
    Examples:
      convoy tune digits --config digits-lenet --trials 40
      convoy tune photos --model resnet18 --epochs 8 --pruner hyperband --timeout-s 3600
      convoy tune photos --model resnet18 --print-space > space.yaml
    """
    require_extra()
    from training.config import check_transfer, find_experiment, load_experiment
    from training.display import console_of_process
    from training.folders import name_for
    from training.tune_config import load_tuning

    search = _search_overrides(flags)
    overrides = overrides_of(flags, assignments)
    file = find_experiment(config) if config else None
    experiment, tuning = load_experiment(file, overrides, name_for(data)), load_tuning(file, space, search)
    check_transfer(experiment, overrides)
    if print_space:
        click.echo(_space_text(experiment, tuning))
        return
    from training.tune import Tuning
    from training.tune import tune as run

    if output is not None and output.suffix.lower() == ".html":
        raise ConfigurationError(f"--output {output} takes the experiment file, as best.yaml; the page lies beside it")
    job = Tuning(
        experiment=experiment,
        config=tuning,
        source=data,
        runs=runs,
        storage=storage or f"sqlite:///{runs / experiment.name / 'tuning.db'}",
        study=study or experiment.name,
        output=output or runs / experiment.name / "tuning" / f"{study or experiment.name}.yaml",
    )
    display = console_of_process()
    outcome = run(job, display)
    _conclude(job, outcome, display)
    if outcome.signal is not None:
        context.exit(Exit.CTRL_C if outcome.signal == signal.SIGINT else Exit.INTERRUPTED)


def _search_overrides(flags: dict[str, Any]) -> dict[str, Any]:
    """Takes the flags of the search out of all flags."""
    found = {key: flags.pop(key) for key in ("trials", "timeout_s", "objective", "pruner")}
    if found["pruner"] is not None:
        found["pruner"] = {"name": found["pruner"]}
    return {key: value for key, value in found.items() if value is not None}


def _space_text(experiment: Experiment, tuning: TuneConfig) -> str:
    import yaml

    from training.search_space import check_space, default_space

    space = dict(tuning.space) or default_space(experiment)
    check_space(experiment, space)
    tree = tuning.model_dump(mode="json", exclude_none=True)
    tree["space"] = {key: kind.model_dump(mode="json", exclude_defaults=True) for key, kind in space.items()}
    return yaml.safe_dump({"tune": tree}, sort_keys=False, default_flow_style=None).rstrip()


def _conclude(job: Tuning, outcome: Outcome, display: Display) -> None:
    if outcome.elsewhere:
        display.say(
            f"{outcome.elsewhere} trials are still running in other workers. If there is none, one was lost: "
            f"{job.heartbeat.grace_s} s after its last sign of life the same command takes its trial up again."
        )
    if outcome.left:
        display.say(f"{outcome.left} trials are left; the same command goes on with the study.")
    if outcome.best is None:
        return
    best = outcome.best
    display.say(
        f"\nBest: trial {best.number}, validation accuracy {best.user_attrs['val_accuracy']:.2%}, "
        f"loss {best.user_attrs['val_loss']:.4f}"
    )
    for key, value in outcome.tuned.items():
        display.say(f"  {key}: {value}")
    display.say(f"Wrote {job.output} and {outcome.page}")
    display.say(f"Next:\n  convoy train {shlex.quote(str(job.source))} --config {shlex.quote(str(job.output))}")
