import contextlib
import io
import re
import sys

import numpy as np
from rich.console import Console

from training.calibrate import Calibration
from training.display import Display, class_table, console_of_process
from training.metrics import ClassScores

FOUND = Calibration(1.5, error_before=0.0812, error_after=0.0104, likelihood_before=0.31, likelihood_after=0.2204)


def display(*, terminal):
    return Display(Console(file=io.StringIO(), width=100, force_terminal=terminal))


def test_a_spinner_names_each_step_on_a_terminal():
    shown = display(terminal=True)
    with shown.working("Exporting") as tell:
        tell("int8: calibrating [1]")
    text = shown.console.file.getvalue()
    assert "Exporting" in text
    assert "int8: calibrating [1]" in text
    assert re.search(r"0:00:0\d", text)


def test_there_is_no_spinner_in_a_log_file():
    shown = display(terminal=False)
    with shown.working("Exporting") as tell:
        tell("int8: calibrating")
    assert shown.console.file.getvalue().strip() == ""


def test_cautions_are_told_and_empty_ones_are_not():
    shown = display(terminal=False)
    shown.caution("", "believe little", "")
    assert shown.console.file.getvalue() == "Note: believe little\n"


def test_frames_are_not_lost_where_the_standard_output_is_redirected(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    shown = console_of_process()
    with contextlib.redirect_stdout(io.StringIO()):
        shown.say("still here")
    assert terminal.getvalue() == "still here\n"


def test_the_hardest_of_many_classes_are_some_that_were_judged():
    scores = ClassScores(*(np.linspace(0, 1, 60) for _ in range(3)), support=np.array([0] * 30 + [3] * 30))
    table = class_table(scores, [f"class {n}" for n in range(60)])

    assert [str(name) for name in table.columns[0].cells] == [f"class {n}" for n in range(30, 50)]
    assert table.title == "the 20 hardest of 60 classes"


def test_calibration_is_shown_before_and_after():
    shown = display(terminal=False)
    shown.calibration(FOUND)
    lines = [line.split() for line in shown.console.file.getvalue().splitlines()]
    assert lines[0][-3:] == ["T", "=", "1.5"]
    assert lines[1] == ["expected", "calibration", "error", "0.0812", "0.0104"]
    assert lines[2] == ["negative", "log-likelihood", "0.3100", "0.2204"]
