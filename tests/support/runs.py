"""A whole training run on the digits, for tests that compare with it."""

import io

from rich.console import Console

from training.display import Display

TREE = {"name": "digits", "input": {"size": 16}, "loop": {"epochs": 4, "precision": "float32", "threads": 1}}


def display():
    return Display(Console(file=io.StringIO(), width=120))
