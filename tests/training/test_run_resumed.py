"""Runs that are killed, stopped and gone on with."""

import io
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from runs import TREE, display

from service import artifact
from service.errors import TrainingError
from training import checkpoint
from training.cli import train
from training.config import Experiment
from training.display import Display
from training.folders import LAST, latest_run
from training.interrupt import InterruptedRunError
from training.run import run

ROOT = Path(__file__).parents[2]


# Trains as the test does, but kills its own process in the middle of the third epoch.
KILLED = """
import json, os, signal, sys
from pathlib import Path
from rich.console import Console
from training.config import Experiment
from training.display import Display, TrainingView
from training.run import run

class Deadly(TrainingView):
    steps = 0
    def step(self, images, loss):
        Deadly.steps += 1
        if Deadly.steps == int(sys.argv[5]):
            os.kill(os.getpid(), getattr(signal, sys.argv[4]))

import training.display
training.display.TrainingView = Deadly
experiment = Experiment.model_validate(json.loads(sys.argv[3]))
folder = Path(sys.argv[2])
run(experiment, Path(sys.argv[1]), folder / "models", folder / "runs", Display(Console(quiet=True)))
"""


def weights(folder, file="last.pt"):
    state = checkpoint.load(folder / file)
    return state["stepper"]["model"] if file == "last.pt" else state["model"]


def identical(first, second):
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize(("name", "code"), [("SIGKILL", -signal.SIGKILL), ("SIGTERM", 1)])
def test_a_killed_run_resumes_to_identical_weights(finished, digit_folder, tmp_path, name, code):
    """In mid-epoch: steps 4, 8, 12 and 16 end epochs."""
    experiment = Experiment.model_validate(TREE)
    arguments = [str(digit_folder), str(tmp_path), experiment.model_dump_json(), name, "10"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments], env=environment, capture_output=True, timeout=100, check=False
    )
    assert done.returncode == code, done.stderr
    folder = latest_run(tmp_path / "runs" / "digits", LAST)
    expected_step = {"SIGKILL": 8, "SIGTERM": 10}[name]  # the last whole epoch, or the step of the signal
    assert checkpoint.load(folder / "last.pt")["progress"]["step"] == expected_step
    result = run(experiment, digit_folder, tmp_path / "models", tmp_path / "runs", display(), resume=folder)
    whole, _ = finished
    assert identical(weights(whole.folder), weights(result.folder))
    assert identical(weights(whole.folder, "best.pt"), weights(result.folder, "best.pt"))
    assert result.evaluation.accuracy == whole.evaluation.accuracy


def test_a_refused_resume_leaves_the_record_of_what_was_held_out(finished, digit_folder, tmp_path):
    result, _ = finished
    shutil.copytree(result.folder, tmp_path / "1")
    fewer = tmp_path / "fewer"
    shutil.copytree(digit_folder, fewer)
    next(fewer.rglob("*.png")).unlink()
    with pytest.raises(TrainingError, match="images were added, removed or changed"):
        run(Experiment.model_validate(TREE), fewer, tmp_path / "models", tmp_path, display(), resume=tmp_path / "1")

    assert (tmp_path / "1" / "split.csv").read_bytes() == (result.folder / "split.csv").read_bytes()


def test_a_resumed_run_keeps_the_precision_that_was_measured_at_its_beginning(digit_folder, tmp_path):
    """Measured again, perhaps on another node, it could come out otherwise."""
    tree = {**TREE, "loop": {**TREE["loop"], "epochs": 1, "deterministic": False, "precision": "bfloat16"}}
    first = run(Experiment.model_validate(tree), digit_folder, tmp_path / "models", tmp_path / "runs", display())
    tree["loop"].update(epochs=2, precision="auto")
    second = run(
        Experiment.model_validate(tree),
        digit_folder,
        tmp_path / "models",
        tmp_path / "runs",
        display(),
        resume=first.folder,
    )
    assert checkpoint.load(second.folder / "last.pt")["identity"]["precision"] == "bfloat16"


# What torchrun starts: `convoy train`, of which the second process dies once, in the third epoch.
FRAGILE = """
import os, signal, sys
import training.display
from training.cli import train
from training.display import TrainingView

class Fragile(TrainingView):
    steps = 0
    def step(self, images, loss):
        Fragile.steps += 1
        if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and Fragile.steps == 10:
            os.kill(os.getpid(), signal.SIGKILL)

training.display.TrainingView = Fragile
train()
"""


def test_processes_that_are_started_again_go_on_from_the_checkpoint(finished, digit_folder, tmp_path):
    (tmp_path / "fragile.py").write_text(FRAGILE)
    (tmp_path / "experiment.yaml").write_text(Experiment.model_validate(TREE).model_dump_json())
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    options = ["--config", str(tmp_path / "experiment.yaml")]
    options += ["--repository", str(tmp_path / "models"), "--runs", str(tmp_path / "runs")]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, str(tmp_path / "fragile.py"), str(digit_folder), *options],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Wrote ") == 1  # one process speaks, and exports
    folder = tmp_path / "runs" / "digits" / "1"
    assert not (tmp_path / "runs" / "digits" / "2").exists()
    state, whole = checkpoint.load(folder / "last.pt"), finished[0]
    assert state["progress"]["epoch"] == 4
    alone = checkpoint.load(whole.folder / "last.pt")["progress"]["history"]
    for mine, theirs in zip(state["progress"]["history"], alone, strict=True):
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)


class Interrupting(Display):
    """Sends its own process a signal at a step of the loop."""

    def __init__(self, at_step, number):
        super().__init__(Console(file=io.StringIO(), width=120))
        self.left, self.number = at_step, number

    @contextmanager
    def training(self, *arguments):
        with super().training(*arguments) as view:

            def step(images, loss):
                self.left -= 1
                if not self.left:
                    os.kill(os.getpid(), self.number)

            yield SimpleNamespace(step=step, epoch=view.epoch)


def test_a_signal_in_the_last_validation_is_not_lost(digit_folder, tmp_path):
    class Late(Display):
        @contextmanager
        def training(self, *arguments):
            with super().training(*arguments) as view:

                def epoch(history):
                    view.epoch(history)
                    if len(history) == 2:
                        os.kill(os.getpid(), signal.SIGTERM)

                yield SimpleNamespace(step=view.step, epoch=epoch)

    tree = {**TREE, "loop": {**TREE["loop"], "epochs": 2, "stuck_epochs": 0}, "export": {"variants": []}}
    arguments = (Experiment.model_validate(tree), digit_folder, tmp_path / "models", tmp_path / "runs")
    with pytest.raises(InterruptedRunError) as stopped:
        run(*arguments, Late(Console(file=io.StringIO())))
    assert (stopped.value.signal, stopped.value.folder) == (signal.SIGTERM, tmp_path / "runs" / "digits" / "1")
    assert not list((tmp_path / "models").rglob("manifest.json"))
    assert run(*arguments, display(), resume=stopped.value.folder).version.name == "1"


def test_trained_small_it_is_judged_and_served_at_the_input_size_and_resumes_to_identical_weights(
    digit_folder, tmp_path
):
    tree = {
        **TREE,
        "input": {"size": 24, "train_size": 16},
        "loop": {"epochs": 2, "precision": "float32", "threads": 1, "stuck_epochs": 0},
        "export": {"variants": [], "largest_batch": 8, "canary_images": 3},
    }
    experiment, shown = Experiment.model_validate(tree), display()
    whole = run(experiment, digit_folder, tmp_path / "models", tmp_path / "whole", shown)
    manifest = artifact.load(whole.version).manifest
    assert manifest.input.shape == (24, 24, 1)
    assert manifest.recipe["input"]["train_size"] == 16
    assert [variant.name for variant in manifest.variants] == ["fp32"]
    assert "on 8 images" in manifest.variants[0].note
    assert len(manifest.canary.images) == 3
    assert "lenet5 on 24x24x1, trained at 16x16" in shown.console.file.getvalue()
    assert "trained at" in (whole.version / "card.html").read_text(encoding="utf-8")

    arguments = (experiment, digit_folder, tmp_path / "models", tmp_path / "parts")
    with pytest.raises(InterruptedRunError) as stopped:
        run(*arguments, Interrupting(6, signal.SIGINT))  # in the middle of the second epoch
    assert stopped.value.folder == latest_run(tmp_path / "parts" / "digits", LAST)
    resumed = run(*arguments, display(), resume=stopped.value.folder)
    assert identical(weights(whole.folder), weights(resumed.folder))
    assert resumed.evaluation.loss == whole.evaluation.loss


class Terminating(Display):
    """Sends its own process SIGTERM while images are read, or at a step of the export."""

    def __init__(self, phase):
        super().__init__(Console(file=io.StringIO(), width=120))
        self.phase = phase

    def reached(self, phase):
        if phase.startswith(self.phase):
            os.kill(os.getpid(), signal.SIGTERM)

    @contextmanager
    def reading(self, files, what="images"):
        with super().reading(files, what):
            yield lambda _: self.reached("reading")

    @contextmanager
    def working(self, step):
        with super().working(step):
            yield self.reached


def test_stopped_outside_of_the_loop_nothing_half_done_is_left(digit_folder, tmp_path):
    tree = {**TREE, "loop": {**TREE["loop"], "epochs": 1}, "data": {"cache": "disk"}, "export": {"variants": []}}
    arguments = (Experiment.model_validate(tree), digit_folder, tmp_path / "models", tmp_path / "runs")
    with pytest.raises(InterruptedRunError) as stopped:
        run(*arguments, Terminating("reading"))
    assert stopped.value.folder is None
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]
    with pytest.raises(InterruptedRunError) as stopped:
        run(*arguments, Terminating("Writing the model card"))
    assert (stopped.value.signal, stopped.value.folder) == (signal.SIGTERM, tmp_path / "runs" / "digits" / "1")
    assert not list((tmp_path / "models").iterdir())
    assert run(*arguments, display(), resume=stopped.value.folder).version.name == "1"


def test_a_job_that_is_run_again_does_nothing_until_something_changes(digit_folder, tmp_path):
    folders = ["--repository", str(tmp_path / "models"), "--runs", str(tmp_path / "runs")]
    options = ["--name", "digits", "--image-size", "16", "--set", "export.variants=[]", "--resume-if-any", *folders]

    def job(epochs):
        arguments = [str(digit_folder), *options, "--epochs", str(epochs)]
        return CliRunner().invoke(train, arguments, catch_exceptions=False).output

    first, again, other = job(1), job(1), job(2)

    assert "Wrote" in first
    assert again.strip().endswith("with these settings and images; nothing is to be done")
    assert f"Wrote {tmp_path / 'models' / 'digits' / '2'}" in other
    assert artifact.versions(tmp_path / "models" / "digits") == [1, 2]
