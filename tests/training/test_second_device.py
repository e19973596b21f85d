"""Whole runs on a device that is not the CPU; `second_device` says what it is. A GPU's kernels are not tested here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from toys import environment

SCRIPT = Path(__file__).parents[1] / "support" / "second_device.py"
NO_GEOMETRY = {"rotation_degrees": 0, "translation": 0, "scale": 0}


def recipe(name, epochs=2, **tree):
    loop = {"epochs": epochs, "precision": "float32", "threads": 1, **tree.pop("loop", {})}
    return {"name": name, "input": {"size": 16}, "export": {"variants": []}, **tree, "loop": loop}


def recipes(folder):
    """Together they use every part of a step."""
    return {
        "rotation, pieces, clipping, class weights": recipe(
            "plain",
            loop={"accumulate": 2, "balance": "weights", "label_smoothing": 0.1},
            optimiser={"clip_norm": 1.0},
        ),
        "crops, colour, erasing, mixing, whitening": recipe(
            "mixed",
            model={"name": "resnet8", "options": {"width": 0.25}},
            input={"size": 16, "channels": 3},
            augment={
                **NO_GEOMETRY,
                "crop_padding": 2,
                "horizontal_flip": True,
                "fill": "zeros",
                "erasing": 0.5,
                "brightness": 0.2,
                "contrast": 0.2,
                "saturation": 0.2,
                "mixup": 0.4,
                "cutmix": 0.4,
            },
            optimiser={"name": "sgd"},
        ),
        "TrivialAugment, auxiliary heads": recipe(
            "heads",
            epochs=1,
            model={"name": "googlenet", "options": {"width": 0.25}},
            augment={"trivial_augment": True, "crop_area": 0.5, "fill": "reflection"},
        ),
        "phases, frozen layers": recipe(
            "transfer",
            epochs=3,
            transfer={"weights": str(folder / "cpu" / "runs" / "plain" / "1" / "best.pt"), "strategy": "gradual"},
        ),
    }


@pytest.fixture(scope="module")
def differing(digit_folder, tmp_path_factory):
    """For each recipe the weights in which a run on the second device ended differently."""
    folder = tmp_path_factory.mktemp("second-device")
    command = [sys.executable, SCRIPT, digit_folder, folder, json.dumps(recipes(folder))]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=110)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", recipes(Path()))
def test_a_run_leaves_nothing_on_the_cpu_and_ends_the_same(differing, name):
    assert differing[name] == []
