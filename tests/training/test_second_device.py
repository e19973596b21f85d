"""Whole runs on a device that is not the CPU; `second_device` says what it is. A GPU's kernels are not tested here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from parts import PARTS
from toys import environment

SCRIPT = Path(__file__).parents[1] / "support" / "second_device.py"


def recipe(name, epochs=2, **tree):
    loop = {"epochs": epochs, "precision": "float32", "threads": 1, **tree.pop("loop", {})}
    return {"name": name, "input": {"size": 16}, "export": {"variants": []}, **tree, "loop": loop}


def recipes(folder):
    """Together they use every part of a step."""
    weights = str(folder / "cpu" / "runs" / "0" / "1" / "best.pt")
    return {
        **{part: recipe(str(number), **tree) for number, (part, tree) in enumerate(PARTS.items())},
        "phases, frozen layers": recipe("transfer", epochs=3, transfer={"weights": weights, "strategy": "gradual"}),
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
