import base64
import re

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from training.trial_view import best_of
from training.tune_report import write_page

SIZES = CategoricalDistribution((8, 16, 32, 64, 128))


def trial(state=TrialState.COMPLETE, size=32, rate=0.1, accuracy=0.9, **system_attrs):
    done = state == TrialState.COMPLETE
    return create_trial(
        state=state,
        value=accuracy if done else None,
        params={"loop.batch_size": size, "optimiser.learning_rate": rate},
        distributions={"loop.batch_size": SIZES, "optimiser.learning_rate": FloatDistribution(0.01, 1.0, log=True)},
        user_attrs={"val_accuracy": accuracy, "val_loss": 1 - accuracy, "best_epoch": 1} if done else {},
        system_attrs=system_attrs,
    )


@pytest.fixture
def page(tmp_path):
    def write(*trials):
        study = optuna.create_study(direction="maximize", study_name="s")
        for each in trials:
            study.add_trial(each)
        write_page(tmp_path / "page.html", study, "accuracy", best_of(study.trials, "accuracy"))
        return (tmp_path / "page.html").read_text(encoding="utf-8")

    return write


def test_a_trial_that_was_stopped_and_repeated_is_there_once(page):
    html = page(trial(TrialState.FAIL), trial(convoy_stopped=[0]), trial(size=64, accuracy=0.8))

    assert "2 trials, 2 of them to the end" in html
    assert "its worker stopped" not in html


def test_a_trial_whose_worker_was_lost_for_good_is_shown(page):
    assert "failed: its worker stopped" in page(trial(TrialState.FAIL), trial())


def test_the_ends_of_an_axis_are_the_choices_that_were_tried(page):
    html = page(trial(size=32), trial(size=64, accuracy=0.8), trial(size=128, accuracy=0.7))
    (parallel,) = re.findall(r'alt="Parallel coordinates" src="data:image/svg\+xml;base64,([^"]*)"', html)
    texts = re.findall(r"<!-- (.*?) -->", base64.b64decode(parallel).decode())

    assert {"32", "128"} <= set(texts)
    assert "8" not in texts
