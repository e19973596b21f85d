"""Training on a GPU: every number format, exact continuation, transfer, too little memory, `torchrun`."""

import subprocess
import sys

import pytest
import runs
import torch
from parts import PARTS
from toys import environment

from service import artifact
from service.errors import TrainingError
from training import checkpoint
from training.config import Experiment
from training.folders import LAST
from training.interrupt import InterruptedRunError
from training.loop import Trainer
from training.run import run


def experiment(name="digits", **tree):
    loop = {"epochs": 8, "batch_size": 32, **tree.pop("loop", {})}
    base = {"name": name, "input": {"size": 16}, "export": {"variants": []}}
    return Experiment.model_validate({**base, **tree, "loop": loop})


def trained(recipe, source, folder, **options):
    return run(recipe, source, folder / "models", folder / "runs", runs.display(), **options)


def last_weights(result):
    return checkpoint.load(result.folder / LAST)["stepper"]["model"]


@pytest.mark.parametrize(
    ("precision", "compiled"),
    [("float32", False), ("bfloat16", False), ("float16", False), ("bfloat16", True)],
)
def test_it_learns_in_every_number_format(digit_folder, tmp_path, precision, compiled):
    recipe = experiment(
        model={"name": "resnet8", "options": {"width": 0.5}},
        input={"size": 16, "channels": 3},
        loop={"precision": precision, "compile": compiled, "ema_decay": 0.9, "label_smoothing": 0.1},
        optimiser={"clip_norm": 1.0},
    )
    result = trained(recipe, digit_folder, tmp_path)
    assert result.evaluation.accuracy > 0.7
    assert artifact.read_manifest(result.version).metrics["accuracy"] == pytest.approx(result.evaluation.accuracy)


@pytest.mark.parametrize("part", PARTS)
def test_a_run_that_is_stopped_ends_as_the_one_that_was_not(digit_folder, tmp_path, part, monkeypatch):
    loop = {**PARTS[part].get("loop", {}), "epochs": 3, "deterministic": True, "ema_decay": 0.9}
    recipe = experiment(**{**PARTS[part], "loop": loop})
    whole = trained(recipe, digit_folder, tmp_path / "whole")
    fit, stops = Trainer.fit, iter([5])

    def stopped(self, watcher, stop=lambda: False):
        at = next(stops, None)
        fit(self, watcher, stop if at is None else lambda: self.progress.step == at)

    monkeypatch.setattr(Trainer, "fit", stopped)
    with pytest.raises(InterruptedRunError) as interrupted:
        trained(recipe, digit_folder, tmp_path / "cut")
    again = trained(recipe, digit_folder, tmp_path / "cut", resume=interrupted.value.folder)
    expected, found = last_weights(whole), last_weights(again)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_transfer_in_stages(digit_folder, tmp_path):
    first = trained(experiment(loop={"epochs": 2}), digit_folder, tmp_path)
    weights = str(first.folder / "best.pt")
    recipe = experiment(name="again", transfer={"weights": weights, "strategy": "gradual"}, loop={"epochs": 4})
    assert trained(recipe, digit_folder, tmp_path).evaluation.accuracy > 0.3


def test_too_little_memory_is_told_with_what_helps(digit_folder, tmp_path):
    device = torch.cuda.current_device()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.002, device)
    recipe = experiment(
        model={"name": "resnet18", "options": {"small_images": True}},
        input={"size": 64, "channels": 3},
        loop={"batch_size": 128, "precision": "float32"},
    )
    try:
        with pytest.raises(TrainingError, match="--accumulate"):
            trained(recipe, digit_folder, tmp_path)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def test_under_torchrun_it_ends_and_publishes(digit_folder, tmp_path):
    """With one process for each GPU; from two on their gradients travel by nccl."""
    count = torch.cuda.device_count()
    places = ["--repository", tmp_path / "models", "--runs", tmp_path / "runs", "--name", "digits"]
    choices = ["--epochs", "2", "--image-size", "16", "--set", "export.variants=[]"]
    command = ["torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m", "service"]
    done = subprocess.run(
        [sys.executable, "-m", *command, "train", digit_folder, *map(str, places), *choices],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((tmp_path / "models").glob("*/1/manifest.json"))
